"""``once_differentiable``, for the backward of an op, which no kernel differentiates: a second derivative is refused.

PyTorch's own refuses it only where the upstream gradient has a graph. Where it is a constant, as that of a plain sum, a
penalty on a gradient would train with a part of its gradient missing, without a word. Refused is what differentiates a
gradient, not the gradient itself; where an op keeps nothing of its input by which autograd would find back, that too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ds_fused.ops.common._triton import waited

Gradients = Tensor | tuple[Tensor | None, ...] | None

# op -> what to pass where one graph is to have two backwards. All at once: less would lead to the next such error
FOR_TWO_BACKWARDS = {
    "linear_cross_entropy": 'grad_in_forward=False and keep_mb=0 (in JSON "fused_linear_cross_entropy": '
    '{"grad_in_forward": false, "keep_mb": 0})',
    "linear_log_probs": "keep_mb=0",
    "linear_jsd": "grad_in_forward=False",
    "linear_kl_div": "grad_in_forward=False",
    "linear_cosine": "grad_in_forward=False",
}


class _Refused(torch.autograd.Function):
    """The first n tensors, gradients, as they are; behind them what they are functions of.

    Nothing can be differentiated through it, and with those as inputs it lies on every way to them.
    """

    @staticmethod
    def forward(ctx, function: str, n: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.function = function
        return tuple(None if gradient is None else gradient.view_as(gradient) for gradient in tensors[:n])

    @staticmethod
    def backward(ctx, *_: Tensor | None) -> None:
        raise _refusal(ctx.function)


def _refusal(function: str) -> RuntimeError:
    return RuntimeError(
        f"{function}: a second derivative, but its backward is a kernel, which can be differentiated only once "
        f"(once_differentiable); for a gradient of a gradient call the op's reference in PyTorch"
    )


def _leads_to_the_first(ctx, tensors: list[Tensor]) -> bool:
    """Whether one of them is the first input that has a gradient, or is computed of it by this very function."""
    first = next(node for node, _ in ctx.next_functions if node is not None)
    return any(get_gradient_edge(x).node in (first, ctx) for x in tensors)


def _as_kernels_read(function: str, dy: Tensor) -> Tensor:
    """A gradient of an op's result: its values are those that lie in its memory, and it is one."""
    # many at a time (is_grads_batched, and torch.autograd.functional's vectorize)
    if torch._C._functorch.is_legacy_batchedtensor(dy):
        raise RuntimeError(
            f"{function}: a batch of gradients (is_grads_batched=True, vectorize=True), but its backward is a kernel, "
            "which takes one at a time; call torch.autograd.grad for each, or the op's reference in PyTorch"
        )
    if type(dy) is not Tensor:
        # as a layer's input that is split over ranks has it
        dy = waited(dy)
    # as the imaginary part of a conjugate is: its sign is turned by whoever reads it
    return dy.resolve_neg() if dy.is_neg() else dy


def once_differentiable(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """For the static method ``backward`` of an autograd Function."""

    function = backward.__qualname__.removesuffix(".backward")

    @functools.wraps(backward)
    def wrapper(ctx, *dys: Tensor | None) -> Gradients:
        if not torch.compiler.is_compiling():
            dys = [dy if dy is None else _as_kernels_read(function, dy) for dy in dys]
        # a graph of gradients is asked for by create_graph alone
        if not torch.is_grad_enabled():
            return backward(ctx, *dys)
        # before the backward, which may write over it; and has before, of which it speaks itself
        is_spent = torch.compiler.is_compiling() or getattr(ctx, "overwritten", False)
        saved = () if is_spent else ctx.saved_tensors
        with torch.no_grad():
            gradients = backward(ctx, *dys)
        if torch.compiler.is_compiling():
            return gradients  # torch.compile refuses it itself
        several = gradients if isinstance(gradients, tuple) else (gradients,)
        if all(gradient is None for gradient in several):
            return gradients
        several = [None if gradient is None else gradient.detach().requires_grad_() for gradient in several]
        of = [x for x in (*saved, *dys) if x is not None and x.requires_grad]
        if not _leads_to_the_first(ctx, of):
            raise _refusal(function)
        several = _Refused.apply(function, len(several), *several, *of)
        return several if isinstance(gradients, tuple) else several[0]

    return wrapper
