"""Sparsemax along a dimension: the point of the probability simplex that lies nearest to x; most of it is exactly zero.

``y = max(x - tau, 0)`` with the tau for which a row sums to 1 (Martins & Astudillo, "From Softmax to Sparsemax", 2016).
Of tau the excess ``f(tau) = sum(max(x - tau, 0)) - 1`` is convex and piecewise linear, so Newton's steps from below
never pass its root and end on it: each is the mean over what still lies above tau, and the last one is the one that
leaves that set as it was. Nothing is sorted. The bound tau >= max(x) - 1 is where they start; a step makes f times the
size of the set less than a quarter of what it was, so there are few (about 30 for any row of 128k values, 4 to 8 for
normally distributed ones), in registers for rows that fit.

The gradient uses the support alone, y > 0 (or NaN): there ``dx = dy - mean of dy over the support``, elsewhere 0.

Saved for backward: y, which whoever multiplies by it holds too.
Traffic per element: forward 1 read + 1 write, backward 1 read (y) + 1 write, and dy where y > 0. Rows too wide for the
registers of one program are walked: Newton's steps are those of the maxima of 8192 lanes, and where these are the whole
support, as they mostly are, a row is read once more, from L2, else once more per step; backward, several programs share
such rows (_meet.py).

Sizes: N rows (every dimension but the one that sums to 1, flattened), D columns, P parts of a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common import _along_rows
from ds_fused.ops.common._along_rows import (
    SEEN,
    along_dim,
    along_rows,
    check_dim,
    ends_of,
    in_parts,
    load_seen,
    store_seen,
    sum_of,
)
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._meet import meet, team_and_member
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._triton import check_dtypes, like, row_stride, rows_of, runs_kernels, stages_for, warps_for

# elements of a thread, forward: its steps wait for sums over all threads of a row, so few threads, and many rows beside
# one another. On an H100, ms of 32768x4096: of a kernel that sums both numbers of a step at once 0.338, with 16 0.362
PER_THREAD_FWD = 32
# columns of a wider row that the forward works on at a time, by 1024 threads, so that few rows share a multiprocessor
# and what a walk saw last is still in L2 for the next one; with more it spills
WALK_COLS = 8192
# its tiles in flight. On an H100, us of 2048x128256: 567; with 3 of them 615 (and half of the columns and threads 722),
# with 5 to 8 of them 548 to 542
WALK_STAGES = 4
# of a part of the backward: elements of a thread, and its registers. On an H200, us of the backward of 2048x128256:
# 368; with as many registers as the assembler takes 595, with 16 elements 470
PART_PER_THREAD_BWD, PART_REGISTERS_BWD = 32, 64


def sparsemax_reference(x: Tensor, dim: int = -1) -> Tensor:
    """What this file computes, in PyTorch, by the sort of the paper: specification, CPU path and yardstick."""
    if x.shape[dim] == 0:
        return x.clone()
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(dim, -1)
    z = wide - wide.amax(-1, keepdim=True).detach()
    ordered = z.sort(-1, descending=True).values
    sums = ordered.cumsum(-1)
    ranks = torch.arange(1, z.shape[-1] + 1, device=x.device, dtype=z.dtype)
    # a row with NaN has no support: the largest alone then hands on the NaN
    size = (1 + ranks * ordered > sums).sum(-1, keepdim=True).clamp_min(1)
    tau = (sums.gather(-1, size - 1) - 1) / size
    # NaN is the gradient of such a row, too
    y = F.relu(z - tau) * torch.where(tau.isnan(), tau.detach(), 1.0)
    return y.transpose(dim, -1).to(x.dtype)


@triton.jit
def _threshold(total, size):
    """tau where the `size` values of the support sum to total.

    Rounded right, and from the values themselves: one that lies exactly on the threshold, as bf16 ones often do, isn't
    in the support.
    """
    return tl.div_rn(total - 1.0, size.to(tl.float32))


@triton.jit
def _above(z, tau, excess, size, DTYPE: tl.constexpr):
    """z - tau where that is positive, else 0; NaN stays. What rounding left in tau is taken off for itself.

    A positive value stays positive in DTYPE: what is below fp16's least, 2^-24, must not leave the support, or the
    gradient would lose it.
    """
    y = (z - tau) - tl.div_rn(excess, size.to(tl.float32))
    y = tl.where(y <= 0.0, 0.0, y)
    if tl.float16 == DTYPE:
        y = tl.where((y > 0.0) & (y < 5.9604644775390625e-08), 5.9604644775390625e-08, y)
    return y


@triton.jit
def _support_of_rows(z, tau):
    """Of each row: how many values lie above tau [rows, 1], and their sum."""
    # NaN is above any tau, so that it gets into the sum, and from there into the whole row
    above = ~(z <= tau)
    # side by side, so that the threads meet once for both
    both = tl.join(above.to(tl.float32), tl.where(above, z, 0.0))
    size, total = tl.split(tl.sum(both, axis=1))
    return size.to(tl.int32)[:, None], total[:, None]


# n_rows is not specialized: a batch whose row count is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_rows"])
def _sparsemax_fwd_kernel(
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
    # a difference to the maximum is as exact as x itself, however large both are
    z = x - tl.max(x, axis=1, keep_dims=True)
    tau = tl.full((BLOCK_ROWS, 1), -1.0, tl.float32)
    size = tl.full((BLOCK_ROWS, 1), BLOCK_COLS + 1, tl.int32)
    # columns that don't exist are -inf, above no tau: to leave them out by the mask takes registers
    fewer, total = _support_of_rows(z, tau)
    shrinks = fewer < size
    while tl.max(shrinks.to(tl.int32)) > 0:
        # a row that is ready waits for the others of its tile, unchanged: its bits don't depend on them
        tau = tl.where(shrinks, _threshold(total, tl.maximum(fewer, 1)), tau)
        size = tl.where(shrinks, fewer, size)
        fewer, total = _support_of_rows(z, tau)
        shrinks = fewer < size
    excess = tl.sum(tl.where(z <= tau, 0.0, z - tau), axis=1, keep_dims=True) - 1.0
    y = _above(z, tau, excess, tl.maximum(fewer, 1), y_ptr.dtype.element_ty)
    store_seen(y_ptr, rows, cols, n_cols, mask, y, ABOVE)


@triton.jit
def _support(x_ptr, highest, tau, n_cols, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr):
    """Of a row's values above tau, counted from the highest: how many, their sum, by how much more than 1 above it."""
    counts = tl.zeros((BLOCK_COLS,), tl.int32)
    totals = tl.zeros((BLOCK_COLS,), tl.float32)
    sums = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        z = tl.load(x_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32) - highest
        above = mask & ~(z <= tau)
        counts += above.to(tl.int32)
        totals += tl.where(above, z, 0.0)
        sums += tl.where(above, z - tau, 0.0)
    return tl.sum(counts), tl.sum(totals), tl.sum(sums) - 1.0


@triton.jit
def _write(x_ptr, y_ptr, highest, tau, excess, size, n_seen, n_written, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr):
    """Writes a row, and counts and adds up what of it lies above tau on the way."""
    counts = tl.zeros((BLOCK_COLS,), tl.int32)
    totals = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in tl.range(0, n_written, BLOCK_COLS, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_seen
        z = tl.load(x_ptr + cols, mask=mask, other=-float("inf")).to(tl.float32) - highest
        above = mask & ~(z <= tau)
        counts += above.to(tl.int32)
        totals += tl.where(above, z, 0.0)
        tl.store(y_ptr + cols, _above(z, tau, excess, size, y_ptr.dtype.element_ty), mask=cols < n_written)
    return tl.sum(counts), tl.sum(totals)


@triton.jit
def _sparsemax_fwd_walk_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    x_stride,
    n_cols,
    ABOVE: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers."""
    row = tl.program_id(0).to(tl.int64)
    n_seen, n_written = ends_of(row, n_cols, ABOVE)
    x_ptr += row * x_stride
    y_ptr += row * n_cols
    highs = tl.full((BLOCK_COLS,), -float("inf"), tl.float32)
    for start in tl.range(0, n_seen, BLOCK_COLS, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_COLS)
        highs = tl.maximum(highs, tl.load(x_ptr + cols, mask=cols < n_seen, other=-float("inf")).to(tl.float32))
    highest = tl.max(highs)

    # the tau of some of a row's values is no larger than the row's; these ones seldom leave out one of the support
    z = (highs - highest)[None, :]
    tau = tl.full((1, 1), -1.0, tl.float32)
    size = tl.full((1, 1), BLOCK_COLS + 1, tl.int32)
    fewer, total = _support_of_rows(z, tau)
    while tl.max((fewer < size).to(tl.int32)) > 0:
        tau = _threshold(total, fewer)
        size = fewer
        fewer, total = _support_of_rows(z, tau)
    excess = tl.max(tl.sum(tl.where(z <= tau, 0.0, z - tau), axis=1)) - 1.0
    tau = tl.max(tau)
    size = tl.max(size)

    # right if they left out none
    fewer, total = _write(x_ptr, y_ptr, highest, tau, excess, size, n_seen, n_written, BLOCK_COLS, STAGES)
    if fewer != size:
        size = n_seen + 1
        while fewer < size:
            tau = _threshold(total, fewer)
            size = fewer
            fewer, total, excess = _support(x_ptr, highest, tau, n_seen, BLOCK_COLS, STAGES)
        _write(x_ptr, y_ptr, highest, tau, excess, size, n_seen, n_written, BLOCK_COLS, STAGES)


@triton.jit
def _support_of_result(y):
    """What lies in the support, and what each value counts in its size, which is NaN in a row of NaN."""
    return ~(y <= 0.0), tl.where(y > 0.0, 1.0, y)


@triton.jit(do_not_specialize=["n_rows"])
def _sparsemax_bwd_kernel(
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

    support, counts = _support_of_result(load_seen(y_ptr, rows, cols, n_cols, n_cols, mask, 0.0, ABOVE))
    # what lies outside the support isn't even read
    dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=support, other=0.0).to(tl.float32)
    size = tl.sum(counts, axis=1, keep_dims=True)
    # rows past the last have none
    mean = tl.sum(dy, axis=1, keep_dims=True) / tl.where(size == 0.0, 1.0, size)
    store_seen(dx_ptr, rows, cols, n_cols, mask, tl.where(support, dy - mean, 0.0), ABOVE)


@triton.jit
def _sparsemax_part_bwd_kernel(
    dy_ptr,  # [N, D]
    y_ptr,  # [N, D]
    dx_ptr,  # [N, D]
    measures_ptr,  # [2, N, P] fp32: the size of each part's support, and the sum of dy over it
    arrivals_ptr,  # of N teams
    dy_stride,
    n_cols,
    n_parts,
    ABOVE: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
    MERGE: tl.constexpr, MANY: tl.constexpr,  # see sum_of
):  # fmt: skip
    """Part of a row that is too wide for registers."""
    row, part = team_and_member(arrivals_ptr, n_parts, MEASURES, WRITES)
    n_seen, n_written = ends_of(row, n_cols, ABOVE)
    cols = part * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + row * n_cols + cols, mask=cols < n_seen, other=0.0).to(tl.float32)
    support, counts = _support_of_result(y)
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=support, other=0.0).to(tl.float32)
    measures_ptr += row * n_parts
    sums_ptr = measures_ptr + tl.num_programs(0).to(tl.int64)
    if MEASURES:
        tl.store(measures_ptr + part, tl.sum(counts))
        tl.store(sums_ptr + part, tl.sum(dy))
    if MEASURES and WRITES:
        meet(arrivals_ptr, row, n_parts)
    if WRITES:
        size = sum_of(measures_ptr, n_parts, MERGE, MANY)
        mean = sum_of(sums_ptr, n_parts, MERGE, MANY) / size
        tl.store(dx_ptr + row * n_cols + cols, tl.where(support, dy - mean, 0.0), mask=cols < n_written)


def sparsemax_fwd(x: Tensor, dtype: torch.dtype, above: str = SEEN) -> Tensor:
    """x [..., D] -> y [..., D] of that dtype."""
    y = like(x, dtype)
    if x.shape[-1] > _along_rows.WHOLE_ROW_FWD:
        return _walked_fwd(x, y, above)
    return along_rows(_sparsemax_fwd_kernel, y, x, above=above, per_thread=PER_THREAD_FWD)


def _walked_fwd(x: Tensor, y: Tensor, above: str) -> Tensor:
    x = rows_of(x)
    n, d = x.shape
    if n:
        launch(
            _sparsemax_fwd_walk_kernel, (n,),
            x, y, row_stride(x), d,
            ABOVE=above, BLOCK_COLS=WALK_COLS, STAGES=stages_for(x, WALK_STAGES, WALK_COLS * x.itemsize),
            num_warps=warps_for(WALK_COLS, max(1, WALK_COLS // 1024)),
        )  # fmt: skip
    return y


def sparsemax_bwd(dy: Tensor, y: Tensor, dx: Tensor, above: str = SEEN) -> Tensor:
    """dy, y [..., D] -> dx [..., D], which may be dy."""
    if dy.shape[-1] > _along_rows.WHOLE_ROW_BWD:
        part = _along_rows.PART_BWD, PART_PER_THREAD_BWD
        return in_parts(_sparsemax_part_bwd_kernel, 2, *part, dx, dy, y, above=above, registers=PART_REGISTERS_BWD)
    return along_rows(_sparsemax_bwd_kernel, dx, dy, y, above=above)


class SparsemaxFunction(torch.autograd.Function):
    """Autograd around the kernels, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        y = sparsemax_fwd(x, x.dtype)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return sparsemax_bwd(dy, y, torch.empty_like(y))


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """The row of the probability simplex nearest to x's: along the last dimension, along another one over a copy.

    The result has x's dtype. -inf gets 0; a row of -inf alone, or one with NaN, is NaN, and so is its gradient.
    """
    check_dim("sparsemax", x, dim)
    if not runs_kernels(x):
        return sparsemax_reference(x, dim)
    check_dtypes("sparsemax", x=x)
    return along_dim(SparsemaxFunction.apply, x, dim)
