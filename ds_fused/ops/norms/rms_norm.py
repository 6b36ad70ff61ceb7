"""Root-mean-square norm: ``y = (offset + weight) * x / rms(x) + bias``, rms(x) = sqrt(mean(x^2) + eps).

``cast`` says where the normalised row x_hat is rounded to x's dtype:
``"before_weight"`` (Llama): ``(offset + weight) * x_hat.to(x.dtype) + bias``, of the promoted dtype of all;
``"after_weight"`` (Gemma): ``(x_hat * (offset + weight.float()) + bias.float()).to(x.dtype)``.

Saved for backward: x (its producer usually holds it anyway), weight, and 1/rms in fp32 per row.
Traffic per element: forward 1 read + 1 write, backward 2 reads + 1 write, plus fp32 partial sums of dweight and dbias:
one row each per program, or per two of them, added up by a second small launch (same input, same bits: _sums.py).
With ``overwrite_grad`` dx takes no memory but dy's. A program reads a row of dy, both times where it is walked, before
it writes there, and no other program has to do with the row: whatever tiles are in flight are other rows.

The kernels also take what add_rms_norm.py has more: a residual, which is added to x before all this, and the gradient
of that sum, which is added to dx.

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common import _row_tiles, _sums, _triton
from ds_fused.ops.common._launch import Kept, Ready, launch_ready, lie_alike, ready
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._row_tiles import in_turn, tile_of_blocks
from ds_fused.ops.common._sums import partials, sharers, sum_partials
from ds_fused.ops.common._triton import (
    can_take,
    cdiv,
    check_dtypes,
    like,
    note_taken,
    row_stride,
    rows_of,
    runs_kernels,
)
from ds_fused.ops.norms._norms import RMSForm, Wanted, check_cast, check_per_column, contiguous
from ds_fused.ops.norms._rms_norm_kernels import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel
from ds_fused.ops.norms._wide_rms_norm import _rms_norm_bwd_walk_kernel, _rms_norm_fwd_walk_kernel

# A tile is whole rows up to these widths; wider rows are walked in blocks (_wide_rms_norm.py).
# Above them the registers of 1024 threads spill on sm90 (at 16384 the backward spills 52 bytes a thread, in fp32 116).
WHOLE_ROW_FWD = 32768
WHOLE_ROW_BWD = 16384
# elements of a tile when a row is narrower (as many rows as fit), and of a thread; of a thread at most where rows are
# several blocks. Backward it then has a hat, a gradient and a sum of each: with 24 of them 16 to 48 bytes spill (sm90)
TILE_FWD, PER_THREAD_FWD, OF_BLOCKS_FWD = 2048, 16, 24
TILE_BWD, PER_THREAD_BWD, OF_BLOCKS_BWD = 2048, 16, 20
# the backward's persistent grid: at 16 elements a thread ptxas gives it at most 128 registers on sm90, so 16 warps are
# resident, and none waits for a place; STAGES_BWD tiles of a program are in flight (1: no pipeline). On an H100, ms of
# the backward of 8192x4096 and 16384x8192: 0.081, 0.285; with 8 elements and 32 warps 0.081, 0.287, with 2 stages of
# these 0.088, 0.333. On an H200 0.203 to 0.210 of 256 MiB in rows of 64 to 8192 columns, 0.24 where 576 or 2304 were
# a tile's 1024 or 4096; with 8 elements up to 8 % more (results/h200/tune.csv)
WARPS_PER_MULTIPROCESSOR = 16
STAGES_BWD = 3

_forwards: Kept[tuple[Ready | None, int]] = Kept()
_backwards: Kept[tuple[Ready, int, int]] = Kept()


def rms_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
    overwrite_grad: bool = False,  # a permission that plain PyTorch makes no use of
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if cast == "before_weight":
        y = y.to(x.dtype)
        if weight is not None:
            y = (offset + weight if offset else weight) * y
        return y if bias is None else y + bias
    if weight is not None:
        y = y * (offset + weight.to(wide.dtype))
    if bias is not None:
        y = y + bias.to(wide.dtype)
    return y.to(x.dtype)


def rms_norm_fwd(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    form: RMSForm,
) -> tuple[Tensor, Tensor, Tensor]:
    """[..., D] x 2, [D] x 2 -> y [..., D], what was normalised (x, or x + residual) [..., D], rstd [N]."""
    total = x
    if residual is not None:
        total = like(x, torch.promote_types(x.dtype, residual.dtype))
    dtype = total.dtype
    if form.cast_before:
        for scale in (weight, bias):
            dtype = dtype if scale is None else torch.promote_types(dtype, scale.dtype)
    y = like(x, dtype)
    key = None
    if not torch.compiler.is_compiling():
        of_rows = _row_tiles.WALK_BLOCK, _row_tiles.LEAST_BLOCK, _triton.LANES
        constants = TILE_FWD, PER_THREAD_FWD, OF_BLOCKS_FWD, WHOLE_ROW_FWD, *of_rows
        residual_strides = None if residual is None else residual.stride()
        key = x.shape, x.stride(), residual_strides, weight is None, bias is None, form, constants
    found = _forwards.get(key)
    if found is None:
        lent = x, residual
        x, residual = rows_of(x), None if residual is None else rows_of(residual)
        found = _forward(x, residual, weight, bias, form), x.shape[0]
        if lie_alike(lent, (x, residual)):
            _forwards.keep(key, found)
    it, n = found
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    if it is not None:
        launch_ready(it, x, residual, weight, bias, y, None if residual is None else total, rstd)
    return y, total, rstd


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: RMSForm
) -> Ready | None:
    """The launch for these rows, if there are any."""
    n, d = x.shape
    if n == 0 or d == 0:
        return None
    block = tile_of_blocks(d, TILE_FWD, PER_THREAD_FWD, WHOLE_ROW_FWD, OF_BLOCKS_FWD)
    strides = row_stride(x), 0 if residual is None else row_stride(residual)
    constants = {
        "OFFSET": form.offset,
        "CAST_BEFORE": form.cast_before,
        "HAS_WEIGHT": weight is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "BLOCK_COLS": block.cols,
        "num_warps": block.warps,
    }
    if not block.rows:
        return ready(_rms_norm_fwd_walk_kernel, (n,), *strides, d, form.eps, **constants)
    grid = (cdiv(n, block.rows),)
    return ready(
        _rms_norm_fwd_kernel, grid, *strides, n, d, form.eps,
        BLOCK_ROWS=block.rows, BLOCKS=block.blocks, **constants,
    )  # fmt: skip


def rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rstd: Tensor,
    dsum: Tensor | None,
    form: RMSForm,
    wanted: Wanted,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy, x [..., D], weight, bias [D], rstd [N], dsum [..., D] -> dx [..., D], dweight [D], dbias [D], those wanted.

    Of bias only the dtype counts, and of dsum, which is added to dx, nothing where no dx is wanted. ``overwrite``: dx
    is dy, where it can be.
    """
    d = x.shape[-1]
    nothing = x.numel() == 0
    make = torch.zeros_like if nothing else torch.empty_like
    dx = None
    if wanted.dx:
        dx = dy if overwrite and can_take(dy, x.dtype) else like(x)
    dweight = make(weight) if wanted.dweight else None
    dbias = make(bias) if wanted.dbias else None
    if nothing or not any(wanted):
        return dx, dweight, dbias
    key = None
    if not torch.compiler.is_compiling():
        grid = WARPS_PER_MULTIPROCESSOR, STAGES_BWD, _triton.LANES
        of_rows = _row_tiles.WALK_BLOCK, _row_tiles.LEAST_BLOCK, _sums.SHARED_FROM
        constants = TILE_BWD, PER_THREAD_BWD, OF_BLOCKS_BWD, WHOLE_ROW_BWD, *of_rows, *grid
        of_dsum = None if dsum is None else (dsum.stride(), dsum.dtype)
        places = x.shape, x.stride(), x.dtype, x.device, dy.stride(), dy.dtype, of_dsum
        key = places, weight is None, wanted, form, constants
    found = _backwards.get(key)
    if found is None:
        lent = dy, x, dsum
        dy, x, dsum = rows_of(dy), rows_of(x), None if dsum is None else rows_of(dsum)
        found = _backward(dy, x, weight, dsum, form, wanted)
        if lie_alike(lent, (dy, x, dsum)):
            _backwards.keep(key, found)
    it, rows, n_sharers = found
    made = [vector for vector in (dweight, dbias) if vector is not None]
    # [1 or 2, rows, D]
    partial = partials(x, rows, d, vectors=len(made), n_sharers=n_sharers)
    dweights = partial if wanted.dweight else None
    dbiases = None if not wanted.dbias else partial[rows * d :] if wanted.dweight else partial
    launch_ready(it, dy, x, weight, rstd, dsum, dx, dweights, dbiases)
    if made:
        sum_partials(partial, rows, d, *made)
    return dx, dweight, dbias


def _backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, dsum: Tensor | None, form: RMSForm, wanted: Wanted
) -> tuple[Ready, int, int]:
    """The launch for these rows, of which there are some; how many rows of sums it leaves, and of how many programs."""
    n, d = x.shape
    # a second row of sums takes as many registers again
    widest = WHOLE_ROW_BWD // 2 if wanted.dbias else WHOLE_ROW_BWD
    block = tile_of_blocks(d, TILE_BWD, PER_THREAD_BWD, widest, OF_BLOCKS_BWD)
    itemsizes = dy.itemsize + x.itemsize + (0 if dsum is None else dsum.itemsize)
    programs, tiles = in_turn(x, block, n, WARPS_PER_MULTIPROCESSOR, itemsizes, STAGES_BWD)
    # a program that walks adds to its row many times, and shares it with none
    n_sharers = sharers(x, programs) if block.rows else 1
    of_sums = (n_sharers,) if block.rows else ()
    if block.rows:
        tiles["BLOCKS"] = block.blocks
    it = ready(
        _rms_norm_bwd_kernel if block.rows else _rms_norm_bwd_walk_kernel, (programs,),
        row_stride(dy), row_stride(x), 0 if dsum is None else row_stride(dsum), n, d, *of_sums,
        OFFSET=form.offset, CAST_BEFORE=form.cast_before, HAS_WEIGHT=weight is not None, HAS_DSUM=dsum is not None,
        WANTS_DX=wanted.dx, WANTS_DWEIGHT=wanted.dweight, WANTS_DBIAS=wanted.dbias, **tiles,
    )  # fmt: skip
    return it, cdiv(programs, n_sharers), n_sharers


class RMSNormFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten: a view that autograd sees is a node forward and one backward."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor | None, bias: Tensor | None, form: RMSForm, overwrite: bool) -> Tensor:
        y, _, rstd = rms_norm_fwd(x, None, weight, bias, form)
        ctx.save_for_backward(x, weight, bias, rstd)
        ctx.form, ctx.overwrite = form, overwrite
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, bias, rstd = ctx.saved_tensors
        wanted = Wanted(*ctx.needs_input_grad[:3])
        dx, dweight, dbias = rms_norm_bwd(dy, x, weight, bias, rstd, None, ctx.form, wanted, ctx.overwrite)
        if ctx.overwrite:
            note_taken((dy,), (dx,))
        return dx, dweight, dbias, None, None


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    *,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
    overwrite_grad: bool = False,
) -> Tensor:
    """``(offset + weight) * x / rms(x) + bias`` over the last dimension: x [..., D], weight and bias [D] or None.

    ``rms(x) = sqrt(mean(x^2) + eps)``; ``offset``: what is added to each weight (Gemma's 1). The result has the
    promoted dtype of x, weight and bias with ``cast="before_weight"``, x's with ``"after_weight"``.
    ``overwrite_grad``: the backward may write x's gradient over the result's, whose values are lost. Only where that
    gradient is this call's alone, as one that a matrix product has made; an addition hands one tensor to both its
    summands. A gradient that has gaps or another dtype than x is left as it is. A second backward is right if the
    gradient is made anew, and autograd's error if it was saved. A compiled graph, which sees to its own memory, makes
    no use of it.
    """
    check_per_column("rms_norm", x, weight=weight, bias=bias)
    check_cast("rms_norm", cast)
    check_numbers("rms_norm", eps=eps, offset=offset)
    if not runs_kernels(x, weight, bias):
        return rms_norm_reference(x, weight, bias=bias, eps=eps, offset=offset, cast=cast)
    check_dtypes("rms_norm", x=x, weight=weight, bias=bias)
    weight, bias = contiguous(weight), contiguous(bias)
    form = RMSForm(eps, offset, cast == "before_weight")
    if torch.compiler.is_compiling():
        # dynamo 2.11 can't hold sizes of what is made of x inside the Function; and here views cost nothing
        return RMSNormFunction.apply(rows_of(x), weight, bias, form, False).view(x.shape)
    return RMSNormFunction.apply(x, weight, bias, form, overwrite_grad)
