"""Softmax along a dimension: ``y = exp(x) / sum(exp(x))``, in fp32, one pass forward and one pass back.

Saved for backward: y, which whoever multiplies by it holds too.
Traffic per element: forward 1 read + 1 write, backward 2 reads (dy, y) + 1 write; rows too wide for registers are read
twice, the second time mostly from L2.

Sizes: N rows (every dimension but the one that sums to 1, flattened), D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops import _along_rows
from ds_fused.ops._along_rows import SEEN, along_dim, along_rows, check_dim, ends_of, load_seen, store_seen
from ds_fused.ops._once import once_differentiable
from ds_fused.ops._triton import autocast_dtype, check_dtypes, like, runs_kernels

# On an H100, ms of 8192x128256, forward and backward: 1.91, 3.12; with 8192 columns 2.11, 3.33; with 4096 and 256
# threads 2.14, 3.52 (results/h100/tune.csv)
WALK_COLS = 16384


def softmax_reference(x: Tensor, dim: int = -1) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    return torch.softmax(x, dim, dtype=result_dtype(x))


def result_dtype(x: Tensor) -> torch.dtype:
    """PyTorch's autocast on a GPU has softmax give fp32; so do we, on any device."""
    return x.dtype if autocast_dtype(x) is None else torch.promote_types(x.dtype, torch.float32)


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
def _softmax_fwd_walk_kernel(
    x_ptr,  # [N, D]
    y_ptr,  # [N, D]
    x_stride,
    n_cols,
    ABOVE: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers. A lane keeps its maximum, and a sum that is scaled where that grows."""
    row = tl.program_id(0).to(tl.int64)
    n_seen, n_written = ends_of(row, n_cols, ABOVE)
    high = tl.full((BLOCK_COLS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in tl.range(0, n_seen, BLOCK_COLS, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_seen, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(high, x)
        # a lane may have seen nothing but -inf yet (a mask), and -inf less -inf is NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(high - shift) + tl.exp(x - shift)
        high = higher
    highest = tl.max(high)
    # a lane of -inf alone has the sum 0
    scale = tl.div_rn(1.0, tl.sum(total * tl.exp(high - highest)))
    # backwards: what was seen last is seen first again, and what is written leaves L2 first
    last = (tl.cdiv(n_written, BLOCK_COLS) - 1) * BLOCK_COLS
    for back in tl.range(0, n_written, BLOCK_COLS, num_stages=STAGES):
        cols = last - back + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_seen, other=-float("inf")).to(tl.float32)
        y = tl.exp(x - highest) * scale
        tl.store(y_ptr + row * n_cols + cols, y, mask=cols < n_written, eviction_policy="evict_first")


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
    store_seen(dx_ptr, rows, cols, n_cols, mask, dx, ABOVE)


@triton.jit
def _softmax_bwd_walk_kernel(
    dy_ptr,  # [N, D]
    y_ptr,  # [N, D]
    dx_ptr,  # [N, D]
    dy_stride,
    n_cols,
    ABOVE: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers."""
    row = tl.program_id(0).to(tl.int64)
    n_seen, n_written = ends_of(row, n_cols, ABOVE)
    products = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in tl.range(0, n_seen, BLOCK_COLS, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_seen
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        products += dy * tl.load(y_ptr + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
    inner = tl.sum(products)
    last = (tl.cdiv(n_written, BLOCK_COLS) - 1) * BLOCK_COLS
    for back in tl.range(0, n_written, BLOCK_COLS, num_stages=STAGES):
        cols = last - back + tl.arange(0, BLOCK_COLS)
        mask = cols < n_seen
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
        dx = y * (dy - inner)
        tl.store(dx_ptr + row * n_cols + cols, dx, mask=cols < n_written, eviction_policy="evict_first")


def softmax_fwd(x: Tensor, dtype: torch.dtype, above: str = SEEN) -> Tensor:
    """x [..., D] -> y [..., D] of that dtype."""
    y = like(x, dtype)
    widest = _along_rows.WHOLE_ROW_FWD
    return along_rows(_softmax_fwd_kernel, _softmax_fwd_walk_kernel, widest, WALK_COLS, y, x, above=above)


def softmax_bwd(dy: Tensor, y: Tensor, dx: Tensor, above: str = SEEN) -> Tensor:
    """dy, y [..., D] -> dx [..., D], which may be dy."""
    widest = _along_rows.WHOLE_ROW_BWD
    return along_rows(_softmax_bwd_kernel, _softmax_bwd_walk_kernel, widest, WALK_COLS, dx, dy, y, above=above)


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

    The result has x's dtype, under autocast fp32. A row of -inf alone is NaN, as PyTorch's is.
    """
    check_dim("softmax", x, dim)
    if not runs_kernels(x):
        return softmax_reference(x, dim)
    check_dtypes("softmax", x=x)
    dtype = result_dtype(x)
    return along_dim(lambda x: SoftmaxFunction.apply(x, dtype), x, dim)
