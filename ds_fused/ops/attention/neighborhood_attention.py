"""Attention of each token to its neighbours: ``softmax(scale * q k^T) v`` over the tokens at most so far away.

Token i sees the tokens j with |i - j| <= kernel_size // 2 * dilation whose distance the dilation divides, itself among
them: neighborhood attention (Hassani et al. 2023) in one dimension. At the ends of the sequence there are fewer, as in
Liger's; with ``border="shift"`` the window moves inwards instead, as NATTEN's, and each token has kernel_size
neighbours, if there are as many.

Nothing of the size of T x T exists. Softmax is in fp32, of wide windows summed up as it goes (Dao et al. 2022); weights
and their gradients are rounded to the inputs' dtype before they are multiplied, and computed again in the backward.
A window of few tokens is worked on in one tile of tokens and of all that they see (_neighborhood_attention_block_
kernels.py), a wider one is walked (_neighborhood_attention_kernels.py), backward once for dq and once for dk and dv.
Saved for backward: q, k, v, y, and the logarithm of the sum of exponentials in fp32 per token and head.
Traffic per element of q: forward 3 reads + 1 write, backward 5 reads + 3 writes, of wide windows 4 reads more;
neighbours that another program reads too come from L2. Each gradient is written by one program (no atomics: same
input, same bits).

Sizes: B batch entries, H heads, T tokens, D columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_fused.ops.attention._neighborhood_attention_block_kernels import (
    _neighborhood_attention_block_bwd_kernel,
    _neighborhood_attention_block_fwd_kernel,
)
from ds_fused.ops.attention._neighborhood_attention_kernels import (
    _neighborhood_attention_dkv_kernel,
    _neighborhood_attention_dq_kernel,
    _neighborhood_attention_fwd_kernel,
)
from ds_fused.ops.common._heads import is_swapped, neighbours, room, strides
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers_or_none, check_whole
from ds_fused.ops.common._triton import autocast_dtype, cdiv, check_dtypes, power_of_2, runs_kernels

BORDERS = ("cut", "shift")
MOST_COLS = 256
# windows that reach so far to either side are of one tile of so many tokens, whose program owns what is left of it
# (H100, 64x16x1024x128, us: of 3 tokens forward 356 and backward 718, where walks take 410 and 1245; of 16 410 and
# 1120, walks 407 and 1241; backward of 7 787 in tiles of 32 and 909 of 64)
FWD_BLOCKS = ((16, 64),)
BWD_BLOCKS = ((7, 32), (16, 64))
# of wider ones tokens of a tile, neighbours that it meets at a time, and such that are in flight: queries and keys
# forward and for dq, keys and queries for dk and dv. Where registers suffice for three such programs on a
# multiprocessor the first two take 311 and 420 us (H100, window 255, 16x16x2048x128), else 359 and 442; the third takes
# 573. With tiles of 128 tokens all take 1.1 to 1.2 times as long
FWD_TILE, DQ_TILE, DKV_TILE = (64, 32, 3), (64, 32, 2), (64, 32, 1)
# more columns than this leave registers for fewer tokens
FEW_COLS = 128


def neighborhood_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
    border: str = "cut",
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    scale = _scale_of(q) if scale is None else scale
    token, half = torch.arange(q.shape[2], device=q.device), kernel_size // 2
    place, of_class = token // dilation, token % dilation
    if border == "cut":
        first, last = place - half, place + half
    else:
        n = (q.shape[2] - of_class + dilation - 1) // dilation
        size = n.clamp_max(kernel_size)
        first = torch.minimum((place - half).clamp_min(0), n - size)
        last = first + size - 1
    near = (of_class[:, None] == of_class) & (first[:, None] <= place) & (place <= last[:, None])
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(~near, -math.inf)
    weights = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return weights.to(v.dtype) @ v


def _scale_of(q: Tensor) -> float:
    return max(1, q.shape[-1]) ** -0.5


def _block(x: Tensor, reach: int, blocks: tuple[tuple[int, int], ...]) -> int | None:
    """Of x [B, H, T, D] the tokens of the one tile that such windows are of; None where they are walked."""
    if x.dtype == torch.float32:
        # products of fp32 are not for the tensor cores, and hold a whole row of each factor in registers
        return None
    # backward such a tile is there four times in shared memory, of which some GPUs have 99 KiB
    most_tokens = 64 * FEW_COLS // max(FEW_COLS, x.shape[-1])
    return next((block for most, block in blocks if reach <= most and block <= most_tokens), None)


def _tile(x: Tensor, tile: tuple[int, int, int]) -> tuple[int, int, dict[str, object]]:
    """Of a launch over x [B, H, T, D]: tokens that a program owns, those that it meets at a time, and constants."""
    cols = max(16, power_of_2(x.shape[-1]))
    own, others, stages = tile
    if x.dtype == torch.float32:
        # as in _block
        own = others = 32 if cols <= FEW_COLS // 2 else 16
        stages = 1
    elif cols > FEW_COLS:
        own = others = 32
    few = x.dtype != torch.float32 and cols <= FEW_COLS
    return own, others, {"BLOCK_COLS": cols, "STAGES": stages, "num_warps": 4 if few else 8}


def _block_constants(x: Tensor, block: int, shifts: bool) -> dict[str, object]:
    """Constants of a launch over x [B, H, T, D] for windows of one tile."""
    cols = max(16, power_of_2(x.shape[-1]))
    return {"SHIFTS": shifts, "BLOCK": block, "BLOCK_COLS": cols, "num_warps": 4 if cols <= FEW_COLS else 8}


def _grid(shape: torch.Size, dilation: int, own: int) -> tuple[int]:
    batch, n_heads, n_tokens, _ = shape
    return (batch * n_heads * dilation * cdiv(cdiv(n_tokens, dilation), own),)


def neighborhood_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, scale: float, shifts: bool
) -> tuple[Tensor, Tensor]:
    """q, k, v [B, H, T, D] -> y [B, H, T, D], lse [B, H, T]."""
    shape = q.shape
    batch, n_heads, n_tokens, d = shape
    y = room(q, is_swapped(q), q.dtype)
    lse = torch.empty((batch, n_heads, n_tokens), dtype=torch.float32, device=q.device)
    if batch * n_heads * n_tokens * d == 0:
        return y, lse
    # more classes than tokens would be empty, and nobody is further away than the last token from the first
    dilation, half = min(dilation, n_tokens), min(kernel_size // 2, n_tokens)
    args = (
        q, k, v, y, lse, *strides(q, shape), *strides(k, shape), *strides(v, shape), *strides(y, shape),
        n_heads, n_tokens, d, half, dilation, scale,
    )  # fmt: skip
    reach = half * (1 + shifts)
    block = _block(q, reach, FWD_BLOCKS)
    if block:
        grid = _grid(shape, dilation, block - 2 * reach)
        launch(_neighborhood_attention_block_fwd_kernel, grid, *args, **_block_constants(q, block, shifts))
    else:
        rows, keys, constants = _tile(q, FWD_TILE)
        launch(
            _neighborhood_attention_fwd_kernel, _grid(shape, dilation, rows), *args,
            SHIFTS=shifts, BLOCK_ROWS=rows, BLOCK_KEYS=keys, **constants,
        )  # fmt: skip
    return y, lse


def neighborhood_attention_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    kernel_size: int,
    dilation: int,
    scale: float,
    shifts: bool,
    *,
    wants_dq: bool,
    wants_dkv: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy, q, k, v, y [B, H, T, D], lse [B, H, T] -> dq, dk, dv [B, H, T, D], in the layouts of q, k and v."""
    shape = q.shape
    batch, n_heads, n_tokens, d = shape
    wants = wants_dq, wants_dkv, wants_dkv
    dq, dk, dv = (
        room(x, is_swapped(x), x.dtype) if wanted else None for x, wanted in zip((q, k, v), wants, strict=True)
    )
    if batch * n_heads * n_tokens * d == 0:
        return dq, dk, dv
    dilation, half = min(dilation, n_tokens), min(kernel_size // 2, n_tokens)
    sizes = n_heads, n_tokens, d, half, dilation, scale
    of_dy, of_q, of_k, of_v, of_y = (strides(x, shape) for x in (dy, q, k, v, y))
    of_dq, of_dk, of_dv = ((0, 0, 0) if x is None else strides(x, shape) for x in (dq, dk, dv))
    reach = half * (1 + shifts)
    block = _block(q, reach, BWD_BLOCKS)
    if block:
        launch(
            _neighborhood_attention_block_bwd_kernel, _grid(shape, dilation, block - 2 * reach),
            dy, q, k, v, y, lse, dq, dk, dv,
            *of_dy, *of_q, *of_k, *of_v, *of_y, *of_dq, *of_dk, *of_dv, *sizes,
            WANTS_DQ=wants_dq, WANTS_DKV=wants_dkv, **_block_constants(q, block, shifts),
        )  # fmt: skip
        return dq, dk, dv
    inner = torch.empty_like(lse) if wants_dkv else None
    rows, keys, constants = _tile(q, DQ_TILE)
    launch(
        _neighborhood_attention_dq_kernel, _grid(shape, dilation, rows),
        dy, q, k, v, y, lse, inner, dq, *of_dy, *of_q, *of_k, *of_v, *of_y, *of_dq, *sizes,
        WANTS_DQ=wants_dq, WANTS_INNER=wants_dkv, SHIFTS=shifts, BLOCK_ROWS=rows, BLOCK_KEYS=keys, **constants,
    )  # fmt: skip
    if wants_dkv:
        keys, rows, constants = _tile(q, DKV_TILE)
        launch(
            _neighborhood_attention_dkv_kernel, _grid(shape, dilation, keys),
            dy, q, k, v, lse, inner, dk, dv, *of_dy, *of_q, *of_k, *of_v, *of_dk, *of_dv, *sizes,
            SHIFTS=shifts, BLOCK_ROWS=rows, BLOCK_KEYS=keys, **constants,
        )  # fmt: skip
    return dq, dk, dv


class NeighborhoodAttentionFunction(torch.autograd.Function):
    """Autograd around the launchers; sees q, k and v [B, H, T, D] in any strides but that of the columns."""

    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, kernel_size: int, dilation: int, scale: float, shifts: bool
    ) -> Tensor:
        y, lse = neighborhood_attention_fwd(q, k, v, kernel_size, dilation, scale, shifts)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.options = kernel_size, dilation, scale, shifts
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        wants_dq, *wants_dkv = ctx.needs_input_grad[:3]
        dq, dk, dv = neighborhood_attention_bwd(
            neighbours(dy), *ctx.saved_tensors, *ctx.options, wants_dq=wants_dq, wants_dkv=any(wants_dkv)
        )
        return dq, dk if wants_dkv[0] else None, dv if wants_dkv[1] else None, None, None, None, None


def check_window(op: str, kernel_size: int, dilation: int, border: str) -> None:
    """A window that is as wide to both sides, a distance between neighbours, and what becomes of it at the ends."""
    check_whole(op, kernel_size=kernel_size, dilation=dilation)
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"{op}: kernel_size is {kernel_size}; it must be odd and positive: as many on both sides")
    if dilation < 1:
        raise ValueError(f"{op}: dilation is {dilation}; it must be 1 or more")
    if border not in BORDERS:
        raise ValueError(f"{op}: border is {border!r}; it must be 'cut' or 'shift'")


def neighborhood_attention(
    q: Tensor,  # [B, H, T, D]
    k: Tensor,  # [B, H, T, D]
    v: Tensor,  # [B, H, T, D]
    *,
    kernel_size: int = 7,
    dilation: int = 1,
    scale: float | None = None,
    border: str = "cut",
) -> Tensor:
    """``softmax(scale * q k^T) v`` over the kernel_size tokens around each; [B, H, T, D].

    ``dilation``: the step from one neighbour to the next, of which there are as many as before. ``scale``: 1 / sqrt(D)
    where None.
    ``border``: at the ends of the sequence a token has the neighbours that there are ("cut"), or the kernel_size
    nearest to the end ("shift").
    q, k and v have one shape and one dtype, under autocast that of autocast, and up to 256 columns. Any strides are
    read in place if the columns of a head lie side by side; the result lies in memory as q does.
    """
    if q.ndim != 4 or k.shape != q.shape or v.shape != q.shape:
        raise ValueError(
            f"neighborhood_attention: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} must have one "
            f"shape, [batch, heads, tokens, columns]"
        )
    check_window("neighborhood_attention", kernel_size, dilation, border)
    check_numbers_or_none("neighborhood_attention", scale=scale)
    dtype = autocast_dtype(q)
    if dtype is None and not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"neighborhood_attention: q is {q.dtype}, k {k.dtype} and v {v.dtype}; outside autocast they must be the "
            f"same"
        )
    if not runs_kernels(q, k, v):
        return neighborhood_attention_reference(
            q, k, v, kernel_size=kernel_size, dilation=dilation, scale=scale, border=border
        )
    check_dtypes("neighborhood_attention", q=q, k=k, v=v)
    if q.shape[3] > MOST_COLS:
        raise ValueError(f"neighborhood_attention: q has {q.shape[3]} columns a head; kernels exist for {MOST_COLS}")
    scale = _scale_of(q) if scale is None else float(scale)
    if dtype is not None:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    q, k, v = neighbours(q), neighbours(k), neighbours(v)
    return NeighborhoodAttentionFunction.apply(q, k, v, kernel_size, dilation, scale, border == "shift")
