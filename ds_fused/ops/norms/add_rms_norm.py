"""A residual connection and the norm behind it: ``sum = x + residual``, ``y = rms_norm(sum)``, one pass each way.

The sum is rounded to its dtype before it is normalised, as x + residual of PyTorch is, and is the second result: the
residual of the next connection. Options and casts are rms_norm's, and so are the kernels (rms_norm.py).

Saved for backward: the sum (which lives on as the residual anyway), weight, and 1/rms in fp32 per row.
Traffic per element: forward 2 reads + 2 writes, backward 3 reads (dy, dsum, sum) + 1 write, plus the partial sums of
dweight.

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._triton import check_dtypes, rows_of, runs_kernels
from ds_fused.ops.norms._norms import RMSForm, Wanted, check_cast, check_per_column, contiguous
from ds_fused.ops.norms.rms_norm import rms_norm_bwd, rms_norm_fwd, rms_norm_reference


def add_rms_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    total = x + residual
    return rms_norm_reference(total, weight, eps=eps, offset=offset, cast=cast), total


class AddRMSNormFunction(torch.autograd.Function):
    """Autograd around rms_norm's launchers."""

    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor, weight: Tensor | None, form: RMSForm) -> tuple[Tensor, Tensor]:
        y, total, rstd = rms_norm_fwd(x, residual, weight, None, form)
        ctx.save_for_backward(total, weight, rstd)
        ctx.form, ctx.dtypes = form, (x.dtype, residual.dtype)
        # the last sum of a model may go nowhere: no zeros are made, read and added then
        ctx.set_materialize_grads(False)
        if not any(ctx.needs_input_grad[:2]):
            ctx.mark_non_differentiable(total)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(
        ctx, dy: Tensor | None, dsum: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        total, weight, rstd = ctx.saved_tensors
        wants_dx = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        if dy is None:
            dx, dweight = dsum, None
        else:
            wanted = Wanted(wants_dx, ctx.needs_input_grad[2], False)
            dsum = dsum if wants_dx else None
            dx, dweight, _ = rms_norm_bwd(dy, total, weight, None, rstd, dsum, ctx.form, wanted)
        # x and residual get one tensor, as those of PyTorch's own + do: autograd sees that two hold it, and neither
        # adds to it in place nor lets it become two .grad. A copy would cost a quarter of the backward's traffic
        given = [
            dx.to(dtype) if dx is not None and wants else None
            for dtype, wants in zip(ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
        ]
        return *given, dweight, None


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    *,
    eps: float = 1e-6,
    offset: float = 0.0,
    cast: str = "before_weight",
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(x + residual, weight), x + residual)``: x and residual [..., D] of one shape, weight [D] or None.

    ``eps``, ``offset`` and ``cast`` are rms_norm's. As with ``x + residual`` itself, the gradients of x and of residual
    may be one tensor: a hook must not write in it.
    """
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} must have one shape")
    check_per_column("add_rms_norm", x, weight=weight)
    check_cast("add_rms_norm", cast)
    check_numbers("add_rms_norm", eps=eps, offset=offset)
    if not runs_kernels(x, residual, weight):
        return add_rms_norm_reference(x, residual, weight, eps=eps, offset=offset, cast=cast)
    check_dtypes("add_rms_norm", x=x, residual=residual, weight=weight)
    weight = contiguous(weight)
    form = RMSForm(eps, offset, cast == "before_weight")
    if torch.compiler.is_compiling():  # as in rms_norm
        rows = AddRMSNormFunction.apply(rows_of(x), rows_of(residual), weight, form)
        return tuple(y.view(x.shape) for y in rows)
    return AddRMSNormFunction.apply(x, residual, weight, form)
