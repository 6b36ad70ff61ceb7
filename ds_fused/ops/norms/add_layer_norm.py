"""Residual add and layer norm in one pass: ``sum = x + residual``, ``y = layer_norm(sum)``; both are returned.

The sum is rounded to its dtype before it is normalised, so that y is what layer_norm makes of the returned sum.

Saved for backward: the sum (the next residual is made of it anyway), weight, and mean and 1/std in fp32 per row.
Traffic per element: forward 2 reads + 2 writes, backward 3 reads + 1 write (one gradient serves x and residual), plus
the partial sums of layer_norm, whose kernels these are.

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._triton import check_dtypes, norm_dtype, rows_of, runs_kernels
from ds_fused.ops.norms._norms import Wanted, check_per_column, contiguous
from ds_fused.ops.norms.layer_norm import layer_norm_bwd, layer_norm_fwd, layer_norm_reference


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    total = x + residual
    return layer_norm_reference(total, weight, bias, eps=eps), total


class AddLayerNormFunction(torch.autograd.Function):
    """Autograd around layer_norm's launchers."""

    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, rstd = layer_norm_fwd(x, residual, weight, bias, eps, dtype)
        ctx.save_for_backward(total, weight, bias, mean, rstd)
        ctx.dtypes = x.dtype, residual.dtype
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            ctx.mark_non_differentiable(total)
        # as in add_rms_norm
        ctx.set_materialize_grads(False)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor | None, dsum: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, bias, mean, rstd = ctx.saved_tensors
        wants_dx, wants_dresidual, wants_dweight, wants_dbias = ctx.needs_input_grad[:4]
        if dy is None:  # nothing was made of y
            gradient, dweight, dbias = dsum, None, None
        else:
            wanted = Wanted(
                wants_dx or wants_dresidual, weight is not None and wants_dweight, bias is not None and wants_dbias
            )
            gradient, dweight, dbias = layer_norm_bwd(dy, dsum, total, weight, bias, mean, rstd, wanted)
        dx, dresidual = (
            gradient.to(dtype) if wants and gradient is not None else None
            for wants, dtype in zip((wants_dx, wants_dresidual), ctx.dtypes, strict=True)
        )
        return dx, dresidual, dweight, dbias, None, None


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``(layer_norm(x + residual), x + residual)``: x and residual [..., D] of one shape, weight and bias [D] or None.

    The sum has the promoted dtype of both; y has the sum's, but fp32 where PyTorch's has: under the autocast of a GPU.
    """
    if x.shape != residual.shape:
        raise ValueError(f"add_layer_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} must have one shape")
    check_per_column("add_layer_norm", x, weight=weight, bias=bias)
    check_numbers("add_layer_norm", eps=eps)
    if not runs_kernels(x, residual, weight, bias):
        return add_layer_norm_reference(x, residual, weight, bias, eps=eps)
    check_dtypes("add_layer_norm", x=x, residual=residual, weight=weight, bias=bias)
    weight, bias = contiguous(weight), contiguous(bias)
    dtype = norm_dtype(x, torch.promote_types(x.dtype, residual.dtype))
    if torch.compiler.is_compiling():  # as in rms_norm
        rows = AddLayerNormFunction.apply(rows_of(x), rows_of(residual), weight, bias, eps, dtype)
        return tuple(y.view(x.shape) for y in rows)
    return AddLayerNormFunction.apply(x, residual, weight, bias, eps, dtype)
