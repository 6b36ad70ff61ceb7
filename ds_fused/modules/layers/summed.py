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

from ds_fused.modules.memory.intercept import Run
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._tiles import product, wide


class SummedLinears(Run):
    """While this lasts, ``F.linear`` with one of these weights is such a layer; what it can't do stays autograd's.

    ``sums``: one for each weight, None where nothing was added yet. ``adds``: whether gradients go there. If not, they
    go to autograd, and only a product that nobody reads is exchanged.

    A stretch is run for its gradients. Where what it returns is the result of its last product, as it was the time
    before, that product is not computed: ``returned`` takes note of it. ``all_read``: somebody looks at each of them.
    """

    adds = True

    def __init__(self, weights: Sequence[nn.Parameter], sums: list[Tensor | None], *, all_read: bool = False) -> None:
        self._sums = sums
        self._all_read = all_read
        self._places = {id(weight): i for i, weight in enumerate(weights)}
        # how many such layers were called, what the last one gave, and which one's result is the stretch's own
        self._calls, self._last, self._unread = 0, None, None

    def __enter__(self) -> None:
        self._calls, self._last = 0, None
        super().__enter__()

    def called(self, kind: str, function: Callable, args: tuple, named: dict) -> Any:
        # the one that was exchanged, which under ZeRO-3 is DeepSpeed's
        is_linear = getattr(F.linear, "__wrapped__", None) is function and len(args) >= 2 and not named
        place = self._places.get(id(args[1])) if is_linear else None
        if place is None or not _is_plain(*args[:2]):
            return function(*args, **named)
        self._calls += 1
        is_read = self._calls != self._unread
        if is_read and not self.adds:
            return function(*args, **named)
        x, weight, bias = (*args, None)[:3]
        sums = self._sums if self.adds else None
        y = self._last = self.unseen(SummedLinear.apply, x, weight, bias, function if is_read else None, sums, place)
        return y

    def returned(self, y: Tensor) -> None:
        """What the stretch has made."""
        last, self._last = self._last, None
        if self._all_read:
            return
        if y is last:
            self._unread = self._calls
        elif self._calls == self._unread:
            raise RuntimeError("tiled: the last product of a tile was its result in one tile, and is read in another")


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
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        function: Callable | None,  # None: nobody reads the result
        sums: list[Tensor | None] | None,  # None: autograd has the gradient
        place: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sums, ctx.place = sums, place
        return x.new_empty(*x.shape[:-1], weight.shape[0]) if function is None else function(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        dweight = None
        if ctx.sums is None:
            dweight = rows.t() @ x.flatten(0, -2)
        else:
            total = ctx.sums[ctx.place]
            is_first = total is None
            if is_first:
                total = ctx.sums[ctx.place] = torch.empty(weight.shape, dtype=wide(weight), device=weight.device)
            product(total, rows.t(), x.flatten(0, -2), add=not is_first)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias, None, None, None
