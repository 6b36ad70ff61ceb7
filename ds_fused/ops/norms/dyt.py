"""Dynamic tanh: ``y = weight * tanh(alpha * x) + bias``, which stands in for a norm and needs no statistics.

From Zhu, Chen, He, LeCun and Liu, "Transformers without Normalization" (2025). alpha is one number, weight and bias
have one value per column; bias may be None. Computed in fp32 and rounded once.

Saved for backward: x, alpha and weight; tanh is computed again.
Traffic per element: forward 1 read + 1 write, backward 2 reads + 1 write, plus fp32 partial sums of dalpha, dweight and
dbias, one part per program, added up in a fixed order by a second small launch (no atomics: same input, same bits).

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._row_tiles import in_turn, over_rows, tile_of_columns
from ds_fused.ops.common._sums import partials, sum_partials
from ds_fused.ops.common._tanh import tanh_and_slope
from ds_fused.ops.common._triton import cdiv, check_dtypes, like, row_stride, rows_of, runs_kernels
from ds_fused.ops.norms._norms import check_per_column, contiguous

# elements of a tile and of a thread, and the most columns of it; wider rows are several blocks of columns. On an H100,
# ms forward of 8192x4096 and 16384x8192: 0.053, 0.192; with tiles of 2048 0.057, 0.211
TILE_FWD, PER_THREAD_FWD = 1024, 8
TILE_BWD, PER_THREAD_BWD = 2048, 16
MOST_COLS = 1024
# the backward's persistent grid, and the tiles of a program that are in flight: 0.085, 0.296 ms; with tiles of 1024 and
# 8 elements a thread 0.085, 0.291, with those of 2048 by 8, 32 warps and 2 tiles 0.137, 0.464 (results/h100/tune.csv).
# On an H200 of 16384x8192 0.208; with tiles of 1024 by 8 0.234
WARPS_PER_MULTIPROCESSOR = 16
STAGES_BWD = 3


def dyt_reference(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    y = weight * torch.tanh(alpha * x)
    return y if bias is None else y + bias


@triton.jit
def _tanh_and_slope(x, DTYPE: tl.constexpr):
    """tanh(x) and 1 - tanh(x)^2, as exact as x's dtype can tell."""
    if tl.float32 == DTYPE:
        tanh, slope = tanh_and_slope(x)
    else:
        # 12 instructions for 22, of which there is no time for more: off by 1e-4 of tanh at most, at 1/64, where one
        # of 16 bits is 4.9e-4. q is finite, so that the slope is: below e^-22 it is what it is there
        q = tl.exp2(tl.minimum(-2.8853900817779268 * x, 64.0, propagate_nan=tl.PropagateNan.ALL))
        # a division is three more than its square root
        r = tl.rsqrt(1.0 + q)
        r *= r
        tanh, slope = tl.where(tl.abs(x) < 0.015625, x, 2.0 * r - 1.0), 4.0 * q * r * r
    return tanh, slope


@triton.jit(do_not_specialize=["n_rows"])
def _dyt_fwd_kernel(
    x_ptr,  # [N, D]
    alpha_ptr,  # [1]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    y_ptr,  # [N, D]
    x_stride,  # elements from one row to the next; y has no gaps
    n_rows,
    n_cols,
    HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)

    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tanh, _ = _tanh_and_slope(tl.load(alpha_ptr).to(tl.float32) * x, y_ptr.dtype.element_ty)
    each = over_rows(cols, BLOCK_ROWS)
    y = tanh * tl.load(weight_ptr + each, mask=each < n_cols, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + each, mask=each < n_cols, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * n_cols + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _dyt_bwd_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    alpha_ptr,  # [1]
    weight_ptr,  # [D]
    dx_ptr,  # [N, D]
    partial_ptr,  # [2, P, D] fp32, the parts of dweight and dbias, and after it those of dalpha, one per program
    dy_stride,  # elements from one row to the next; dx has no gaps
    x_stride,
    n_rows,
    n_cols,
    WANTS_DX: tl.constexpr, WANTS_DALPHA: tl.constexpr, WANTS_DWEIGHT: tl.constexpr, WANTS_DBIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    pid = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(1).to(tl.int64)
    cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    alpha = tl.load(alpha_ptr).to(tl.float32)
    each = over_rows(cols, BLOCK_ROWS)
    weight = tl.load(weight_ptr + each, mask=each < n_cols, other=0.0).to(tl.float32)
    dalpha = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)

    for start in tl.range(pid * BLOCK_ROWS, n_rows, programs * BLOCK_ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < n_rows) & (cols < n_cols)
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tanh, slope = _tanh_and_slope(alpha * x, dy_ptr.dtype.element_ty)
        if WANTS_DWEIGHT:
            dweight += dy * tanh
        if WANTS_DBIAS:
            dbias += dy
        inner = dy * weight * slope
        if WANTS_DALPHA:
            dalpha += inner * x
        if WANTS_DX:
            tl.store(dx_ptr + rows * n_cols + cols, alpha * inner, mask=mask)

    if WANTS_DWEIGHT:
        total = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(partial_ptr + pid * n_cols + cols, total, mask=cols < n_cols)
    if WANTS_DBIAS:
        total = tl.sum(dbias, axis=0, keep_dims=True)
        tl.store(partial_ptr + (programs + pid) * n_cols + cols, total, mask=cols < n_cols)
    if WANTS_DALPHA:
        place = 2 * programs * n_cols + pid * tl.num_programs(0) + block
        tl.store(partial_ptr + place, tl.sum(tl.sum(dalpha, axis=1), axis=0))


class Wanted(NamedTuple):
    """Which gradients backward has to make."""

    dx: bool
    dalpha: bool
    dweight: bool
    dbias: bool


def dyt_fwd(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x [..., D], alpha [1], weight, bias [D] -> y [..., D] of dtype."""
    y = like(x, dtype)
    x = rows_of(x)
    n, d = x.shape
    if n == 0 or d == 0:
        return y
    block = tile_of_columns(d, TILE_FWD, PER_THREAD_FWD, MOST_COLS)
    launch(
        _dyt_fwd_kernel, (cdiv(n, block.rows), cdiv(d, block.cols)),
        x, alpha, weight, bias, y, row_stride(x), n, d,
        HAS_BIAS=bias is not None, BLOCK_ROWS=block.rows, BLOCK_COLS=block.cols, num_warps=block.warps,
    )  # fmt: skip
    return y


def dyt_bwd(
    dy: Tensor, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """dy, x [..., D], alpha [1], weight, bias [D] -> dx [..., D], dalpha, dweight, dbias; None where not wanted."""
    dx = like(x) if wanted.dx else None
    dy, x = rows_of(dy), rows_of(x)
    n, d = x.shape
    make = torch.zeros_like if n == 0 or d == 0 else torch.empty_like
    dalpha = make(alpha) if wanted.dalpha else None
    dweight = make(weight) if wanted.dweight else None
    dbias = make(bias) if wanted.dbias else None
    if n == 0 or d == 0:
        return dx, dalpha, dweight, dbias
    block = tile_of_columns(d, TILE_BWD, PER_THREAD_BWD, MOST_COLS)
    column_blocks = cdiv(d, block.cols)
    itemsizes = dy.itemsize + x.itemsize
    programs, tiles = in_turn(x, block, n, WARPS_PER_MULTIPROCESSOR, itemsizes, STAGES_BWD, column_blocks)
    sums = wanted.dalpha or wanted.dweight or wanted.dbias
    partial = partials(x, programs, d, programs * column_blocks) if sums else None
    launch(
        _dyt_bwd_kernel, (column_blocks, programs),
        dy, x, alpha, weight, dx, partial, row_stride(dy), row_stride(x), n, d,
        WANTS_DX=wanted.dx, WANTS_DALPHA=wanted.dalpha, WANTS_DWEIGHT=wanted.dweight, WANTS_DBIAS=wanted.dbias,
        **tiles,
    )  # fmt: skip
    if sums:
        sum_partials(partial, programs, d, dweight, dbias, dalpha, programs * column_blocks)
    return dx, dalpha, dweight, dbias


class DyTFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(x, alpha, weight, bias)
        return dyt_fwd(x, alpha, weight, bias, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, weight, bias = ctx.saved_tensors
        wants_dx, wants_dalpha, wants_dweight, wants_dbias = ctx.needs_input_grad[:4]
        wanted = Wanted(wants_dx, wants_dalpha, wants_dweight, bias is not None and wants_dbias)
        return *dyt_bwd(dy, x, alpha, weight, bias, wanted), None


def dyt(x: Tensor, alpha: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``weight * tanh(alpha * x) + bias``: x [..., D], alpha one number, weight [D], bias [D] or None.

    The result has the dtype that PyTorch promotes these to.
    """
    if alpha.numel() != 1 or alpha.ndim > 1:
        raise ValueError(f"dyt: alpha {tuple(alpha.shape)} must be one number, of shape (1,) or ()")
    check_per_column("dyt", x, weight=weight, bias=bias)
    if not runs_kernels(x, alpha, weight, bias):
        return dyt_reference(x, alpha, weight, bias)
    check_dtypes("dyt", x=x, alpha=alpha, weight=weight, bias=bias)
    dtype = torch.promote_types(x.dtype, weight.dtype)
    if alpha.ndim:  # a number without dimensions doesn't widen a tensor
        dtype = torch.promote_types(dtype, alpha.dtype)
    if bias is not None:
        dtype = torch.promote_types(dtype, bias.dtype)
    weight, bias = contiguous(weight), contiguous(bias)
    return DyTFunction.apply(x, alpha, weight, bias, dtype)
