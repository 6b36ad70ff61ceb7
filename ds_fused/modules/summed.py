"""Linear layers that run again and again in one backward, with the gradient of each weight added up in one sum.

    y = x @ weight.T + bias
    total += dy.T @ x                        # in fp32; autograd is handed no gradient of the weight

The product that makes a gradient adds it, without rounding it before. For a weight of P elements in 16 bits that is 2P
bytes less held, and a run moves 8P bytes, within the product, instead of 12P, of which 10P are a kernel of their own.

Sizes: N rows (every leading dimension, flattened), D columns in, E out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ds_fused.modules.exchange import Run
from ds_fused.ops._tiles import product, wide


class SummedLinears(Run):
    """While this lasts, ``F.linear`` with one of these weights is such a layer; what it can't do stays autograd's.

    ``sums``: one for each weight, None where nothing was added yet.
    """

    def __init__(self, weights: Sequence[nn.Parameter], sums: list[Tensor | None]) -> None:
        self._sums = sums
        self._places = {id(weight): i for i, weight in enumerate(weights)}

    def called(self, kind: str, function: Callable, args: tuple, named: dict) -> Any:
        # the one that was exchanged, which under ZeRO-3 is DeepSpeed's
        is_linear = getattr(F.linear, "__wrapped__", None) is function and len(args) >= 2 and not named
        place = self._places.get(id(args[1])) if is_linear else None
        if place is None or not _is_plain(*args[:2]):
            return function(*args, **named)
        x, weight, bias = (*args, None)[:3]
        return self.unseen(SummedLinear.apply, x, weight, bias, function, self._sums, place)


def _is_plain(x: Tensor, weight: nn.Parameter) -> bool:
    if not torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return False
    # a quantised or a distributed weight has a class of its own, and a hook wants to see a gradient
    is_ours = type(x) is Tensor and type(weight) is nn.Parameter and not weight._backward_hooks
    return is_ours and x.dtype == weight.dtype and x.ndim >= 2 and weight.ndim == 2 and x.numel() > 0


class SummedLinear(torch.autograd.Function):
    """x [..., D], weight [E, D], bias [E] or None -> [..., E]."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, function: Callable, sums: list[Tensor | None], place: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.place = sums, place
        return function(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        total = ctx.sums[ctx.place]
        is_first = total is None
        if is_first:
            total = ctx.sums[ctx.place] = torch.empty(weight.shape, dtype=wide(weight), device=weight.device)
        product(total, rows.t(), x.flatten(0, -2), add=not is_first)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, None, None, None
