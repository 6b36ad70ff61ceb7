"""rope's kernel, and what the norm that turns its rows at once takes from it (_norm_and_turn.py).

Sizes: see rope.py.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rotate_heads(
    x_ptr,  # [H, D]: the heads of one token
    y_ptr,
    x_stride,  # elements from one head to the next
    y_stride,
    cos_1,  # [1, R/2]: a pair turns to (first * cos_1 + second * from_second, second * cos_2 + first * from_first)
    cos_2,
    from_first,
    from_second,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, INPLACE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token, a block of heads at a time."""
    PAIRS: tl.constexpr = R // 2
    for start in tl.static_range(0, HEADS, BLOCK_HEADS):
        heads = start + tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
        x_heads = x_ptr + heads * x_stride
        y_heads = y_ptr + heads * y_stride
        if INTERLEAVED:
            # pairs lie side by side: one load in memory order, taken apart in registers
            cols = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
            mask = (heads < HEADS) & (cols < R)
            x = tl.load(x_heads + cols, mask=mask, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(x, (BLOCK_HEADS, BLOCK_PAIRS, 2)))
            y = tl.join(first * cos_1 + second * from_second, second * cos_2 + first * from_first)
            tl.store(y_heads + cols, tl.reshape(y, (BLOCK_HEADS, 2 * BLOCK_PAIRS)), mask=mask)
        else:
            pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
            mask = (heads < HEADS) & (pairs < PAIRS)
            first = tl.load(x_heads + pairs, mask=mask, other=0.0).to(tl.float32)
            second = tl.load(x_heads + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
            tl.store(y_heads + pairs, first * cos_1 + second * from_second, mask=mask)
            tl.store(y_heads + PAIRS + pairs, second * cos_2 + first * from_first, mask=mask)
        if D > R and not INPLACE:
            rest = R + tl.arange(0, BLOCK_REST)[None, :]
            mask = (heads < HEADS) & (rest < D)
            tl.store(y_heads + rest, tl.load(x_heads + rest, mask=mask, other=0.0), mask=mask)


@triton.jit
def _axis_of(pairs, TIME: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, ALTERNATING: tl.constexpr):
    """Which of the three angles a pair turns by: 0 time, 1 height, 2 width."""
    if ALTERNATING:
        axis = pairs % 3
        beyond = ((axis == 1) & (pairs >= 3 * HEIGHT)) | ((axis == 2) & (pairs >= 3 * WIDTH))
        axis = tl.where(beyond, 0, axis)
    else:
        axis = (pairs >= TIME).to(tl.int32) + (pairs >= TIME + HEIGHT).to(tl.int32)
    return axis


@triton.jit
def angles_of(cos_ptr, sin_ptr, pairs, R: tl.constexpr):
    """cos and sin of a token [R], in fp32, for the first and for the second columns of pairs [1, R/2]."""
    PAIRS: tl.constexpr = R // 2
    mask = pairs < PAIRS
    cos_1 = tl.load(cos_ptr + pairs, mask=mask, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + pairs, mask=mask, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
    return cos_1, cos_2, sin_1, sin_2


# not specialized: a token count that is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_tokens"])
def _rope_kernel(
    q_ptr,  # [B, Hq, T, D]
    k_ptr,  # [B, Hk, T, D]
    cos_ptr,  # [B, T, R]; SECTIONS: [3, B, T, R]; COMPLEX: the last dimension is (cos, sin) of each pair in turn
    sin_ptr,  # as cos; COMPLEX: not read
    yq_ptr,  # [B, Hq, T, D]
    yk_ptr,  # [B, Hk, T, D]
    q_batch_stride, q_head_stride, q_token_stride,  # elements from one batch entry, head, token to the next
    k_batch_stride, k_head_stride, k_token_stride,
    yq_batch_stride, yq_head_stride, yq_token_stride,
    yk_batch_stride, yk_head_stride, yk_token_stride,
    angle_axis_stride, angle_batch_stride, angle_token_stride,  # of cos and sin; 0 where the batch shares them
    n_tokens,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    COMPLEX: tl.constexpr, SECTIONS: tl.constexpr, TIME: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    ALTERNATING: tl.constexpr, BACKWARD: tl.constexpr, INPLACE: tl.constexpr, BLOCK_Q_HEADS: tl.constexpr,
    BLOCK_K_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // n_tokens
    token = pid % n_tokens
    angle = batch * angle_batch_stride + token * angle_token_stride
    PAIRS: tl.constexpr = R // 2
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    mask = pairs < PAIRS
    if SECTIONS:
        angle += _axis_of(pairs, TIME, HEIGHT, WIDTH, ALTERNATING).to(tl.int64) * angle_axis_stride
    if COMPLEX:
        cos_1 = tl.load(cos_ptr + angle + 2 * pairs, mask=mask, other=0.0).to(tl.float32)
        sin_1 = tl.load(cos_ptr + angle + 2 * pairs + 1, mask=mask, other=0.0).to(tl.float32)
        cos_2, sin_2 = cos_1, sin_1
    else:
        cos_1, cos_2, sin_1, sin_2 = angles_of(cos_ptr + angle, sin_ptr + angle, pairs, R)
    # [[cos_1, -sin_1], [sin_2, cos_2]] forward, its transpose backward
    if BACKWARD:
        from_first, from_second = -sin_1, sin_2
    else:
        from_first, from_second = sin_2, -sin_1

    _rotate_heads(
        q_ptr + batch * q_batch_stride + token * q_token_stride,
        yq_ptr + batch * yq_batch_stride + token * yq_token_stride,
        q_head_stride,
        yq_head_stride,
        cos_1,
        cos_2,
        from_first,
        from_second,
        Q_HEADS,
        D,
        R,
        INTERLEAVED,
        INPLACE,
        BLOCK_Q_HEADS,
        BLOCK_PAIRS,
        BLOCK_REST,
    )
    _rotate_heads(
        k_ptr + batch * k_batch_stride + token * k_token_stride,
        yk_ptr + batch * yk_batch_stride + token * yk_token_stride,
        k_head_stride,
        yk_head_stride,
        cos_1,
        cos_2,
        from_first,
        from_second,
        K_HEADS,
        D,
        R,
        INTERLEAVED,
        INPLACE,
        BLOCK_K_HEADS,
        BLOCK_PAIRS,
        BLOCK_REST,
    )
