"""Root-mean-square norm: ``y = (offset + weight) * x / rms(x)``, rms(x) = sqrt(mean(x^2) + eps).

``cast`` says where the normalised row x_hat is rounded to x's dtype:
``"before_weight"`` (Llama): ``(offset + weight) * x_hat.to(x.dtype)``, of the promoted dtype of both;
``"after_weight"`` (Gemma): ``(x_hat * (offset + weight.float())).to(x.dtype)``.

Saved for backward: x (its producer usually holds it anyway), weight, and 1/rms in fp32 per row.
Traffic per element: forward 1 read + 1 write, backward 2 reads + 1 write, plus fp32 partial sums of dweight: one row
per program, added up in a fixed order by a second small launch (no atomics: same input, same bits).

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_fused.ops._triton import (
    cdiv,
    check_dtypes,
    multiprocessors,
    on_device,
    power_of_2,
    row_stride,
    rows_of,
    runs_kernels,
    warps_for,
)

CASTS = ("before_weight", "after_weight")

# A tile is whole rows up to these widths; wider rows are walked in blocks, twice (the second walk hits L2).
# Above them the registers of 1024 threads spill on sm90 (at 16384 the backward spills 52 bytes a thread, in fp32 116).
WHOLE_ROW_FWD = 32768
WHOLE_ROW_BWD = 16384
WALK_BLOCK = 4096
# elements of a tile when a row is narrower (as many rows as fit), and of a thread. Not measured yet.
TILE_FWD, PER_THREAD_FWD = 2048, 16
TILE_BWD, PER_THREAD_BWD = 2048, 8
# the backward's persistent grid: at 8 elements a thread ptxas gives it at most 64 registers on sm90, so 32 warps are
# resident, and none waits for a place; STAGES_BWD tiles of a program are in flight (through shared memory; 1: no
# pipeline). Not measured yet.
WARPS_PER_MULTIPROCESSOR = 32
STAGES_BWD = 2
# the last sum over programs: few columns so that many programs share it, many rows so that few turns wait for L2.
# Not measured yet.
SUM_COLS = 32
SUM_ROWS = 256


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, *, eps: float = 1e-6, offset: float = 0.0, cast: str = "before_weight"
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return x_hat.to(x.dtype)
    if cast == "before_weight":
        return (offset + weight if offset else weight) * x_hat.to(x.dtype)
    return (x_hat * (offset + weight.to(wide.dtype))).to(x.dtype)


@triton.jit
def _weight_at(weight_ptr, cols, mask, OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr):
    """offset + weight in fp32; as PyTorch does it, in weight's dtype where x_hat is cast before."""
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if OFFSET == 0.0:
        return weight.to(tl.float32)
    moved = OFFSET + weight.to(tl.float32)
    if CAST_BEFORE:
        moved = moved.to(weight.dtype).to(tl.float32)
    return moved


# n_rows is not specialized: a batch whose token count is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_fwd_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    y_ptr,  # [N, D]
    rstd_ptr,  # [N]
    x_stride,  # elements from one row to the next; y has no gaps
    n_rows,
    n_cols,
    eps,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)

    x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    y = x * rstd
    if HAS_WEIGHT:
        if CAST_BEFORE:
            y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
        y *= _weight_at(weight_ptr, cols, cols < n_cols, OFFSET, CAST_BEFORE)
    tl.store(y_ptr + rows * n_cols + cols, y, mask=mask)


@triton.jit
def _rms_norm_fwd_walk_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    y_ptr,  # [N, D]
    rstd_ptr,  # [N]
    x_stride,
    n_cols,
    eps,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / n_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        y = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
        if HAS_WEIGHT:
            if CAST_BEFORE:
                y = y.to(x_ptr.dtype.element_ty).to(tl.float32)
            y *= _weight_at(weight_ptr, cols, mask, OFFSET, CAST_BEFORE)
        tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_bwd_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    rstd_ptr,  # [N]
    dx_ptr,  # [N, D]
    partial_ptr,  # [programs, D] fp32: this program's part of dweight
    dy_stride,  # elements from one row to the next; dx has no gaps
    x_stride,
    n_rows,
    n_cols,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANTS_DWEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    if HAS_WEIGHT:
        weight = _weight_at(weight_ptr, cols, cols < n_cols, OFFSET, CAST_BEFORE)
    if WANTS_DWEIGHT:
        dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)

    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    for start in tl.range(pid * BLOCK_ROWS, n_rows, step, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < n_rows) & (cols < n_cols)
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)

        x_hat = x * rstd
        if WANTS_DWEIGHT:
            dweight += dy * x_hat
        if HAS_WEIGHT:
            dy *= weight
        dx = rstd * (dy - x_hat * (tl.sum(dy * x_hat, axis=1, keep_dims=True) / n_cols))
        tl.store(dx_ptr + rows * n_cols + cols, dx, mask=mask)

    if WANTS_DWEIGHT:
        total = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(partial_ptr + pid * n_cols + cols, total, mask=cols < n_cols)


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_bwd_walk_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    rstd_ptr,  # [N]
    dx_ptr,  # [N, D]
    partial_ptr,  # [programs, D] fp32: this program's part of dweight, added to row by row
    dy_stride,
    x_stride,
    n_rows,
    n_cols,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANTS_DWEIGHT: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Rows that are too wide for registers, one after the other."""
    pid = tl.program_id(0).to(tl.int64)
    for row in range(pid, n_rows, tl.num_programs(0).to(tl.int64)):
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros((BLOCK_COLS,), tl.float32)
        for start in range(0, n_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = cols < n_cols
            dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
            if HAS_WEIGHT:
                dy *= _weight_at(weight_ptr, cols, mask, OFFSET, CAST_BEFORE)
            products += dy * (x * rstd)
        mean = tl.sum(products) / n_cols

        for start in range(0, n_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = cols < n_cols
            dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x_hat = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            if WANTS_DWEIGHT:
                # the first row finds nothing there: scratch is written before it is read
                sums = partial_ptr + pid * n_cols + cols
                before = tl.load(sums, mask=mask & (row != pid), other=0.0)
                tl.store(sums, before + dy * x_hat, mask=mask)
            if HAS_WEIGHT:
                dy *= _weight_at(weight_ptr, cols, mask, OFFSET, CAST_BEFORE)
            tl.store(dx_ptr + row * n_cols + cols, rstd * (dy - x_hat * mean), mask=mask)
        # the next row's threads must see these sums
        tl.debug_barrier()


@triton.jit(do_not_specialize=["n_partials"])
def _sum_partials_kernel(
    partial_ptr,  # [programs, D] fp32
    dweight_ptr,  # [D]
    n_partials,
    n_cols,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, n_partials, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        mask = (rows < n_partials) & (cols < n_cols)
        dweight += tl.load(partial_ptr + rows * n_cols + cols, mask=mask, other=0.0)
    tl.store(dweight_ptr + cols, tl.sum(dweight, axis=0, keep_dims=True), mask=cols < n_cols)


class Tile(NamedTuple):
    """rows = 0: a row is walked in blocks of cols."""

    rows: int
    cols: int
    warps: int


def tile(d: int, elements: int, per_thread: int, widest: int) -> Tile:
    """Whole rows of d columns, several where they are narrow."""
    if d > widest:
        return Tile(0, WALK_BLOCK, 8)
    cols = power_of_2(d)
    rows = max(1, elements // cols)
    return Tile(rows, cols, warps_for(rows * cols, per_thread))


def rms_norm_fwd(
    x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before: bool
) -> tuple[Tensor, Tensor]:
    """[N, D], [D] -> y [N, D], rstd [N]."""
    n, d = x.shape
    dtype = torch.promote_types(x.dtype, weight.dtype) if cast_before and weight is not None else x.dtype
    y = torch.empty((n, d), dtype=dtype, device=x.device)
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0 or d == 0:
        return y, rstd
    block = tile(d, TILE_FWD, PER_THREAD_FWD, WHOLE_ROW_FWD)
    constants = {
        "OFFSET": offset,
        "CAST_BEFORE": cast_before,
        "HAS_WEIGHT": weight is not None,
        "BLOCK_COLS": block.cols,
        "num_warps": block.warps,
    }
    with on_device(x):
        if block.rows:
            _rms_norm_fwd_kernel[(cdiv(n, block.rows),)](
                x, weight, y, rstd, row_stride(x), n, d, eps, BLOCK_ROWS=block.rows, **constants
            )
        else:
            _rms_norm_fwd_walk_kernel[(n,)](x, weight, y, rstd, row_stride(x), d, eps, **constants)
    return y, rstd


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float, cast_before: bool, wants_dweight: bool
) -> tuple[Tensor, Tensor | None]:
    """dy [N, D], x [N, D], weight [D], rstd [N] -> dx [N, D], dweight [D] or None."""
    n, d = x.shape
    dx = torch.empty((n, d), dtype=x.dtype, device=x.device)
    if n == 0 or d == 0:
        return dx, torch.zeros_like(weight) if wants_dweight else None
    block = tile(d, TILE_BWD, PER_THREAD_BWD, WHOLE_ROW_BWD)
    constants = {
        "OFFSET": offset,
        "CAST_BEFORE": cast_before,
        "HAS_WEIGHT": weight is not None,
        "WANTS_DWEIGHT": wants_dweight,
        "BLOCK_COLS": block.cols,
        "num_warps": block.warps,
    }
    if block.rows:
        kernel = _rms_norm_bwd_kernel
        constants |= {"BLOCK_ROWS": block.rows, "STAGES": STAGES_BWD}
    else:
        kernel = _rms_norm_bwd_walk_kernel
    resident = multiprocessors(x) * max(1, WARPS_PER_MULTIPROCESSOR // block.warps)
    programs = min(cdiv(n, max(1, block.rows)), resident)
    partial = torch.empty((programs, d), dtype=torch.float32, device=x.device) if wants_dweight else None
    with on_device(x):
        kernel[(programs,)](dy, x, weight, rstd, dx, partial, row_stride(dy), row_stride(x), n, d, **constants)
        if not wants_dweight:
            return dx, None
        dweight = torch.empty_like(weight)
        _sum_partials_kernel[(cdiv(d, SUM_COLS),)](
            partial, dweight, programs, d, BLOCK_ROWS=SUM_ROWS, BLOCK_COLS=SUM_COLS, num_warps=8
        )
    return dx, dweight


class RMSNormFunction(torch.autograd.Function):
    """Autograd around the launchers; sees only [N, D]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, eps: float, offset: float, cast_before: bool) -> Tensor:
        y, rstd = rms_norm_fwd(x, weight, eps, offset, cast_before)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset, ctx.cast_before = offset, cast_before
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        wants_dweight = weight is not None and ctx.needs_input_grad[1]
        dx, dweight = rms_norm_bwd(rows_of(dy), x, weight, rstd, ctx.offset, ctx.cast_before, wants_dweight)
        return dx, dweight, None, None, None


def rms_norm(
    x: Tensor, weight: Tensor | None, *, eps: float = 1e-6, offset: float = 0.0, cast: str = "before_weight"
) -> Tensor:
    """``(offset + weight) * x / rms(x)`` over the last dimension: x [..., D], weight [D] or None.

    The result has the promoted dtype of x and weight with ``cast="before_weight"``, x's with ``"after_weight"``.
    """
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight {tuple(weight.shape)} must be one value per column of x {tuple(x.shape)}")
    if cast not in CASTS:
        raise ValueError(f"rms_norm: cast is {cast!r}; known are {', '.join(CASTS)}")
    if not (runs_kernels(x) if weight is None else runs_kernels(x, weight)):
        return rms_norm_reference(x, weight, eps=eps, offset=offset, cast=cast)
    check_dtypes("rms_norm", x=x, weight=weight)
    weight = weight if weight is None else weight.contiguous()
    y = RMSNormFunction.apply(rows_of(x), weight, eps, offset, cast == "before_weight")
    return y.view(x.shape)
