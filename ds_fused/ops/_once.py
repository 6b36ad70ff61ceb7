"""``once_differentiable``, for the backward of an op, which no kernel differentiates: a second derivative is refused.

PyTorch's own refuses it only where the upstream gradient has a graph. Where it is a constant, as that of a plain sum, a
penalty on a gradient would train with a part of its gradient missing, without a word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

Gradients = Tensor | tuple[Tensor | None, ...] | None


class _Refused(torch.autograd.Function):
    """Gradients as they are, of which nothing can be differentiated."""

    @staticmethod
    def forward(ctx, function: str, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.function = function
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx, *_: Tensor | None) -> None:
        raise RuntimeError(
            f"{ctx.function}: a second derivative, but its backward is a kernel, which can be differentiated only once "
            f"(once_differentiable); for a gradient of a gradient call the op's reference in PyTorch"
        )


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """For the static method ``backward`` of an autograd Function."""

    @functools.wraps(backward)
    def wrapper(ctx, *dys: Tensor | None) -> Gradients:
        # a graph of gradients is asked for by create_graph alone
        if not torch.is_grad_enabled():
            return backward(ctx, *dys)
        with torch.no_grad():
            gradients = backward(ctx, *dys)
        if torch.compiler.is_compiling():
            return gradients  # torch.compile refuses it itself
        several = gradients if isinstance(gradients, tuple) else (gradients,)
        if all(gradient is None for gradient in several):
            return gradients
        several = (None if gradient is None else gradient.detach().requires_grad_() for gradient in several)
        several = _Refused.apply(backward.__qualname__.removesuffix(".backward"), *several)
        return several if isinstance(gradients, tuple) else several[0]

    return wrapper
