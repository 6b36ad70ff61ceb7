"""rms_norm_rope's kernels: all heads of a token, a block of heads at a time; angles are loaded once for all of them.

A head is three tiles: the first and the second columns of its pairs, [heads, R/2] each, and the columns that do not
turn, [heads, D - R].

Sizes: B batch, T tokens, H heads (q and k have their own number), D columns of a head, R rotated columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.norms._wide_rms_norm import weight_at
from ds_fused.ops.rotary._rope_kernels import angles_of


@triton.jit
def _normalised(x_hat, weight, DTYPE: tl.constexpr, NORM_DTYPE: tl.constexpr, CAST_BEFORE: tl.constexpr):
    """The norm's result in fp32, rounded as it would be in memory. DTYPE: that of x."""
    if CAST_BEFORE:
        x_hat = x_hat.to(DTYPE).to(tl.float32)
    return (x_hat * weight).to(NORM_DTYPE).to(tl.float32)


@triton.jit
def _weight_of_heads(
    weight_ptr, D: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """offset + weight of the first and the second columns of pairs, and of those that stay."""
    PAIRS: tl.constexpr = R // 2
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    rest = R + tl.arange(0, BLOCK_REST)[None, :]
    weight_1 = weight_at(weight_ptr, pairs, pairs < PAIRS, OFFSET, CAST_BEFORE)
    weight_2 = weight_at(weight_ptr, PAIRS + pairs, pairs < PAIRS, OFFSET, CAST_BEFORE)
    weight_3 = weight_at(weight_ptr, rest, rest < D, OFFSET, CAST_BEFORE)
    return weight_1, weight_2, weight_3


@triton.jit
def _norm_and_turn_heads(
    x_ptr,  # [H, D]: the heads of one token
    weight_ptr,  # [D]
    y_ptr,  # [H, D]
    rstd_ptr,  # [H]
    x_stride,  # elements from one head to the next
    y_stride,
    cos_1,  # [1, R/2]: a pair turns to (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    cos_2,
    sin_1,
    sin_2,
    eps,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """All heads of one token, a block of heads at a time."""
    PAIRS: tl.constexpr = R // 2
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    # with two dtypes of 16 bits or one of 32, PyTorch's product is fp32
    SAME: tl.constexpr = weight_ptr.dtype.element_ty == DTYPE or not CAST_BEFORE
    NORM_DTYPE: tl.constexpr = DTYPE if SAME else tl.float32
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    rest = R + tl.arange(0, BLOCK_REST)[None, :]
    weight_1, weight_2, weight_3 = _weight_of_heads(
        weight_ptr, D, R, OFFSET, CAST_BEFORE, BLOCK_PAIRS, BLOCK_REST
    )  # fmt: skip
    for start in tl.static_range(0, HEADS, BLOCK_HEADS):
        heads = start + tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
        x_heads = x_ptr + heads * x_stride
        y_heads = y_ptr + heads * y_stride
        mask = (heads < HEADS) & (pairs < PAIRS)
        first = tl.load(x_heads + pairs, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_heads + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)
        if D > R:
            rest_mask = (heads < HEADS) & (rest < D)
            still = tl.load(x_heads + rest, mask=rest_mask, other=0.0).to(tl.float32)
            squares += tl.sum(still * still, axis=1, keep_dims=True)
        rstd = tl.rsqrt(squares / D + eps)
        tl.store(rstd_ptr + heads, rstd, mask=heads < HEADS)

        first = _normalised(first * rstd, weight_1, DTYPE, NORM_DTYPE, CAST_BEFORE)
        second = _normalised(second * rstd, weight_2, DTYPE, NORM_DTYPE, CAST_BEFORE)
        tl.store(y_heads + pairs, first * cos_1 - second * sin_1, mask=mask)
        tl.store(y_heads + PAIRS + pairs, second * cos_2 + first * sin_2, mask=mask)
        if D > R:
            still = _normalised(still * rstd, weight_3, DTYPE, NORM_DTYPE, CAST_BEFORE)
            tl.store(y_heads + rest, still, mask=rest_mask)


# not specialized: a token count that is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_tokens"])
def _rms_norm_rope_fwd_kernel(
    q_ptr,  # [B, Hq, T, D]
    k_ptr,  # [B, Hk, T, D]
    q_weight_ptr,  # [D]
    k_weight_ptr,  # [D]
    cos_ptr,  # [B, T, R]
    sin_ptr,  # [B, T, R]
    yq_ptr,  # [B, Hq, T, D]
    yk_ptr,  # [B, Hk, T, D]
    rstd_ptr,  # [B, T, Hq + Hk]
    q_batch_stride, q_head_stride, q_token_stride,  # elements from one batch entry, head, token to the next
    k_batch_stride, k_head_stride, k_token_stride,
    yq_batch_stride, yq_head_stride, yq_token_stride,
    yk_batch_stride, yk_head_stride, yk_token_stride,
    angle_batch_stride, angle_token_stride,  # of cos and sin; 0 where the batch shares them
    n_tokens,
    eps,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr,
    CAST_BEFORE: tl.constexpr, BLOCK_Q_HEADS: tl.constexpr, BLOCK_K_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    # tokens are divided in 32 bits, which is much faster; from there on it is 64
    batch = (tl.program_id(0) // n_tokens).to(tl.int64)
    token = (tl.program_id(0) % n_tokens).to(tl.int64)
    angle = batch * angle_batch_stride + token * angle_token_stride
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    cos_1, cos_2, sin_1, sin_2 = angles_of(cos_ptr + angle, sin_ptr + angle, pairs, R)
    rstd_ptr += tl.program_id(0).to(tl.int64) * (Q_HEADS + K_HEADS)
    _norm_and_turn_heads(
        q_ptr + batch * q_batch_stride + token * q_token_stride,
        q_weight_ptr,
        yq_ptr + batch * yq_batch_stride + token * yq_token_stride,
        rstd_ptr,
        q_head_stride, yq_head_stride,
        cos_1, cos_2, sin_1, sin_2,
        eps,
        Q_HEADS, D, R, OFFSET, CAST_BEFORE,
        BLOCK_Q_HEADS, BLOCK_PAIRS, BLOCK_REST,
    )  # fmt: skip
    _norm_and_turn_heads(
        k_ptr + batch * k_batch_stride + token * k_token_stride,
        k_weight_ptr,
        yk_ptr + batch * yk_batch_stride + token * yk_token_stride,
        rstd_ptr + Q_HEADS,
        k_head_stride, yk_head_stride,
        cos_1, cos_2, sin_1, sin_2,
        eps,
        K_HEADS, D, R, OFFSET, CAST_BEFORE,
        BLOCK_K_HEADS, BLOCK_PAIRS, BLOCK_REST,
    )  # fmt: skip


@triton.jit
def _backward_of_heads(
    dy_ptr,  # [H, D]: the heads of one token
    x_ptr,  # [H, D]
    dx_ptr,  # [H, D]
    rstd_ptr,  # [H]
    dy_stride,  # elements from one head to the next
    x_stride,
    dx_stride,
    weight_1,  # [1, R/2], [1, R/2], [1, D - R]: of the first and the second columns of pairs, and of those that stay
    weight_2,
    weight_3,
    dweight_1,  # the same of all tokens so far, for each head of a block
    dweight_2,
    dweight_3,
    cos_1,
    cos_2,
    sin_1,
    sin_2,
    HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_DWEIGHT: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Writes dx of one token's heads; returns the three parts of dweight with the token's added."""
    PAIRS: tl.constexpr = R // 2
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    rest = R + tl.arange(0, BLOCK_REST)[None, :]
    for start in tl.static_range(0, HEADS, BLOCK_HEADS):
        heads = start + tl.arange(0, BLOCK_HEADS)[:, None].to(tl.int64)
        dy_heads = dy_ptr + heads * dy_stride
        x_heads = x_ptr + heads * x_stride
        mask = (heads < HEADS) & (pairs < PAIRS)
        rstd = tl.load(rstd_ptr + heads, mask=heads < HEADS, other=0.0)
        dy_1 = tl.load(dy_heads + pairs, mask=mask, other=0.0).to(tl.float32)
        dy_2 = tl.load(dy_heads + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32)
        x_hat_1 = tl.load(x_heads + pairs, mask=mask, other=0.0).to(tl.float32) * rstd
        x_hat_2 = tl.load(x_heads + PAIRS + pairs, mask=mask, other=0.0).to(tl.float32) * rstd
        # of the norm's result: dy turned back
        d_1 = dy_1 * cos_1 + dy_2 * sin_2
        d_2 = dy_2 * cos_2 - dy_1 * sin_1
        if D > R:
            rest_mask = (heads < HEADS) & (rest < D)
            d_3 = tl.load(dy_heads + rest, mask=rest_mask, other=0.0).to(tl.float32)
            x_hat_3 = tl.load(x_heads + rest, mask=rest_mask, other=0.0).to(tl.float32) * rstd
        if WANTS_DWEIGHT:
            dweight_1 += d_1 * x_hat_1
            dweight_2 += d_2 * x_hat_2
            if D > R:
                dweight_3 += d_3 * x_hat_3
        if WANTS_DX:
            d_1 *= weight_1
            d_2 *= weight_2
            products = tl.sum(d_1 * x_hat_1 + d_2 * x_hat_2, axis=1, keep_dims=True)
            if D > R:
                d_3 *= weight_3
                products += tl.sum(d_3 * x_hat_3, axis=1, keep_dims=True)
            mean = products / D
            dx_heads = dx_ptr + heads * dx_stride
            tl.store(dx_heads + pairs, rstd * (d_1 - x_hat_1 * mean), mask=mask)
            tl.store(dx_heads + PAIRS + pairs, rstd * (d_2 - x_hat_2 * mean), mask=mask)
            if D > R:
                tl.store(dx_heads + rest, rstd * (d_3 - x_hat_3 * mean), mask=rest_mask)
    return dweight_1, dweight_2, dweight_3


@triton.jit
def _store_dweight(
    dweight_ptr,  # [D] fp32
    dweight_1,
    dweight_2,
    dweight_3,
    D: tl.constexpr, R: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """What the heads of a block have added up, together."""
    PAIRS: tl.constexpr = R // 2
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    rest = R + tl.arange(0, BLOCK_REST)[None, :]
    tl.store(dweight_ptr + pairs, tl.sum(dweight_1, axis=0, keep_dims=True), mask=pairs < PAIRS)
    tl.store(dweight_ptr + PAIRS + pairs, tl.sum(dweight_2, axis=0, keep_dims=True), mask=pairs < PAIRS)
    if D > R:
        tl.store(dweight_ptr + rest, tl.sum(dweight_3, axis=0, keep_dims=True), mask=rest < D)


@triton.jit(do_not_specialize=["n_tokens", "n_all_tokens"])
def _rms_norm_rope_bwd_kernel(
    dyq_ptr,  # [B, Hq, T, D]
    dyk_ptr,  # [B, Hk, T, D]
    q_ptr,  # [B, Hq, T, D]
    k_ptr,  # [B, Hk, T, D]
    q_weight_ptr,  # [D]
    k_weight_ptr,  # [D]
    cos_ptr,  # [B, T, R]
    sin_ptr,  # [B, T, R]
    rstd_ptr,  # [B, T, Hq + Hk], whether heads of both are wanted or not
    dq_ptr,  # [B, Hq, T, D]; may be dyq
    dk_ptr,  # [B, Hk, T, D]; may be dyk
    partial_ptr,  # [2, programs, D] fp32: this program's part of the weights' gradients
    dyq_batch_stride, dyq_head_stride, dyq_token_stride,  # elements from one batch entry, head, token to the next
    dyk_batch_stride, dyk_head_stride, dyk_token_stride,
    q_batch_stride, q_head_stride, q_token_stride,
    k_batch_stride, k_head_stride, k_token_stride,
    dq_batch_stride, dq_head_stride, dq_token_stride,
    dk_batch_stride, dk_head_stride, dk_token_stride,
    angle_batch_stride, angle_token_stride,
    n_tokens,
    n_all_tokens,  # B * T
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, OFFSET: tl.constexpr,
    CAST_BEFORE: tl.constexpr, WANTS_DQ: tl.constexpr, WANTS_DK: tl.constexpr, WANTS_DQ_WEIGHT: tl.constexpr,
    WANTS_DK_WEIGHT: tl.constexpr, BLOCK_Q_HEADS: tl.constexpr, BLOCK_K_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]
    # heads of which nothing is wanted are passed over
    TURNED_Q: tl.constexpr = Q_HEADS if WANTS_DQ or WANTS_DQ_WEIGHT else 0
    TURNED_K: tl.constexpr = K_HEADS if WANTS_DK or WANTS_DK_WEIGHT else 0
    q_weight_1, q_weight_2, q_weight_3 = _weight_of_heads(
        q_weight_ptr, D, R, OFFSET, CAST_BEFORE, BLOCK_PAIRS, BLOCK_REST
    )
    k_weight_1, k_weight_2, k_weight_3 = _weight_of_heads(
        k_weight_ptr, D, R, OFFSET, CAST_BEFORE, BLOCK_PAIRS, BLOCK_REST
    )
    dq_weight_1 = tl.zeros((BLOCK_Q_HEADS, BLOCK_PAIRS), tl.float32)
    dq_weight_2 = tl.zeros((BLOCK_Q_HEADS, BLOCK_PAIRS), tl.float32)
    dq_weight_3 = tl.zeros((BLOCK_Q_HEADS, BLOCK_REST), tl.float32)
    dk_weight_1 = tl.zeros((BLOCK_K_HEADS, BLOCK_PAIRS), tl.float32)
    dk_weight_2 = tl.zeros((BLOCK_K_HEADS, BLOCK_PAIRS), tl.float32)
    dk_weight_3 = tl.zeros((BLOCK_K_HEADS, BLOCK_REST), tl.float32)

    # in 32 bits until tokens have been divided, which is much faster
    for row in tl.range(tl.program_id(0), n_all_tokens, tl.num_programs(0), num_stages=STAGES):
        batch = (row // n_tokens).to(tl.int64)
        token = (row % n_tokens).to(tl.int64)
        angle = batch * angle_batch_stride + token * angle_token_stride
        cos_1, cos_2, sin_1, sin_2 = angles_of(cos_ptr + angle, sin_ptr + angle, pairs, R)
        rstd = rstd_ptr + (batch * n_tokens + token) * (Q_HEADS + K_HEADS)
        dq_weight_1, dq_weight_2, dq_weight_3 = _backward_of_heads(
            dyq_ptr + batch * dyq_batch_stride + token * dyq_token_stride,
            q_ptr + batch * q_batch_stride + token * q_token_stride,
            dq_ptr + batch * dq_batch_stride + token * dq_token_stride,
            rstd,
            dyq_head_stride, q_head_stride, dq_head_stride,
            q_weight_1, q_weight_2, q_weight_3,
            dq_weight_1, dq_weight_2, dq_weight_3,
            cos_1, cos_2, sin_1, sin_2,
            TURNED_Q, D, R, WANTS_DQ, WANTS_DQ_WEIGHT,
            BLOCK_Q_HEADS, BLOCK_PAIRS, BLOCK_REST,
        )  # fmt: skip
        dk_weight_1, dk_weight_2, dk_weight_3 = _backward_of_heads(
            dyk_ptr + batch * dyk_batch_stride + token * dyk_token_stride,
            k_ptr + batch * k_batch_stride + token * k_token_stride,
            dk_ptr + batch * dk_batch_stride + token * dk_token_stride,
            rstd + Q_HEADS,
            dyk_head_stride, k_head_stride, dk_head_stride,
            k_weight_1, k_weight_2, k_weight_3,
            dk_weight_1, dk_weight_2, dk_weight_3,
            cos_1, cos_2, sin_1, sin_2,
            TURNED_K, D, R, WANTS_DK, WANTS_DK_WEIGHT,
            BLOCK_K_HEADS, BLOCK_PAIRS, BLOCK_REST,
        )  # fmt: skip
    if WANTS_DQ_WEIGHT:
        _store_dweight(
            partial_ptr + pid * D, dq_weight_1, dq_weight_2, dq_weight_3, D, R, BLOCK_PAIRS, BLOCK_REST
        )  # fmt: skip
    if WANTS_DK_WEIGHT:
        _store_dweight(
            partial_ptr + (programs + pid) * D, dk_weight_1, dk_weight_2, dk_weight_3, D, R, BLOCK_PAIRS, BLOCK_REST
        )
