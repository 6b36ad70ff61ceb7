"""Root-mean-square norm and rotary embedding of the heads of q and k in one pass, one launch each way (Qwen3, Gemma 3).

    q', k' = rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)

over heads of D columns, of which the first R turn, as pairs (i, i + R/2). Options are rms_norm's and rope's. What is
normalised is rounded to its dtype before it turns, as between the two ops, and again behind it; all else is fp32.

Saved for backward: q and k (as the norms would), 1/rms in fp32 of each head, the weights and the angles. What lies
between norm and rotation is never in memory.
Traffic per element of q and k: forward 1 read + 1 write, backward 2 reads + 1 write, where the two ops take 2 + 2 and
3 + 2; plus fp32 partial sums of the weights' gradients, one row of each per program, which a second small launch adds
up in a fixed order (no atomics: same input, same bits). Results and gradients get the memory layout of q and k.

Sizes: B batch, T tokens, H heads (q and k have their own number), D columns of a head, R rotated columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_fused.ops._heads import angle_strides, as_called, as_kernels_read, by_token, neighbours, room, strides
from ds_fused.ops._launch import launch
from ds_fused.ops._norms import check_cast, check_per_column
from ds_fused.ops._rope import RopeForm, check_rope
from ds_fused.ops._sums import partials, sum_partials
from ds_fused.ops._triton import check_dtypes, power_of_2, resident, runs_kernels, stages_for
from ds_fused.ops._wide_rms_norm import weight_at
from ds_fused.ops.rms_norm import rms_norm_reference
from ds_fused.ops.rope import angles_of, rope_reference

# elements of the heads that a program works on at a time, and its warps: forward those of rope, which moves as much;
# backward 8 elements a thread of each tensor, as in rms_norm. Not measured yet
TILE_FWD, NUM_WARPS_FWD = 4096, 4
TILE_BWD, NUM_WARPS_BWD = 2048, 8
# the backward's persistent grid: with 128 registers a thread for 32 + 8 heads of 128 (sm90), 16 warps are resident; and
# the tokens of a program that are in flight, as in rms_norm. Not measured yet
WARPS_PER_MULTIPROCESSOR = 16
STAGES_BWD = 3


def rms_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
    unsqueeze_dim: int = 1,
    keep_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    q, k = (
        rms_norm_reference(x, weight, eps=eps, offset=offset, cast=cast) for x, weight in ((q, q_weight), (k, k_weight))
    )
    return rope_reference(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, keep_dtype=keep_dtype)


@triton.jit
def _normalised(x_hat, weight, DTYPE: tl.constexpr, NORM_DTYPE: tl.constexpr, CAST_BEFORE: tl.constexpr):
    """The norm's result in fp32, rounded as it would be in memory. DTYPE: that of x."""
    if CAST_BEFORE:
        x_hat = x_hat.to(DTYPE).to(tl.float32)
    return (x_hat * weight).to(NORM_DTYPE).to(tl.float32)


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
    weight_1 = weight_at(weight_ptr, pairs, pairs < PAIRS, OFFSET, CAST_BEFORE)
    weight_2 = weight_at(weight_ptr, PAIRS + pairs, pairs < PAIRS, OFFSET, CAST_BEFORE)
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
            weight = weight_at(weight_ptr, rest, rest < D, OFFSET, CAST_BEFORE)
            tl.store(y_heads + rest, _normalised(still * rstd, weight, DTYPE, NORM_DTYPE, CAST_BEFORE), mask=rest_mask)


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
        q_head_stride,
        yq_head_stride,
        cos_1,
        cos_2,
        sin_1,
        sin_2,
        eps,
        Q_HEADS,
        D,
        R,
        OFFSET,
        CAST_BEFORE,
        BLOCK_Q_HEADS,
        BLOCK_PAIRS,
        BLOCK_REST,
    )
    _norm_and_turn_heads(
        k_ptr + batch * k_batch_stride + token * k_token_stride,
        k_weight_ptr,
        yk_ptr + batch * yk_batch_stride + token * yk_token_stride,
        rstd_ptr + Q_HEADS,
        k_head_stride,
        yk_head_stride,
        cos_1,
        cos_2,
        sin_1,
        sin_2,
        eps,
        K_HEADS,
        D,
        R,
        OFFSET,
        CAST_BEFORE,
        BLOCK_K_HEADS,
        BLOCK_PAIRS,
        BLOCK_REST,
    )


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
    dq_ptr,  # [B, Hq, T, D]
    dk_ptr,  # [B, Hk, T, D]
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
            dyq_head_stride,
            q_head_stride,
            dq_head_stride,
            q_weight_1,
            q_weight_2,
            q_weight_3,
            dq_weight_1,
            dq_weight_2,
            dq_weight_3,
            cos_1,
            cos_2,
            sin_1,
            sin_2,
            TURNED_Q,
            D,
            R,
            WANTS_DQ,
            WANTS_DQ_WEIGHT,
            BLOCK_Q_HEADS,
            BLOCK_PAIRS,
            BLOCK_REST,
        )
        dk_weight_1, dk_weight_2, dk_weight_3 = _backward_of_heads(
            dyk_ptr + batch * dyk_batch_stride + token * dyk_token_stride,
            k_ptr + batch * k_batch_stride + token * k_token_stride,
            dk_ptr + batch * dk_batch_stride + token * dk_token_stride,
            rstd + Q_HEADS,
            dyk_head_stride,
            k_head_stride,
            dk_head_stride,
            k_weight_1,
            k_weight_2,
            k_weight_3,
            dk_weight_1,
            dk_weight_2,
            dk_weight_3,
            cos_1,
            cos_2,
            sin_1,
            sin_2,
            TURNED_K,
            D,
            R,
            WANTS_DK,
            WANTS_DK_WEIGHT,
            BLOCK_K_HEADS,
            BLOCK_PAIRS,
            BLOCK_REST,
        )
    if WANTS_DQ_WEIGHT:
        _store_dweight(
            partial_ptr + pid * D, dq_weight_1, dq_weight_2, dq_weight_3, D, R, BLOCK_PAIRS, BLOCK_REST
        )  # fmt: skip
    if WANTS_DK_WEIGHT:
        _store_dweight(
            partial_ptr + (programs + pid) * D, dk_weight_1, dk_weight_2, dk_weight_3, D, R, BLOCK_PAIRS, BLOCK_REST
        )


class NormForm(NamedTuple):
    """How rows are normalised: see rms_norm.py."""

    eps: float
    offset: float
    cast_before: bool


class Gradients(NamedTuple):
    """Of each input whether its gradient is wanted, or the gradient."""

    dq: object
    dk: object
    dq_weight: object
    dk_weight: object


def _blocks(q_heads: int, k_heads: int, d: int, r: int, tile: int) -> dict[str, int]:
    """Sides of the tiles: as many heads at a time as have so many elements."""
    pairs, rest = power_of_2(r // 2), power_of_2(d - r)
    most = max(1, tile // power_of_2(2 * pairs + (rest if d > r else 0)))
    return {
        "BLOCK_Q_HEADS": min(power_of_2(q_heads), most),
        "BLOCK_K_HEADS": min(power_of_2(k_heads), most),
        "BLOCK_PAIRS": pairs,
        "BLOCK_REST": rest,
    }


def rms_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: NormForm,
    keep_dtype: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, Hq, T, D], [B, Hk, T, D], [D] x 2, [B, T, R] x 2 -> q', k' in the layout of q and k, rstd [B, T, Hq + Hk]."""
    ys = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        dtype = torch.promote_types(x.dtype, weight.dtype) if norm.cast_before else x.dtype
        # preserve_format: strides in the order of x's, without its gaps
        ys.append(torch.empty_like(x, dtype=dtype if keep_dtype else torch.promote_types(dtype, cos.dtype)))
    yq, yk = ys
    batch, q_heads, n_tokens, d = q.shape
    k_heads, r = k.shape[1], cos.shape[-1]
    rstd = torch.empty((batch, n_tokens, q_heads + k_heads), dtype=torch.float32, device=q.device)
    if batch * n_tokens == 0:
        return yq, yk, rstd
    launch(
        _rms_norm_rope_fwd_kernel, (batch * n_tokens,),
        q, k, q_weight, k_weight, cos, sin, yq, yk, rstd,
        *strides(q, q.shape), *strides(k, k.shape), *strides(yq, q.shape), *strides(yk, k.shape),
        *angle_strides(cos)[1:], n_tokens, norm.eps,
        Q_HEADS=q_heads, K_HEADS=k_heads, D=d, R=r, OFFSET=norm.offset, CAST_BEFORE=norm.cast_before,
        **_blocks(q_heads, k_heads, d, r, TILE_FWD), num_warps=NUM_WARPS_FWD,
    )  # fmt: skip
    return yq, yk, rstd


def rms_norm_rope_bwd(
    dyq: Tensor,
    dyk: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    rstd: Tensor,
    norm: NormForm,
    wanted: Gradients,
    by_token: tuple[bool, bool],
) -> Gradients:
    """dyq, q [B, Hq, T, D], dyk, k [B, Hk, T, D], [D] x 2, [B, T, R] x 2, rstd -> the gradients that are wanted.

    ``by_token``: whether those of q and of k lie in memory as [B, T, heads, D].
    """
    batch, q_heads, n_tokens, d = q.shape
    k_heads, r = k.shape[1], cos.shape[-1]
    nothing = batch * n_tokens == 0
    make = torch.zeros_like if nothing else torch.empty_like
    made = Gradients(
        room(q, by_token[0], q.dtype) if wanted.dq else None,
        room(k, by_token[1], k.dtype) if wanted.dk else None,
        make(q_weight) if wanted.dq_weight else None,
        make(k_weight) if wanted.dk_weight else None,
    )
    if nothing:
        return made
    # what is not wanted is not touched: any pointer does
    dq, dk = dyq if made.dq is None else made.dq, dyk if made.dk is None else made.dk
    programs = min(batch * n_tokens, resident(q, WARPS_PER_MULTIPROCESSOR, NUM_WARPS_BWD))
    partial = partials(q, programs, d)
    token_bytes = (q.itemsize + dyq.itemsize) * (q_heads + k_heads) * d
    launch(
        _rms_norm_rope_bwd_kernel, (programs,),
        dyq, dyk, q, k, q_weight, k_weight, cos, sin, rstd, dq, dk, partial,
        *strides(dyq, q.shape), *strides(dyk, k.shape), *strides(q, q.shape), *strides(k, k.shape),
        *strides(dq, q.shape), *strides(dk, k.shape), *angle_strides(cos)[1:], n_tokens, batch * n_tokens,
        Q_HEADS=q_heads, K_HEADS=k_heads, D=d, R=r, OFFSET=norm.offset, CAST_BEFORE=norm.cast_before,
        WANTS_DQ=wanted.dq, WANTS_DK=wanted.dk, WANTS_DQ_WEIGHT=wanted.dq_weight, WANTS_DK_WEIGHT=wanted.dk_weight,
        **_blocks(q_heads, k_heads, d, r, TILE_BWD), STAGES=stages_for(STAGES_BWD, token_bytes),
        num_warps=NUM_WARPS_BWD,
    )  # fmt: skip
    if wanted.dq_weight or wanted.dk_weight:
        sum_partials(partial, programs, d, made.dq_weight, made.dk_weight)
    return made


class RMSNormRopeFunction(torch.autograd.Function):
    """Autograd around the launches; sees q [B, Hq, T, D], k [B, Hk, T, D], weights [D], cos and sin [B, T, R]."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm: NormForm,
        keep_dtype: bool,
    ) -> tuple[Tensor, Tensor]:
        yq, yk, rstd = rms_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, norm, keep_dtype)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, rstd)
        wants_dq, wants_dk, wants_dq_weight, wants_dk_weight = ctx.needs_input_grad[:4]
        wants_q, wants_k = wants_dq or wants_dq_weight, wants_dk or wants_dk_weight
        if wants_q != wants_k:
            ctx.mark_non_differentiable(yk if wants_q else yq)
        ctx.norm, ctx.by_token = norm, (by_token(yq), by_token(yk))
        return yq, yk

    @staticmethod
    @once_differentiable
    def backward(ctx, dyq: Tensor, dyk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin, rstd = ctx.saved_tensors
        wanted = Gradients(*ctx.needs_input_grad[:4])
        dys = neighbours(dyq), neighbours(dyk)
        made = rms_norm_rope_bwd(*dys, q, k, q_weight, k_weight, cos, sin, rstd, ctx.norm, wanted, ctx.by_token)
        return *made, None, None, None, None


def rms_norm_rope(
    q: Tensor,  # [B, Hq, T, D]
    k: Tensor,  # [B, Hk, T, D]
    q_weight: Tensor,  # [D]
    k_weight: Tensor,  # [D]
    cos: Tensor,  # [B or 1, T, R]
    sin: Tensor,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
    unsqueeze_dim: int = 1,
    keep_dtype: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalises the heads of q [B, Hq, T, D] and of k [B, Hk, T, D], each by its weight [D], and turns them.

    That is ``rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)``: ``eps``, ``offset`` and ``cast`` as in
    rms_norm, ``unsqueeze_dim`` (2 for [B, T, H, D]) and ``keep_dtype`` as in rope. cos and sin are [B or 1, T, R], R
    even and at most D, as HuggingFace makes them; pairs are columns i and R/2 + i. The batch dimension of the angles
    may be left out, and then that of q and k, too. Angles get no gradient. For interleaved pairs, sections and complex
    angles there are rms_norm and rope.
    Any strides of q and k are read in place if the columns of a head lie side by side. The results have the dtype of
    the norm's result, promoted with that of cos where not ``keep_dtype``.
    """
    form = RopeForm()
    if cos.is_complex():
        raise ValueError(f"rms_norm_rope: cos is {cos.dtype}; complex angles are for rope, behind rms_norm")
    check_rope("rms_norm_rope", q, k, cos, sin, unsqueeze_dim, form)
    check_per_column("rms_norm_rope", q, q_weight=q_weight, k_weight=k_weight)
    check_cast("rms_norm_rope", cast)
    if not runs_kernels(q, k, q_weight, k_weight, cos, sin):
        return rms_norm_rope_reference(
            q, k, q_weight, k_weight, cos, sin, eps=eps, offset=offset, cast=cast, unsqueeze_dim=unsqueeze_dim,
            keep_dtype=keep_dtype,
        )  # fmt: skip
    check_dtypes("rms_norm_rope", q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    n_dims = q.ndim
    q, k, cos, sin = as_kernels_read(q, k, cos, sin, unsqueeze_dim, form)
    norm = NormForm(eps, offset, cast == "before_weight")
    ys = RMSNormRopeFunction.apply(q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, norm, keep_dtype)
    return as_called(ys, n_dims, unsqueeze_dim)
