"""Layer norm: ``y = weight * (x - mean(x)) / std(x) + bias`` over a row, std(x) = sqrt(var(x) + eps).

Computed in fp32 and rounded once. weight and bias may each be None. Idea: Ba, Kiros and Hinton, "Layer Normalization"
(2016). The kernels can add a residual to x first: that is add_layer_norm, which shares them.

Saved for backward: x (its producer usually holds it anyway), weight, and mean and 1/std in fp32 per row.
Traffic per element: forward 1 read + 1 write, backward 2 reads + 1 write, plus fp32 partial sums of dweight and dbias:
one row of each per program, or per two of them, added up by a second small launch (same input, same bits: _sums.py).
Rows too wide for a tile take 2 more reads backward, for the sums of columns.

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._row_tiles import in_turn, over_rows, tile_of_blocks
from ds_fused.ops.common._sums import leave, partials, sharers, sum_partials
from ds_fused.ops.common._triton import (
    cdiv,
    check_dtypes,
    like,
    norm_dtype,
    resident,
    row_stride,
    rows_of,
    runs_kernels,
    warps_for,
)
from ds_fused.ops.norms._norms import Wanted, check_per_column, contiguous
from ds_fused.ops.norms._wide_layer_norm import (
    _layer_norm_bwd_walk_kernel,
    _layer_norm_columns_kernel,
    _layer_norm_fwd_walk_kernel,
)

# A tile is whole rows up to these widths; wider rows are walked in blocks (_wide_layer_norm.py).
# At 8192 columns the backward doesn't spill on sm90, at 10240, five blocks, 24 bytes a thread at most (with a residual;
# in fp32 4), at 16384 248 (in fp32 292). 10240 is not yet measured: walked, it would read dy and x once more.
WHOLE_ROW_FWD = 32768
WHOLE_ROW_BWD = 10240
# elements of a tile when a row is narrower (as many rows as fit), and of a thread; of a thread at most where rows are
# several blocks. On an H100, ms of 26208x5120: 0.183 in three, 0.222 in one of 8192
TILE_FWD, PER_THREAD_FWD, OF_BLOCKS_FWD = 1024, 16, 24
TILE_BWD, PER_THREAD_BWD, OF_BLOCKS_BWD = 2048, 16, 20
# the backward's persistent grid, and the tiles of a program that are in flight. On an H100, ms of the backward of
# 8192x4096 and 16384x8192: 0.083, 0.288; with 2 tiles 0.094, unknown; with 8 elements, 32 warps, 2 tiles 0.096, 0.375
# (results/h100/tune.csv). On an H200 of 256 MiB in rows of 64, 256 and 1024 columns: 0.209, 0.215, 0.204; with 8
# elements and 32 warps 0.213, 0.224, 0.275; forward of 576 columns 0.201, by tiles of 2048 0.233
# (results/h200/tune.csv)
WARPS_PER_MULTIPROCESSOR = 16
STAGES_BWD = 3
# the tile of the sums over columns of rows that are walked
COLUMNS_TILE = (8, 256)


def layer_norm_reference(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    affine = [t for t in (weight, bias) if t is not None]
    if all(t.dtype == x.dtype for t in affine):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps).to(norm_dtype(x, x.dtype))


# n_rows is not specialized: a batch whose token count is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_fwd_kernel(
    x_ptr,  # [N, D]
    residual_ptr,  # [N, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    y_ptr,  # [N, D]
    sum_ptr,  # [N, D]: x + residual
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    x_stride,  # elements from one row to the next; y and sum have no gaps
    residual_stride,
    n_rows,
    n_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
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
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + rows * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
            # what is normalised is the sum that others will read
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
            tl.store(sum_ptr + rows * n_cols + cols, x, mask=mask)
        blocks = blocks + (x,)
        # not from zeros, which would be added to every value
        if block == 0:
            sums = x
        else:
            sums += x
    mean = tl.sum(sums, axis=1, keep_dims=True) / n_cols

    centred = ()
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        x = tl.where((rows < n_rows) & (cols < n_cols), blocks[block] - mean, 0.0)
        centred = centred + (x,)
        if block == 0:
            sums, squares = x, x * x
        else:
            sums += x
            squares += x * x
    # the rounding of a mean far from zero, found beside the variance, so that it costs no bits of either
    rest = tl.sum(sums, axis=1, keep_dims=True) / n_cols
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / n_cols - rest * rest + eps)
    shift = -rest * rstd
    tl.store(mean_ptr + rows, mean + rest, mask=rows < n_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        each = over_rows(cols, BLOCK_ROWS)
        y = centred[block] * rstd + shift
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + each, mask=each < n_cols, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + each, mask=each < n_cols, other=0.0).to(tl.float32)
        tl.store(y_ptr + rows * n_cols + cols, y, mask=(rows < n_rows) & (cols < n_cols))


@triton.jit(do_not_specialize=["n_rows", "n_sharers"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # [N, D]
    dsum_ptr,  # [N, D]: what else arrives at x
    x_ptr,  # [N, D]: what was normalised
    weight_ptr,  # [D]
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    dx_ptr,  # [N, D]
    partial_ptr,  # [2, programs / n_sharers, D] fp32: parts of dweight and dbias
    dy_stride,  # elements from one row to the next; dx has no gaps
    dsum_stride,
    x_stride,
    n_rows,
    n_cols,
    n_sharers,  # programs whose sums go to one row
    HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANTS_DX: tl.constexpr, WANTS_DWEIGHT: tl.constexpr, WANTS_DBIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    weights, dweights, dbiases = (), (), ()
    for block in tl.static_range(BLOCKS):
        if HAS_WEIGHT:
            each = over_rows(block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :], BLOCK_ROWS)
            weights = weights + (tl.load(weight_ptr + each, mask=each < n_cols, other=0.0).to(tl.float32),)
        dweights = dweights + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32),)
        dbiases = dbiases + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32),)

    for start in tl.range(pid * BLOCK_ROWS, n_rows, programs * BLOCK_ROWS, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        hats, dhats, more_dweights, more_dbiases = (), (), (), ()
        for block in tl.static_range(BLOCKS):
            cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
            mask = (rows < n_rows) & (cols < n_cols)
            dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
            # where the mask is off this is no zero, but its dy is
            x_hat = (x - mean) * rstd
            if WANTS_DWEIGHT:
                more_dweights = more_dweights + (dweights[block] + dy * x_hat,)
            if WANTS_DBIAS:
                more_dbiases = more_dbiases + (dbiases[block] + dy,)
            if HAS_WEIGHT:
                dy *= weights[block]
            # not from zeros, which would be added to every value
            if block == 0:
                along, sums = dy * x_hat, dy
            else:
                along += dy * x_hat
                sums += dy
            hats = hats + (x_hat,)
            dhats = dhats + (dy,)
        if WANTS_DWEIGHT:
            dweights = more_dweights
        if WANTS_DBIAS:
            dbiases = more_dbiases
        if WANTS_DX:
            along = tl.sum(along, axis=1, keep_dims=True) / n_cols
            sums = tl.sum(sums, axis=1, keep_dims=True) / n_cols
            for block in tl.static_range(BLOCKS):
                cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
                mask = (rows < n_rows) & (cols < n_cols)
                dx = rstd * (dhats[block] - sums - hats[block] * along)
                if HAS_DSUM:
                    dx += tl.load(dsum_ptr + rows * dsum_stride + cols, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_ptr + rows * n_cols + cols, dx, mask=mask)

    dbiases_ptr = partial_ptr
    if WANTS_DBIAS:
        dbiases_ptr += tl.cdiv(programs, n_sharers) * n_cols
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        here = pid // n_sharers * n_cols + cols
        if WANTS_DWEIGHT:
            leave(partial_ptr + here, tl.sum(dweights[block], axis=0, keep_dims=True), cols < n_cols, n_sharers)
        if WANTS_DBIAS:
            leave(dbiases_ptr + here, tl.sum(dbiases[block], axis=0, keep_dims=True), cols < n_cols, n_sharers)


def layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [..., D], weight, bias [D] -> y [..., D] of dtype, x + residual or x, mean and rstd [N]."""
    y, total, residual_stride = like(x, dtype), x, 0
    if residual is not None:
        total = like(x, torch.promote_types(x.dtype, residual.dtype))
        residual = rows_of(residual)
        residual_stride = row_stride(residual)
    x = rows_of(x)
    n, d = x.shape
    mean = torch.empty(n, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if n == 0 or d == 0:
        return y, total, mean, rstd
    arguments = (x, residual, weight, bias, y, total, mean, rstd, row_stride(x), residual_stride)
    block = tile_of_blocks(d, TILE_FWD, PER_THREAD_FWD, WHOLE_ROW_FWD, OF_BLOCKS_FWD)
    constants = {
        "HAS_RESIDUAL": residual is not None,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "BLOCK_COLS": block.cols,
        "num_warps": block.warps,
    }
    if block.rows:
        launch(
            _layer_norm_fwd_kernel, (cdiv(n, block.rows),), *arguments, n, d, eps,
            BLOCK_ROWS=block.rows, BLOCKS=block.blocks, **constants,
        )  # fmt: skip
    else:
        launch(_layer_norm_fwd_walk_kernel, (n,), *arguments, d, eps, **constants)
    return y, total, mean, rstd


def layer_norm_bwd(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy, dsum, x [..., D], weight, bias [D], mean, rstd [N] -> dx [..., D], dweight [D], dbias [D], those wanted."""
    dx = like(x) if wanted.dx else None
    dy, x, dsum = rows_of(dy), rows_of(x), None if dsum is None else rows_of(dsum)
    n, d = x.shape
    nothing = n == 0 or d == 0
    make = torch.zeros_like if nothing else torch.empty_like
    dweight = make(weight) if wanted.dweight else None
    dbias = make(bias) if wanted.dbias else None
    if nothing:
        return dx, dweight, dbias
    sums = wanted.dweight or wanted.dbias
    dsum_stride = 0 if dsum is None else row_stride(dsum)
    wants = {"WANTS_DWEIGHT": wanted.dweight, "WANTS_DBIAS": wanted.dbias}
    block = tile_of_blocks(d, TILE_BWD, PER_THREAD_BWD, WHOLE_ROW_BWD, OF_BLOCKS_BWD)
    itemsizes = dy.itemsize + x.itemsize + (0 if dsum is None else dsum.itemsize)
    programs, constants = in_turn(x, block, n, WARPS_PER_MULTIPROCESSOR, itemsizes, STAGES_BWD)
    constants |= {"HAS_DSUM": dsum is not None, "HAS_WEIGHT": weight is not None}
    if block.rows:
        n_sharers = sharers(x, programs)
    else:
        column_blocks = cdiv(d, COLUMNS_TILE[1])
        warps = warps_for(COLUMNS_TILE[0] * COLUMNS_TILE[1], PER_THREAD_BWD)
        most = max(1, resident(x, WARPS_PER_MULTIPROCESSOR, warps) // column_blocks)
        programs = min(cdiv(n, COLUMNS_TILE[0]), most)
        n_sharers = 1  # of a block of columns there are few programs
    rows = cdiv(programs, n_sharers)
    partial = partials(x, rows, d, n_sharers=n_sharers) if sums else None
    if block.rows:
        launch(
            _layer_norm_bwd_kernel, (programs,),
            dy, dsum, x, weight, mean, rstd, dx, partial, row_stride(dy), dsum_stride, row_stride(x), n, d,
            n_sharers, WANTS_DX=wanted.dx, BLOCKS=block.blocks, **wants, **constants,
        )  # fmt: skip
    else:
        if wanted.dx:
            launch(
                _layer_norm_bwd_walk_kernel, (n,),
                dy, dsum, x, weight, mean, rstd, dx, row_stride(dy), dsum_stride, row_stride(x), d,
                **constants,
            )  # fmt: skip
        if sums:
            launch(
                _layer_norm_columns_kernel, (column_blocks, programs),
                dy, x, mean, rstd, partial, row_stride(dy), row_stride(x), n, d,
                BLOCK_ROWS=COLUMNS_TILE[0], BLOCK_COLS=COLUMNS_TILE[1], num_warps=warps, **wants,
            )  # fmt: skip
    if sums:
        sum_partials(partial, rows, d, dweight, dbias)
    return dx, dweight, dbias


class LayerNormFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
        y, _, mean, rstd = layer_norm_fwd(x, None, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wanted = Wanted(
            ctx.needs_input_grad[0],
            weight is not None and ctx.needs_input_grad[1],
            bias is not None and ctx.needs_input_grad[2],
        )
        return *layer_norm_bwd(dy, None, x, weight, bias, mean, rstd, wanted), None, None


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, eps: float = 1e-5) -> Tensor:
    """``weight * (x - mean(x)) / std(x) + bias`` over the last dimension: x [..., D], weight and bias [D] or None.

    The result has x's dtype, but fp32 where PyTorch's is: under the autocast of a GPU.
    """
    check_per_column("layer_norm", x, weight=weight, bias=bias)
    check_numbers("layer_norm", eps=eps)
    if not runs_kernels(x, weight, bias):
        return layer_norm_reference(x, weight, bias, eps=eps)
    check_dtypes("layer_norm", x=x, weight=weight, bias=bias)
    weight, bias = contiguous(weight), contiguous(bias)
    dtype = norm_dtype(x, x.dtype)
    if torch.compiler.is_compiling():  # as in rms_norm
        return LayerNormFunction.apply(rows_of(x), weight, bias, eps, dtype).view(x.shape)
    return LayerNormFunction.apply(x, weight, bias, eps, dtype)
