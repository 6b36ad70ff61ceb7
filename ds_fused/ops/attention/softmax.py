"""Softmax along a dimension: ``y = exp(x) / sum(exp(x))``, in fp32, one pass forward and one pass back.

Saved for backward: y, which whoever multiplies by it holds too.
Traffic per element: forward 1 read + 1 write, backward 2 reads (dy, y) + 1 write. Rows too wide for
the registers of one program are shared by several (_meet.py); where they can't meet, everything is read twice.

Sizes: N rows (every dimension but the one that sums to 1, flattened), D columns, P parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common import _along_rows
from ds_fused.ops.common._again import wide_again
from ds_fused.ops.common._along_rows import (
    SEEN,
    along_dim,
    along_rows,
    check_dim,
    ends_of,
    in_parts,
    load_seen,
    peak_and_total,
    reciprocal,
    store_seen,
    sum_of,
)
from ds_fused.ops.common._meet import meet, team_and_member
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._triton import check_dtypes, like, norm_dtype, runs_kernels


def _dtype(x: Tensor) -> torch.dtype:
    """Of the result: PyTorch's, which a CPU's autocast leaves alone."""
    return norm_dtype(x, x.dtype)


def softmax_reference(x: Tensor, dim: int = -1) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    return torch.softmax(x, dim, dtype=_dtype(x))


# n_rows is not specialized: a batch whose row count is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_rows"])
def _softmax_fwd_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    x_stride,  # elements from one row to the next; y has no gaps
    n_rows,
    n_cols,
    ABOVE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)

    x = load_seen(x_ptr, rows, cols, x_stride, n_cols, mask, -float("inf"), ABOVE)
    # rows past the last are all -inf: NaN that nobody stores
    y = tl.exp(x - tl.max(x, axis=1, keep_dims=True))
    # a reciprocal a row: Triton's own division is off by two units in the last place
    y = y * tl.div_rn(1.0, tl.sum(y, axis=1, keep_dims=True))
    store_seen(y_ptr, rows, cols, n_cols, mask, y, ABOVE)


@triton.jit
def _softmax_part_fwd_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    measures_ptr,  # [2, N, P] fp32: the maximum of each part, and its sum of exponentials below that
    arrivals_ptr,  # of N teams
    x_stride,  # elements from one row to the next; y has no gaps
    n_cols,
    n_parts,
    ABOVE: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
    MERGE: tl.constexpr, MANY: tl.constexpr,  # see sum_of
):  # fmt: skip
    row, part = team_and_member(arrivals_ptr, n_parts, MEASURES, WRITES)
    n_seen, n_written = ends_of(row, n_cols, ABOVE)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_seen, other=-float("inf"))
    measures_ptr += row * n_parts
    sums_ptr = measures_ptr + tl.num_programs(0).to(tl.int64)
    if MEASURES:
        high = tl.max(x.to(tl.float32))
        # a part may be nothing but -inf (a mask), and -inf less -inf is NaN
        shift = tl.where(high == -float("inf"), 0.0, high)
        y = tl.exp(x.to(tl.float32) - shift)
        tl.store(measures_ptr + part, high)
        tl.store(sums_ptr + part, tl.sum(y))
    if MEASURES and WRITES:
        meet(arrivals_ptr, row, n_parts)
    if WRITES:
        highest, total = peak_and_total(measures_ptr, sums_ptr, n_parts, MERGE, MANY)
        scale = reciprocal(total)
        if MEASURES:
            y *= tl.exp(high - highest) * scale
        else:
            y = tl.exp(x.to(tl.float32) - highest) * scale
        tl.store(y_ptr + row * n_cols + cols, y, mask=cols < n_written)


@triton.jit(do_not_specialize=["n_rows"])
def _softmax_bwd_kernel(
    dy_ptr,  # [N, D]
    y_ptr,  # [N, D]
    dx_ptr,  # [N, D]
    dy_stride,  # elements from one row to the next; y and dx have no gaps
    n_rows,
    n_cols,
    ABOVE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)

    dy = load_seen(dy_ptr, rows, cols, dy_stride, n_cols, mask, 0.0, ABOVE)
    y = load_seen(y_ptr, rows, cols, n_cols, n_cols, mask, 0.0, ABOVE)
    dx = y * (dy - tl.sum(dy * y, axis=1, keep_dims=True))
    if ABOVE == "zero":
        # of a row of NaN as well
        dx = tl.where(cols <= rows % n_cols, dx, 0.0)
    store_seen(dx_ptr, rows, cols, n_cols, mask, dx, ABOVE)


@triton.jit
def _softmax_part_bwd_kernel(
    dy_ptr,  # [N, D]
    y_ptr,  # [N, D]
    dx_ptr,  # [N, D]
    measures_ptr,  # [N, P] fp32: sums of dy * y
    arrivals_ptr,  # of N teams
    dy_stride,  # elements from one row to the next; y and dx have no gaps
    n_cols,
    n_parts,
    ABOVE: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
    MERGE: tl.constexpr, MANY: tl.constexpr,  # see sum_of
):  # fmt: skip
    row, part = team_and_member(arrivals_ptr, n_parts, MEASURES, WRITES)
    n_seen, n_written = ends_of(row, n_cols, ABOVE)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    # as they are, not in fp32: half of the registers
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=cols < n_seen, other=0.0)
    y = tl.load(y_ptr + row * n_cols + cols, mask=cols < n_seen, other=0.0)
    measures_ptr += row * n_parts
    if MEASURES:
        tl.store(measures_ptr + part, tl.sum(dy.to(tl.float32) * y.to(tl.float32)))
    if MEASURES and WRITES:
        meet(arrivals_ptr, row, n_parts)
    if WRITES:
        dx = wide_again(y) * (wide_again(dy) - sum_of(measures_ptr, n_parts, MERGE, MANY))
        if ABOVE == "zero":
            dx = tl.where(cols < n_seen, dx, 0.0)
        tl.store(dx_ptr + row * n_cols + cols, dx, mask=cols < n_written)


def softmax_fwd(x: Tensor, dtype: torch.dtype, above: str = SEEN) -> Tensor:
    """x [..., D] -> y [..., D] of that dtype."""
    y = like(x, dtype)
    if x.shape[-1] > _along_rows.WHOLE_ROW_FWD:
        part = _along_rows.PART_FWD, _along_rows.PART_PER_THREAD_FWD
        return in_parts(_softmax_part_fwd_kernel, 2, *part, y, x, above=above)
    return along_rows(_softmax_fwd_kernel, y, x, above=above)


def softmax_bwd(dy: Tensor, y: Tensor, dx: Tensor, above: str = SEEN) -> Tensor:
    """dy, y [..., D] -> dx [..., D], which may be dy."""
    if dy.shape[-1] > _along_rows.WHOLE_ROW_BWD:
        part = _along_rows.PART_BWD, _along_rows.PART_PER_THREAD_BWD
        return in_parts(_softmax_part_bwd_kernel, 1, *part, dx, dy, y, above=above)
    return along_rows(_softmax_bwd_kernel, dx, dy, y, above=above)


class SoftmaxFunction(torch.autograd.Function):
    """Autograd around the kernels, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        y = softmax_fwd(x, dtype)
        ctx.save_for_backward(y)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return softmax_bwd(dy, y, like(y, ctx.dtype)), None


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """``torch.softmax(x, dim)``: along the last dimension in place of x's rows, along another one over a copy.

    The result has x's dtype, under the autocast of a GPU fp32. A row of -inf alone is NaN, as PyTorch's is.
    """
    check_dim("softmax", x, dim)
    if not runs_kernels(x):
        return softmax_reference(x, dim)
    check_dtypes("softmax", x=x)
    return along_dim(SoftmaxFunction.apply, x, dim, _dtype(x))
