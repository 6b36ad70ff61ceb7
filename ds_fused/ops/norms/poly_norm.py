"""PolyNorm: ``y = weight[0] n(x^3) + weight[1] n(x^2) + weight[2] n(x) + bias``, n(v) = v / sqrt(mean(v^2) + eps).

An activation from Zhuo, Wang, Zeng, Li, Zhou and Ma, "Polynomial Composition Activations: Unleashing the Dynamics of
Large Language Models" (PolyCom, 2024). weight is three numbers, the cube's first; bias is one number or None. Computed
in fp32, of which x^6 must not run out (|x| < 2e6), and rounded once, to x's dtype.

Saved for backward: x, weight, and the three 1/sqrt(mean(v^2) + eps) in fp32 per row.
Traffic per element: forward 1 read + 1 write, backward 2 reads + 1 write, plus four fp32 numbers per program, the parts
of dweight and dbias, added up in a fixed order by a second small launch (no atomics: same input, same bits).
Tiles and the backward's grid are rms_norm's, but for what is named here.

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._row_tiles import in_turn, tile_of_blocks
from ds_fused.ops.common._sums import partials, sum_partials
from ds_fused.ops.common._triton import cdiv, check_dtypes, row_stride, rows_of, runs_kernels
from ds_fused.ops.norms._norms import Wanted
from ds_fused.ops.norms._wide_poly_norm import (
    _poly_norm_bwd_walk_kernel,
    _poly_norm_fwd_walk_kernel,
    factors,
    polynomial,
    slope,
    store_parts,
    sums_of_four,
    sums_of_three,
)
from ds_fused.ops.norms.rms_norm import (
    OF_BLOCKS_BWD,
    PER_THREAD_BWD,
    STAGES_BWD,
    TILE_BWD,
    TILE_FWD,
    WARPS_PER_MULTIPROCESSOR,
    WHOLE_ROW_BWD,
    WHOLE_ROW_FWD,
)

# elements of a thread: three sums a row weigh less the fewer warps they are of. On an H200, ms of 256 MiB in rows of
# 576, 5120 and 8192 columns: 0.170, 0.150, 0.136, with 16 elements 0.226, 0.204, 0.153 (results/h200/tune.csv)
PER_THREAD_FWD, OF_BLOCKS_FWD = 32, 40


def poly_norm_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = 0.0 if bias is None else bias.to(wide.dtype)
    for power, factor in zip((3, 2, 1), weight.to(wide.dtype).unbind(), strict=True):
        raised = wide.pow(power)
        y = y + factor * (raised * torch.rsqrt(raised.pow(2).mean(-1, keepdim=True) + eps))
    return y.to(x.dtype)


# n_rows is not specialized: a batch whose token count is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_rows"])
def _poly_norm_fwd_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [3]
    bias_ptr,  # [1]
    y_ptr,  # [N, D]
    rstds_ptr,  # [N, 3]: of the cube, the square, and x
    x_stride,  # elements from one row to the next; y has no gaps
    n_rows,
    n_cols,
    eps,
    HAS_BIAS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BLOCKS: tl.constexpr,  # side by side, of which a row is made up
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    blocks = ()
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        mask = (rows < n_rows) & (cols < n_cols)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        square = x * x
        # not from zeros, which would be added to every value
        if block == 0:
            sums = square * square * square, square * square, square
        else:
            sums = sums[0] + square * square * square, sums[1] + square * square, sums[2] + square
        blocks = blocks + (x,)
    sixth, fourth, second = sums_of_three(sums)
    rstd3 = tl.rsqrt(sixth / n_cols + eps)
    rstd2 = tl.rsqrt(fourth / n_cols + eps)
    rstd1 = tl.rsqrt(second / n_cols + eps)
    tl.store(rstds_ptr + rows * 3, rstd3, mask=rows < n_rows)
    tl.store(rstds_ptr + rows * 3 + 1, rstd2, mask=rows < n_rows)
    tl.store(rstds_ptr + rows * 3 + 2, rstd1, mask=rows < n_rows)
    weight3, weight2, weight1 = factors(weight_ptr)
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        y = polynomial(blocks[block], weight3 * rstd3, weight2 * rstd2, weight1 * rstd1, bias_ptr, HAS_BIAS)
        tl.store(y_ptr + rows * n_cols + cols, y, mask=(rows < n_rows) & (cols < n_cols))


@triton.jit(do_not_specialize=["n_rows"])
def _poly_norm_bwd_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [3]
    rstds_ptr,  # [N, 3]
    dx_ptr,  # [N, D]
    partial_ptr,  # [2, P, 3] fp32, the first the parts of dweight, and after it those of dbias, one per program
    dy_stride,  # elements from one row to the next; dx has no gaps
    x_stride,
    n_rows,
    n_cols,
    WANTS_DX: tl.constexpr, WANTS_SUMS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    weight3, weight2, weight1 = factors(weight_ptr)
    dweight3 = tl.zeros((BLOCK_ROWS, 1), tl.float32)
    dweight2 = tl.zeros((BLOCK_ROWS, 1), tl.float32)
    dweight1 = tl.zeros((BLOCK_ROWS, 1), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, 1), tl.float32)

    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    for start in tl.range(pid * BLOCK_ROWS, n_rows, step, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        rstd3 = tl.load(rstds_ptr + rows * 3, mask=rows < n_rows, other=0.0)
        rstd2 = tl.load(rstds_ptr + rows * 3 + 1, mask=rows < n_rows, other=0.0)
        rstd1 = tl.load(rstds_ptr + rows * 3 + 2, mask=rows < n_rows, other=0.0)

        xs, dys = (), ()
        for block in tl.static_range(BLOCKS):
            cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
            mask = (rows < n_rows) & (cols < n_cols)
            dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
            if block == 0:
                sums = dy * x * x * x, dy * x * x, dy * x, dy
            else:
                sums = sums[0] + dy * x * x * x, sums[1] + dy * x * x, sums[2] + dy * x, sums[3] + dy
            xs = xs + (x,)
            dys = dys + (dy,)
        # sum(dy n(x^p))
        # wider rows have 1024 threads, of 64 registers each: together, 88 to 276 bytes of them spill (sm80 to sm100)
        sum3, sum2, sum1, sum0 = sums_of_four(sums, BLOCK_COLS * BLOCKS <= 8192)
        sum3 *= rstd3
        sum2 *= rstd2
        sum1 *= rstd1
        if WANTS_SUMS:
            dweight3 += sum3
            dweight2 += sum2
            dweight1 += sum1
            dbias += sum0
        if WANTS_DX:
            for block in tl.static_range(BLOCKS):
                cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
                dx = slope(
                    xs[block], dys[block], weight3 * rstd3, weight2 * rstd2, weight1 * rstd1,
                    rstd3 * sum3 / n_cols, rstd2 * sum2 / n_cols, rstd1 * sum1 / n_cols,
                )  # fmt: skip
                tl.store(dx_ptr + rows * n_cols + cols, dx, mask=(rows < n_rows) & (cols < n_cols))

    if WANTS_SUMS:
        store_parts(partial_ptr, tl.sum(dweight3), tl.sum(dweight2), tl.sum(dweight1), tl.sum(dbias))


def poly_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [3], bias [1] -> y [..., D], rstds [N, 3]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = rows_of(x)
    n, d = x.shape
    rstds = torch.empty((n, 3), dtype=torch.float32, device=x.device)
    if n == 0 or d == 0:
        return y, rstds
    block = tile_of_blocks(d, TILE_FWD, PER_THREAD_FWD, WHOLE_ROW_FWD, OF_BLOCKS_FWD)
    tensors = (x, weight, bias, y, rstds)
    constants = {"HAS_BIAS": bias is not None, "BLOCK_COLS": block.cols, "num_warps": block.warps}
    if block.rows:
        launch(
            _poly_norm_fwd_kernel, (cdiv(n, block.rows),),
            *tensors, row_stride(x), n, d, eps,
            BLOCK_ROWS=block.rows, BLOCKS=block.blocks, **constants,
        )  # fmt: skip
    else:
        launch(_poly_norm_fwd_walk_kernel, (n,), *tensors, row_stride(x), d, eps, **constants)
    return y, rstds


def poly_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, rstds: Tensor, wanted: Wanted
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy, x [..., D], weight [3], bias [1], rstds [N, 3] -> dx [..., D], dweight [3], dbias [1]; None where not wanted.

    Of bias only shape and dtype count.
    """
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted.dx else None
    dy, x = rows_of(dy), rows_of(x)
    n, d = x.shape
    nothing = n == 0 or d == 0
    make = torch.zeros_like if nothing else torch.empty_like
    dweight = make(weight) if wanted.dweight else None
    dbias = make(bias) if wanted.dbias else None
    if nothing:
        return dx, dweight, dbias
    sums = wanted.dweight or wanted.dbias
    block = tile_of_blocks(d, TILE_BWD, PER_THREAD_BWD, WHOLE_ROW_BWD, OF_BLOCKS_BWD)
    programs, tiles = in_turn(x, block, n, WARPS_PER_MULTIPROCESSOR, dy.itemsize + x.itemsize, STAGES_BWD)
    if block.rows:
        tiles["BLOCKS"] = block.blocks
    partial = partials(x, programs, 3, programs) if sums else None
    launch(
        _poly_norm_bwd_kernel if block.rows else _poly_norm_bwd_walk_kernel, (programs,),
        dy, x, weight, rstds, dx, partial, row_stride(dy), row_stride(x), n, d,
        WANTS_DX=wanted.dx, WANTS_SUMS=sums, **tiles,
    )  # fmt: skip
    if sums:
        sum_partials(partial, programs, 3, dweight, None, dbias, programs)
    return dx, dweight, dbias


class PolyNormFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        y, rstds = poly_norm_fwd(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, rstds)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, bias, rstds = ctx.saved_tensors
        return *poly_norm_bwd(dy, x, weight, bias, rstds, Wanted(*ctx.needs_input_grad[:3])), None


def poly_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """``weight[0] n(x^3) + weight[1] n(x^2) + weight[2] n(x) + bias``, n(v) = v / sqrt(mean(v^2) + eps).

    x [..., D], over whose last dimension the means are; weight [3]; bias one number, of shape (1,) or (), or None. The
    result has x's dtype, so that weight and bias may be fp32 beside an x of 16 bits.
    """
    if x.ndim == 0:
        raise ValueError("poly_norm: x is a number; it must have a last dimension, its columns")
    if weight.shape != (3,):
        raise ValueError(f"poly_norm: weight {tuple(weight.shape)} must be three numbers, of shape (3,)")
    if bias is not None and (bias.numel() != 1 or bias.ndim > 1):
        raise ValueError(f"poly_norm: bias {tuple(bias.shape)} must be one number, of shape (1,) or ()")
    check_numbers("poly_norm", eps=eps)
    if not runs_kernels(x, weight, bias):
        return poly_norm_reference(x, weight, bias, eps=eps)
    check_dtypes("poly_norm", x=x, weight=weight, bias=bias)
    weight = weight.contiguous()
    if torch.compiler.is_compiling():
        # as in rms_norm
        return PolyNormFunction.apply(rows_of(x), weight, bias, eps).view(x.shape)
    return PolyNormFunction.apply(x, weight, bias, eps)
