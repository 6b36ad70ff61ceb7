"""Root-mean-square norm and rotary embedding of the heads of q and k in one pass, one launch each way (Qwen3, Gemma 3).

    q', k' = rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)

over heads of D columns, of which the first R turn, as pairs (i, i + R/2). Options are rms_norm's and rope's. What is
normalised is rounded to its dtype before it turns, as between the two ops, and again behind it; all else is fp32.

Saved for backward: q and k (as the norms would), 1/rms in fp32 of each head, the weights and the angles. What lies
between norm and rotation is never in memory.
Traffic per element of q and k: forward 1 read + 1 write, backward 2 reads + 1 write, where the two ops take 2 + 2 and
3 + 2; plus fp32 partial sums of the weights' gradients, one row of each per program, which a second small launch adds
up in a fixed order (no atomics: same input, same bits). Results and gradients get the memory layout of q and k. With
``overwrite_grad`` dq and dk take no memory but that of the results' gradients: a program reads a token's heads before
it writes there, and no other program has to do with the token.

Sizes: B batch, T tokens, H heads (q and k have their own number), D columns of a head, R rotated columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common import _triton
from ds_fused.ops.common._heads import (
    Gradient,
    angle_strides,
    as_called,
    as_kernels_read,
    is_swapped,
    neighbours,
    strides,
    with_room,
)
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers, check_whole
from ds_fused.ops.common._sums import partials, sum_partials
from ds_fused.ops.common._triton import check_dtypes, note_taken, power_of_2, resident, runs_kernels, stages_for
from ds_fused.ops.norms._norms import RMSForm, check_cast, check_per_column
from ds_fused.ops.norms.rms_norm import rms_norm_reference
from ds_fused.ops.rotary._norm_and_turn import _rms_norm_rope_bwd_kernel, _rms_norm_rope_fwd_kernel
from ds_fused.ops.rotary._rope import RopeForm, are_few, check_rope
from ds_fused.ops.rotary.rope import rope_reference

# elements of the heads that a program works on at a time, and its warps; the backward's persistent grid, and the tokens
# of a program that are in flight. On an H200, ms of 32768 tokens of 32 + 8, 16 + 8 and 28 + 4 heads of 128, backward:
# 0.261, 0.168, 0.207; by 8 warps of 16 0.297, 0.198, 0.299 (results/h200/tune.csv)
TILE_FWD, NUM_WARPS_FWD = 4096, 4
TILE_BWD, NUM_WARPS_BWD, WARPS_PER_MULTIPROCESSOR = 2048, 4, 8
STAGES_BWD = 3
# of few heads: 8 + 4 of 256 0.129 and 0.174, by 4 warps 0.134 and 0.281; 14 + 2 of 64 0.047 and 0.077 for 0.098, 0.157
FEW_WARPS_FWD, FEW_WARPS_BWD, FEW_WARPS_PER_MULTIPROCESSOR = 1, 2, 16


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
    overwrite_grad: bool = False,  # a permission that plain PyTorch makes no use of
) -> tuple[Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    q, k = (
        rms_norm_reference(x, weight, eps=eps, offset=offset, cast=cast) for x, weight in ((q, q_weight), (k, k_weight))
    )
    return rope_reference(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim, keep_dtype=keep_dtype)


class Wanted(NamedTuple):
    """Which gradients backward has to make."""

    dq: bool
    dk: bool
    dq_weight: bool
    dk_weight: bool


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


def _is_read_once(blocks: dict[str, int], heads: str, has_rest: bool, warps: int) -> bool:
    """Whether no two threads of the backward read the same element of a gradient.

    Of a tile with fewer elements than threads several hold each, and add it up: a late one would read what an early one
    has written. A barrier between them would take the pipeline away from the loop over tokens.
    """
    widths = blocks["BLOCK_PAIRS"], *([blocks["BLOCK_REST"]] if has_rest else [])
    return blocks[heads] * min(widths) >= warps * _triton.LANES


def rms_norm_rope_fwd(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: RMSForm,
    keep_dtype: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """[B, Hq, T, D], [B, Hk, T, D], [D] x 2, cos, sin -> q', k' in the layout of q and k, rstd [B, T, Hq + Hk]."""
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
        *angle_strides(cos, by_axis=False)[1:], n_tokens, norm.eps,
        Q_HEADS=q_heads, K_HEADS=k_heads, D=d, R=r, OFFSET=norm.offset, CAST_BEFORE=norm.cast_before,
        **_blocks(q_heads, k_heads, d, r, TILE_FWD),
        num_warps=FEW_WARPS_FWD if are_few(q_heads, k_heads, d) else NUM_WARPS_FWD,
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
    norm: RMSForm,
    wanted: Wanted,
    swapped: tuple[bool, bool],
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dyq, q [B, Hq, T, D], dyk, k [B, Hk, T, D], [D] x 2, [(B or 1,) T, R] x 2, rstd -> the gradients that are wanted.

    ``swapped``: whether those of q and of k lie in memory as [B, T, heads, D]. ``overwrite``: they are dyq and dyk,
    where they can be.
    """
    batch, q_heads, n_tokens, d = q.shape
    k_heads, r = k.shape[1], cos.shape[-1]
    nothing = batch * n_tokens == 0
    make = torch.zeros_like if nothing else torch.empty_like
    blocks = _blocks(q_heads, k_heads, d, r, TILE_BWD)
    warps, per_multiprocessor = NUM_WARPS_BWD, WARPS_PER_MULTIPROCESSOR
    if are_few(q_heads, k_heads, d):
        warps, per_multiprocessor = FEW_WARPS_BWD, FEW_WARPS_PER_MULTIPROCESSOR
    # the sum of both results hands one tensor to both
    overwrite = overwrite and dyq.data_ptr() != dyk.data_ptr()
    over_q = overwrite and _is_read_once(blocks, "BLOCK_Q_HEADS", d > r, warps)
    over_k = overwrite and _is_read_once(blocks, "BLOCK_K_HEADS", d > r, warps)
    dyq, dq = with_room(dyq, Gradient(swapped[0], q.dtype), over_q) if wanted.dq else (dyq, None)
    dyk, dk = with_room(dyk, Gradient(swapped[1], k.dtype), over_k) if wanted.dk else (dyk, None)
    dq_weight = make(q_weight) if wanted.dq_weight else None
    dk_weight = make(k_weight) if wanted.dk_weight else None
    if nothing:
        return dq, dk, dq_weight, dk_weight
    # what is not wanted is not touched: any pointer does
    to = dyq if dq is None else dq, dyk if dk is None else dk
    programs = min(batch * n_tokens, resident(q, per_multiprocessor, warps))
    partial = partials(q, programs, d)
    token_bytes = (q.itemsize + dyq.itemsize) * (q_heads + k_heads) * d
    launch(
        _rms_norm_rope_bwd_kernel, (programs,),
        dyq, dyk, q, k, q_weight, k_weight, cos, sin, rstd, *to, partial,
        *strides(dyq, q.shape), *strides(dyk, k.shape), *strides(q, q.shape), *strides(k, k.shape),
        *strides(to[0], q.shape), *strides(to[1], k.shape), *angle_strides(cos, by_axis=False)[1:],
        n_tokens, batch * n_tokens,
        Q_HEADS=q_heads, K_HEADS=k_heads, D=d, R=r, OFFSET=norm.offset, CAST_BEFORE=norm.cast_before,
        WANTS_DQ=wanted.dq, WANTS_DK=wanted.dk, WANTS_DQ_WEIGHT=wanted.dq_weight, WANTS_DK_WEIGHT=wanted.dk_weight,
        **blocks, STAGES=stages_for(q, STAGES_BWD, token_bytes),
        num_warps=warps,
    )  # fmt: skip
    if wanted.dq_weight or wanted.dk_weight:
        sum_partials(partial, programs, d, dq_weight, dk_weight)
    return dq, dk, dq_weight, dk_weight


class RMSNormRopeFunction(torch.autograd.Function):
    """Autograd around the launches; sees q [B, Hq, T, D], k [B, Hk, T, D], weights [D], [(B or 1,) T, R] x 2."""

    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        cos: Tensor,
        sin: Tensor,
        norm: RMSForm,
        keep_dtype: bool,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        yq, yk, rstd = rms_norm_rope_fwd(q, k, q_weight, k_weight, cos, sin, norm, keep_dtype)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin, rstd)
        wants_dq, wants_dk, wants_dq_weight, wants_dk_weight = ctx.needs_input_grad[:4]
        wants_q, wants_k = wants_dq or wants_dq_weight, wants_dk or wants_dk_weight
        if wants_q != wants_k:
            ctx.mark_non_differentiable(yk if wants_q else yq)
        ctx.norm, ctx.swapped, ctx.overwrite = norm, (is_swapped(yq), is_swapped(yk)), overwrite
        return yq, yk

    @staticmethod
    @once_differentiable
    def backward(ctx, dyq: Tensor, dyk: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin, rstd = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:4])
        dys = neighbours(dyq), neighbours(dyk)
        how = ctx.norm, wanted, ctx.swapped, ctx.overwrite
        gradients = rms_norm_rope_bwd(*dys, q, k, q_weight, k_weight, cos, sin, rstd, *how)
        if ctx.overwrite:
            note_taken(dys, gradients[:2])
        return *gradients, None, None, None, None, None


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
    overwrite_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Normalises the heads of q [B, Hq, T, D] and of k [B, Hk, T, D], each by its weight [D], and turns them.

    That is ``rope(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)``: ``eps``, ``offset`` and ``cast`` as in
    rms_norm, ``unsqueeze_dim`` (2 for [B, T, H, D]) and ``keep_dtype`` as in rope. cos and sin are [B or 1, T, R], R
    even and at most D, as HuggingFace makes them; pairs are columns i and R/2 + i. The batch dimension of the angles
    may be left out, and then that of q and k, too. Angles get no gradient. For interleaved pairs, sections and complex
    angles there are rms_norm and rope.
    Any strides of q and k are read in place if the columns of a head lie side by side. The results have the dtype of
    the norm's result, promoted with that of the angles where not ``keep_dtype``.
    ``overwrite_grad``: the backward may write the gradients over those of the results, as rope's. Where q (k) has few
    heads, or few of their columns turn, those are left as they are, too.
    """
    check_whole("rms_norm_rope", unsqueeze_dim=unsqueeze_dim)
    form = RopeForm()
    if cos.is_complex():
        raise ValueError(f"rms_norm_rope: cos is {cos.dtype}; complex angles are for rope, behind rms_norm")
    check_rope("rms_norm_rope", q, k, cos, sin, unsqueeze_dim, form)
    check_per_column("rms_norm_rope", q, q_weight=q_weight, k_weight=k_weight)
    check_cast("rms_norm_rope", cast)
    check_numbers("rms_norm_rope", eps=eps, offset=offset)
    if not runs_kernels(q, k, q_weight, k_weight, cos, sin):
        return rms_norm_rope_reference(
            q, k, q_weight, k_weight, cos, sin, eps=eps, offset=offset, cast=cast, unsqueeze_dim=unsqueeze_dim,
            keep_dtype=keep_dtype,
        )  # fmt: skip
    check_dtypes("rms_norm_rope", q=q, k=k, q_weight=q_weight, k_weight=k_weight, cos=cos, sin=sin)
    n_dims = q.ndim
    if cos.dtype != sin.dtype:
        wide = torch.promote_types(cos.dtype, sin.dtype)
        cos, sin = cos.to(wide), sin.to(wide)
    q, k, cos, sin = as_kernels_read(q, k, cos, sin, unsqueeze_dim)
    norm = RMSForm(eps, offset, cast == "before_weight")
    how = norm, keep_dtype, overwrite_grad and not torch.compiler.is_compiling()
    ys = RMSNormRopeFunction.apply(q, k, q_weight.contiguous(), k_weight.contiguous(), cos, sin, *how)
    return as_called(ys, n_dims, unsqueeze_dim)
