"""Rotary embedding of q and k in one launch; backward is the rotation by -theta, one launch too.

    q' = q * cos + rotate(q) * sin,  k' = k * cos + rotate(k) * sin

over the first R columns of a head (cos and sin are R wide); the other D - R pass through. ``rotate`` turns pairs of
columns: (i, i + R/2) as most HuggingFace models do, or (2i, 2i + 1) ("interleaved").

Saved for backward: cos and sin. Traffic per element of q and k: 1 read + 1 write each way. cos and sin are read once
per token for all heads. q' and k' get the memory layout of q and k (and so do the gradients), so that the transposes
around attention stay free. fp32 inside, one rounding.

Sizes: B batch, T tokens, H heads (q and k have their own number), D columns of a head, R rotated columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_fused.ops._triton import check_dtypes, on_device, power_of_2, runs_kernels

# pairs of columns that a program turns at a time (heads x R/2), and its warps. 0.8 % from best of 15 at 32768 tokens of
# 64 + 8 heads of 128 on H100 (benchmarks/results/h100/tune.csv)
TILE_PAIRS = 2048
NUM_WARPS = 4


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One of q and k, [B, H, T, D]; cos and sin [B or 1, 1, T, R]."""
    r = cos.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., : r // 2], turned[..., r // 2 :]
    cos_1, cos_2, sin_1, sin_2 = *cos.chunk(2, -1), *sin.chunk(2, -1)
    pair = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest.to(turned.dtype)), -1)


def rope_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _rotate_reference(q, cos, sin, interleaved), _rotate_reference(k, cos, sin, interleaved)


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
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
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
        if D > R:
            rest = R + tl.arange(0, BLOCK_REST)[None, :]
            mask = (heads < HEADS) & (rest < D)
            tl.store(y_heads + rest, tl.load(x_heads + rest, mask=mask, other=0.0), mask=mask)


# not specialized: a token count that is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_tokens"])
def _rope_kernel(
    q_ptr,  # [B, Hq, T, D]
    k_ptr,  # [B, Hk, T, D]
    cos_ptr,  # [B, T, R]
    sin_ptr,
    yq_ptr,  # [B, Hq, T, D]
    yk_ptr,  # [B, Hk, T, D]
    q_batch_stride, q_head_stride, q_token_stride,  # elements from one batch entry, head, token to the next
    k_batch_stride, k_head_stride, k_token_stride,
    yq_batch_stride, yq_head_stride, yq_token_stride,
    yk_batch_stride, yk_head_stride, yk_token_stride,
    angle_batch_stride, angle_token_stride,  # of cos and sin; 0 where the batch shares them
    n_tokens,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BACKWARD: tl.constexpr, BLOCK_Q_HEADS: tl.constexpr, BLOCK_K_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // n_tokens
    token = pid % n_tokens
    cos_ptr += batch * angle_batch_stride + token * angle_token_stride
    sin_ptr += batch * angle_batch_stride + token * angle_token_stride
    PAIRS: tl.constexpr = R // 2
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    cos_1 = tl.load(cos_ptr + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)
    cos_2 = tl.load(cos_ptr + PAIRS + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)
    sin_1 = tl.load(sin_ptr + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)
    sin_2 = tl.load(sin_ptr + PAIRS + pairs, mask=pairs < PAIRS, other=0.0).to(tl.float32)
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
        BLOCK_K_HEADS,
        BLOCK_PAIRS,
        BLOCK_REST,
    )


def _strides(x: Tensor) -> tuple[int, ...]:
    """Of x [B, heads, T, D] those of batch, head and token; from the shape where dynamo can't say them (row_stride)."""
    if torch.compiler.is_compiling():
        _, heads, n_tokens, d = x.shape
        if x.is_contiguous():
            return heads * n_tokens * d, n_tokens * d, d
        if x.transpose(1, 2).is_contiguous():
            return heads * n_tokens * d, d, heads * d
    return x.stride()[:3]


def _angle_strides(cos: Tensor) -> tuple[int, ...]:
    if torch.compiler.is_compiling() and cos.is_contiguous():
        return cos.shape[1] * cos.shape[2], cos.shape[2]
    return cos.stride()[:2]


def _rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, yq: Tensor, yk: Tensor, interleaved: bool, backward: bool
) -> None:
    """q, yq [B, Hq, T, D], k, yk [B, Hk, T, D], cos, sin [B, T, R]: writes yq and yk."""
    batch, q_heads, n_tokens, d = q.shape
    k_heads, r = k.shape[1], cos.shape[2]
    if batch * n_tokens * d == 0:
        return
    block_pairs = power_of_2(r // 2)
    most_heads = max(1, TILE_PAIRS // block_pairs)
    with on_device(q):
        _rope_kernel[(batch * n_tokens,)](
            q,
            k,
            cos,
            sin,
            yq,
            yk,
            *_strides(q),
            *_strides(k),
            *_strides(yq),
            *_strides(yk),
            *_angle_strides(cos),
            n_tokens,
            Q_HEADS=q_heads,
            K_HEADS=k_heads,
            D=d,
            R=r,
            INTERLEAVED=interleaved,
            BACKWARD=backward,
            BLOCK_Q_HEADS=min(power_of_2(q_heads), most_heads),
            BLOCK_K_HEADS=min(power_of_2(k_heads), most_heads),
            BLOCK_PAIRS=block_pairs,
            BLOCK_REST=power_of_2(d - r),
            num_warps=NUM_WARPS,
        )


def rope_fwd(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """[B, Hq, T, D], [B, Hk, T, D], [B, T, R] x 2 -> q', k' in the layout of q and k."""
    # preserve_format: strides in the order of q's, without its gaps
    yq = torch.empty_like(q, dtype=torch.promote_types(q.dtype, cos.dtype))
    yk = torch.empty_like(k, dtype=torch.promote_types(k.dtype, cos.dtype))
    _rope(q, k, cos, sin, yq, yk, interleaved, backward=False)
    return yq, yk


def rope_bwd(
    dyq: Tensor, dyk: Tensor, cos: Tensor, sin: Tensor, dq: Tensor, dk: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """dyq, dq [B, Hq, T, D], dyk, dk [B, Hk, T, D], [B, T, R] x 2 -> dq, dk, written."""
    _rope(dyq, dyk, cos, sin, dq, dk, interleaved, backward=True)
    return dq, dk


class RopeFunction(torch.autograd.Function):
    """Autograd around the two launchers; sees q [B, Hq, T, D], k [B, Hk, T, D], cos and sin [B, T, R]."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
        yq, yk = rope_fwd(q, k, cos, sin, interleaved)
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        ctx.by_token, ctx.dtypes = tuple(map(_by_token, (yq, yk))), (q.dtype, k.dtype)
        return yq, yk

    @staticmethod
    @once_differentiable
    def backward(ctx, dyq: Tensor, dyk: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        # in the layout that q and k had, whatever attention handed back: the projections want it
        dq, dk = (
            _room(dy, by_token, dtype) for dy, by_token, dtype in zip((dyq, dyk), ctx.by_token, ctx.dtypes, strict=True)
        )
        dq, dk = rope_bwd(_neighbours(dyq), _neighbours(dyk), cos, sin, dq, dk, ctx.interleaved)
        return dq, dk, None, None, None


def _by_token(x: Tensor) -> bool:
    """Whether x [B, heads, T, D] lies in memory as [B, T, heads, D]; a flag, since dynamo can't keep all strides."""
    return x.transpose(1, 2).is_contiguous()


def _room(like: Tensor, by_token: bool, dtype: torch.dtype) -> Tensor:
    batch, heads, n_tokens, d = like.shape
    if by_token:
        return like.new_empty(batch, n_tokens, heads, d, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, heads, n_tokens, d, dtype=dtype)


def _neighbours(x: Tensor) -> Tensor:
    """x with the columns of a head side by side: itself in nearly every case."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
    if unsqueeze_dim not in (1, 2):
        raise ValueError(f"rope: unsqueeze_dim is {unsqueeze_dim}; 1 is for [B, H, T, D], 2 for [B, T, H, D]")
    if q.ndim != 4 or k.ndim != 4 or cos.ndim != 3 or cos.shape != sin.shape:
        raise ValueError(f"rope: q and k must have 4 dimensions, cos and sin one shape [B or 1, T, R]; got {shapes}")
    batch, n_tokens, d = q.shape[0], q.shape[3 - unsqueeze_dim], q.shape[3]
    if (k.shape[0], k.shape[3 - unsqueeze_dim], k.shape[3]) != (batch, n_tokens, d):
        raise ValueError(f"rope: q and k may differ in their heads only (dimension {unsqueeze_dim}); got {shapes}")
    if cos.shape[0] not in (1, batch) or cos.shape[1] != n_tokens:
        raise ValueError(f"rope: cos must be [{batch} or 1, {n_tokens}, R]; got {shapes}")
    if not 0 < cos.shape[2] <= d or cos.shape[2] % 2:
        raise ValueError(f"rope: cos must be an even number of columns wide, at most {d} (a head); got {shapes}")
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        raise ValueError("rope: cos and sin get no gradient, and one of them requires it; detach them")


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Turns q [B, Hq, T, D] and k [B, Hk, T, D] (``unsqueeze_dim=2``: [B, T, H, D]) by the angles of cos and sin.

    cos and sin are [B or 1, T, R], R <= D, as HuggingFace makes them: column i and column R/2 + i belong to pair i
    (``cat((angles, angles), -1)``), whichever columns of q the pair is: i and R/2 + i, or with ``interleaved`` 2i and
    2i + 1. They get no gradient. Any strides of q and k are read in place if the columns of a head lie side by side.
    The results have the promoted dtype of q (k) and cos.
    """
    _check(q, k, cos, sin, unsqueeze_dim)
    if not runs_kernels(q, k, cos, sin):
        return rope_reference(q, k, cos, sin, interleaved=interleaved, unsqueeze_dim=unsqueeze_dim)
    check_dtypes("rope", q=q, k=k, cos=cos, sin=sin)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = _neighbours(cos), _neighbours(sin)
    if cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    batch = q.shape[0]
    yq, yk = RopeFunction.apply(
        _neighbours(q), _neighbours(k), cos.expand(batch, -1, -1), sin.expand(batch, -1, -1), interleaved
    )
    if unsqueeze_dim == 2:
        yq, yk = yq.transpose(1, 2), yk.transpose(1, 2)
    return yq, yk
