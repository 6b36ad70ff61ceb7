"""Root-mean-square norm whose result is scaled and shifted by the sample: ``y = (1 + scale) * rms_norm(x) + shift``.

As diffusion transformers condition their blocks (adaptive norms): scale and shift come from an embedding of the time
step, one vector a sample, shared by the rows of that sample; or one a row. ``weight``, ``offset`` and ``cast`` are
rms_norm's. Idea: Peebles and Xie, "Scalable Diffusion Models with Transformers" (2023).

Saved for backward: x, weight, scale, and 1/rms in fp32 per row.
Traffic per element: forward 1 read + 1 write, backward 2 reads + 1 write; where scale and shift are as large as x, one
read more for each, forward, and one read and two writes more, backward. Sums over the rows of a modulation are fp32
partial sums of each program, or of two, added up in a fixed order (same input, same bits: _sums.py).

Sizes: N rows (every leading dimension, flattened), M modulations of R rows each (N = M * R), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._row_tiles import in_turn, tile_of_blocks
from ds_fused.ops.common._sums import SUM_COLS, partials, sharers, sum_partials
from ds_fused.ops.common._triton import (
    cdiv,
    check_dtypes,
    like,
    row_stride,
    rows_of,
    runs_kernels,
)
from ds_fused.ops.norms._modulated_rms_norm_kernels import (
    _modulated_rms_norm_bwd_kernel,
    _modulated_rms_norm_fwd_kernel,
    _modulated_rms_norm_sums_kernel,
)
from ds_fused.ops.norms._norms import RMSForm, check_cast, check_per_column, contiguous
from ds_fused.ops.norms._wide_modulated_rms_norm import (
    _modulated_rms_norm_bwd_walk_kernel,
    _modulated_rms_norm_fwd_walk_kernel,
)
from ds_fused.ops.norms.rms_norm import WHOLE_ROW_FWD, rms_norm_reference

# as in rms_norm, whose backward with a bias keeps as many sums
WHOLE_ROW_BWD = 8192
# elements of a tile when a row is narrower (as many rows as fit), and of a thread; of a thread at most where rows are
# several blocks. On an H100, ms of 12x4096x3072 forward: 0.206; where such a row is one block of 4096, 0.237
TILE_FWD, PER_THREAD_FWD, OF_BLOCKS_FWD = 1024, 16, 24
TILE_BWD, PER_THREAD_BWD, OF_BLOCKS_BWD = 2048, 16, 20
# the backward's persistent grid, and the tiles of a program that are in flight. Backward: 0.316; rows of one block, in
# 8 warps, 0.326, in 16 warps 0.386, and with 4 tiles 0.336
WARPS_PER_MULTIPROCESSOR = 16
STAGES_BWD = 3
# rows of partial sums that are added at a time: of one modulation there are few
SUM_ROWS = 32
# modulations that one program adds up, one after the other
MOST_IN_TURN = 8
# programs beside each other, of a dimension of the grid that has 65535 at most
MOST_BESIDE = 4096


def modulated_rms_norm_reference(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    y = (1.0 + scale) * rms_norm_reference(x, weight, eps=eps, offset=offset, cast=cast)
    return y if shift is None else y + shift


def modulated_rms_norm_fwd(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    form: RMSForm,
) -> tuple[Tensor, Tensor]:
    """x [..., D], weight [D], scale, shift [..., D] of M rows -> y [..., D], rstd [N]."""
    dtype = torch.promote_types(x.dtype, scale.dtype)
    dtypes = ([weight] if form.cast_before else []) + [shift]
    for t in dtypes:
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    y = like(x, dtype)
    x, scale, shift = rows_of(x), rows_of(scale), None if shift is None else rows_of(shift)
    n, d = x.shape
    rstd = torch.empty(n, dtype=torch.float32, device=x.device)
    if n == 0 or d == 0:
        return y, rstd
    block = tile_of_blocks(d, TILE_FWD, PER_THREAD_FWD, WHOLE_ROW_FWD, OF_BLOCKS_FWD)
    tensors = (x, weight, scale, shift, y, rstd)
    strides = (row_stride(x), row_stride(scale), 0 if shift is None else row_stride(shift))
    constants = {
        "OFFSET": form.offset,
        "CAST_BEFORE": form.cast_before,
        "HAS_WEIGHT": weight is not None,
        "HAS_SHIFT": shift is not None,
        "BLOCK_COLS": block.cols,
        "num_warps": block.warps,
    }
    n_rows = n // scale.shape[0]
    if block.rows:
        launch(
            _modulated_rms_norm_fwd_kernel, (cdiv(n, block.rows),),
            *tensors, *strides, n_rows, n, d, form.eps,
            BLOCK_ROWS=block.rows, BLOCKS=block.blocks, **constants,
        )  # fmt: skip
    else:
        launch(_modulated_rms_norm_fwd_walk_kernel, (n,), *tensors, *strides, n_rows, d, form.eps, **constants)
    return y, rstd


def modulated_rms_norm_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None,
    rstd: Tensor,
    form: RMSForm,
    wants: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """dy, x [..., D], weight [D], scale, shift [..., D] of M rows, rstd [N] -> gradients of x, weight, scale and shift.

    Those that are wanted. Of shift only shape and dtype count.
    """
    nothing = x.numel() == 0
    dx, dweight, dscale, dshift = (
        (torch.zeros_like if nothing else like)(t) if wanted else None
        for t, wanted in zip((x, weight, scale, shift), wants, strict=True)
    )
    if nothing or not any(wants):
        return dx, dweight, dscale, dshift
    dy, x, scale = rows_of(dy), rows_of(x), rows_of(scale)
    (n, d), m = x.shape, scale.shape[0]
    per_row = m == n
    groups = 1 if per_row else m
    block = tile_of_blocks(d, TILE_BWD, PER_THREAD_BWD, WHOLE_ROW_BWD, OF_BLOCKS_BWD)
    itemsizes = dy.itemsize + x.itemsize + (scale.itemsize if per_row else 0)
    programs, tiles = in_turn(x, block, n // groups, WARPS_PER_MULTIPROCESSOR, itemsizes, STAGES_BWD, groups)
    wants_products = wants[1] or (wants[2] and not per_row)
    wants_sums = wants[3] and not per_row
    # programs of one group share a row; one that walks adds to its own many times
    n_sharers = sharers(x, groups * programs) if block.rows and programs > 1 else 1
    parts = cdiv(programs, n_sharers)
    products = sums = None
    if wants_products or wants_sums:
        # [2, groups * parts, D]
        products = partials(x, groups * parts, d, n_sharers=n_sharers)
        sums = products[groups * parts * d :]
    forms = {"OFFSET": form.offset, "CAST_BEFORE": form.cast_before, "HAS_WEIGHT": weight is not None}
    if block.rows:
        tiles["BLOCKS"] = block.blocks
    of_sums = (n_sharers,) if block.rows else ()
    launch(
        _modulated_rms_norm_bwd_kernel if block.rows else _modulated_rms_norm_bwd_walk_kernel, (groups * programs,),
        dy, x, weight, scale, rstd, dx, dscale if per_row else None, dshift if per_row else None, products, sums,
        row_stride(dy), row_stride(x), row_stride(scale), n // groups, programs, d,
        *of_sums, PER_ROW=per_row, WANTS_DX=wants[0], WANTS_PRODUCTS=wants_products, WANTS_DSCALE=wants[2],
        WANTS_DSHIFT=wants[3], **forms, **tiles,
    )  # fmt: skip
    if per_row:
        if wants[1]:
            sum_partials(products, parts, d, dweight)
        return dx, dweight, dscale, dshift
    if any(wants[1:]):
        # one launch less, where one program is not long at it; of more than so many each takes several
        turns = 1 if m <= MOST_IN_TURN else min(m, MOST_BESIDE)
        one = turns == 1 or not wants[1]
        dweights = dweight if one else torch.empty((turns, d), dtype=torch.float32, device=x.device)
        launch(
            _modulated_rms_norm_sums_kernel, (cdiv(d, SUM_COLS), turns),
            products, sums, weight, scale, dscale, dshift, dweights, row_stride(scale), m, parts, d,
            **forms, WANTS_DWEIGHT=wants[1], WANTS_DSCALE=wants[2], WANTS_DSHIFT=wants[3],
            BLOCK_ROWS=SUM_ROWS, BLOCK_COLS=SUM_COLS, num_warps=4,
        )  # fmt: skip
        if not one:
            sum_partials(dweights, turns, d, dweight)
    return dx, dweight, dscale, dshift


class ModulatedRMSNormFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor | None,
        scale: Tensor,
        shift: Tensor | None,
        form: RMSForm,
    ) -> Tensor:
        y, rstd = modulated_rms_norm_fwd(x, weight, scale, shift, form)
        ctx.save_for_backward(x, weight, scale, shift, rstd)
        ctx.form = form
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, shift, rstd = ctx.saved_tensors
        wants = ctx.needs_input_grad[:4]
        return *modulated_rms_norm_bwd(dy, x, weight, scale, shift, rstd, ctx.form, wants), None


def _leading(x: Tensor, name: str, modulation: Tensor) -> int | None:
    """How many leading dimensions of x a scale or shift has, one row for all behind them; None where it is not so."""
    sizes, own = x.shape, modulation.shape
    missing = len(sizes) - len(own)
    fits = missing >= 0 and len(own) > 0 and own[-1] == sizes[-1]
    leading, shared, apart = 0, missing > 0 and any(size != 1 for size in sizes[:missing]), False
    for place in range(missing, len(sizes) - 1):
        size = own[place - missing]
        if size != sizes[place]:
            fits, shared = fits and size == 1, True
        elif size != 1:
            leading, apart = place + 1, apart or shared
    if not fits:
        raise ValueError(
            f"modulated_rms_norm: {name} {tuple(own)} must have the columns of x {tuple(sizes)}, and of its other "
            f"dimensions each as many as x or one"
        )
    return None if apart else leading


def _of_as_many_rows(x: Tensor, scale: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each one row for as many rows of x; what is copied for that autograd adds up again."""
    n = _leading(x, "scale", scale)
    if shift is None or shift.shape == scale.shape:
        if n is not None:
            return scale, shift
    else:
        of_shift = _leading(x, "shift", shift)
        n = None if n is None or of_shift is None else max(n, of_shift)
    n = x.ndim - 1 if n is None else n
    sizes = (*x.shape[:n], *[1] * (x.ndim - 1 - n), x.shape[-1])
    return scale.expand(sizes), None if shift is None else shift.expand(sizes)


def modulated_rms_norm(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> Tensor:
    """``(1 + scale) * rms_norm(x, weight) + shift`` over the last dimension.

    x [..., D], weight [D] or None; scale and shift as PyTorch broadcasts them: [B, 1, D] beside x [B, T, D] is one for
    each sample, [D] one for all rows, x's shape one for each row. Those that are neither are copied to x's shape.
    The result has the promoted dtype of rms_norm's, scale and shift.
    """
    check_per_column("modulated_rms_norm", x, weight=weight)
    rows = _of_as_many_rows(x, scale, shift)
    check_cast("modulated_rms_norm", cast)
    check_numbers("modulated_rms_norm", eps=eps, offset=offset)
    if not runs_kernels(x, weight, scale, shift):
        return modulated_rms_norm_reference(x, weight, scale, shift, eps=eps, offset=offset, cast=cast)
    check_dtypes("modulated_rms_norm", x=x, weight=weight, scale=scale, shift=shift)
    scale, shift = rows
    weight = contiguous(weight)
    form = RMSForm(eps, offset, cast == "before_weight")
    if torch.compiler.is_compiling():
        # as in rms_norm
        scale, shift = rows_of(scale), None if shift is None else rows_of(shift)
        return ModulatedRMSNormFunction.apply(rows_of(x), weight, scale, shift, form).view(x.shape)
    return ModulatedRMSNormFunction.apply(x, weight, scale, shift, form)
