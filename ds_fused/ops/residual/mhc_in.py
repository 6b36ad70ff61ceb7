"""From N residual streams into a layer: their coefficients, and what the layer reads of them, as one op.

``pre, post, res = mhc_coefficients(x, ...)`` and ``y = mhc_pre(x, pre)``: see there for what
they compute. x is handed on beside y, for mhc_post_res behind the layer, so that its gradient comes back
here: in backward the three gradients of x are one sum in registers, where autograd would write three and add them
twice.

Saved for backward: x, weight, bias, scale and pre, and in fp32 mix and 1/rms.
Traffic per token, in rows of C: forward 2 N reads + 1 write; backward 3 N + 2 reads + N writes, where the ops by
themselves and autograd's sums take 6 N + 1 reads and 4 N writes.

Sizes: T tokens (every leading dimension, flattened), N streams, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._triton import check_dtypes, runs_kernels
from ds_fused.ops.residual.mhc_coefficients import (
    Options,
    Through,
    check_coefficients,
    mhc_coefficients,
    mhc_coefficients_bwd,
    mhc_coefficients_fwd,
    mhc_coefficients_reference,
)
from ds_fused.ops.residual.mhc_pre import (
    mhc_pre,
    mhc_pre_bwd,
    mhc_pre_fwd,
    mhc_pre_reference,
)


def mhc_in_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_factor: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    options = Options(iterations, eps, pre_eps, sinkhorn_eps, post_factor)
    pre, post, res = mhc_coefficients_reference(x, weight, bias, scale, **options._asdict())
    return mhc_pre_reference(x, pre), post, res, x.view_as(x)


class MHCInFunction(torch.autograd.Function):
    """Autograd around the launchers of both ops."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, *options: float) -> tuple[Tensor, ...]:
        options = Options(*options)
        pre, post, res, mix, rstd = mhc_coefficients_fwd(x, weight, bias, scale, options)
        ctx.save_for_backward(x, weight, bias, scale, mix, rstd, pre)
        ctx.options = options
        ctx.set_materialize_grads(False)
        streams = x.view_as(x)
        if not ctx.needs_input_grad[0]:
            ctx.mark_non_differentiable(streams)
        return mhc_pre_fwd(x, pre), post, res, streams

    @staticmethod
    @once_differentiable
    def backward(
        ctx, dy: Tensor | None, dpost: Tensor | None, dres: Tensor | None, dstreams: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, *saved, pre = ctx.saved_tensors
        dpre = None if dy is None else mhc_pre_bwd(dy, x, pre, (False, True))[1]
        gradients = mhc_coefficients_bwd(
            dpre, dpost, dres, x, *saved, ctx.options, ctx.needs_input_grad[:4], Through(dy, pre, dstreams)
        )
        return *gradients, *[None] * len(ctx.options)


def mhc_in(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_factor: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a layer reads of streams x [..., N, C], [..., C]; post [..., N] and res [..., N, N] in fp32; and x.

    ``y = sum_i pre_i x_i``; pre, post, res, the arguments and errors are those of mhc_coefficients. A layer begins with
    ``y, post, res, x = mhc_in(x, ...)``, ends with ``mhc_post_res(x, layer(y), post, res)``.
    """
    options = Options(iterations, eps, pre_eps, sinkhorn_eps, post_factor)
    check_coefficients("mhc_in", x, weight, bias, scale, options)
    if not runs_kernels(x, weight, bias, scale):
        return mhc_in_reference(x, weight, bias, scale, **options._asdict())
    check_dtypes("mhc_in", x=x, weight=weight, bias=bias, scale=scale)
    weight, bias, scale = weight.contiguous(), bias.contiguous(), scale.contiguous()
    if torch.compiler.is_compiling():
        # dynamo holds no Function that hands an input on
        pre, post, res = mhc_coefficients(x, weight, bias, scale, **options._asdict())
        return mhc_pre(x, pre), post, res, x
    return MHCInFunction.apply(x, weight, bias, scale, *options)
