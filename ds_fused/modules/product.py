"""The product of an activation, postponed: ``act(gate) * up`` becomes one op inside forwards that nobody rewrites.

    gate, up = linear(x, self.gate_up_proj[i]).chunk(2, -1)
    y = linear(self.act_fn(gate) * up, self.down_proj[i])

The original's own code runs. Only what its activation returns is another thing: an ``Activated``, which does not
compute until it is multiplied, and is then ``glu``. Any other use of it is the activation's real output, by the real
activation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.ops import glu

# under which of these names layers keep their activation
ACT_NAMES = ("act_fn", "activation_fn", "act", "activation")


class Activated:
    """``act(gate)``, not computed yet. A plain object: torch.compile traces through it."""

    __slots__ = ("act", "fused_act", "gate")

    def __init__(self, act: Callable[[Tensor], Tensor], fused_act: str, gate: Tensor) -> None:
        self.act = act
        self.fused_act = fused_act
        self.gate = gate

    def real(self) -> Tensor:
        """What the activation returns."""
        return self.act(self.gate)

    def times(self, up: object) -> Tensor:
        """The product: ``glu`` where up is a tensor like gate."""
        if isinstance(up, Tensor) and up.shape == self.gate.shape and up.dtype == self.gate.dtype:
            return glu(self.gate, up, self.fused_act)
        return self.real() * (up.real() if isinstance(up, Activated) else up)

    def __mul__(self, up: object) -> Tensor:
        return self.times(up)

    def __rmul__(self, up: object) -> Tensor:
        return self.times(up)

    def __getattr__(self, name: str) -> Any:
        # dunder look-ups are questions about the type, and our own slots are set in __init__
        if name.startswith("__") or name in Activated.__slots__:
            raise AttributeError(name)
        return getattr(self.real(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and len(args) == 2 and not kwargs:
            first, second = args
            # not by `*`, which torch.compile would bring back here
            return first.times(second) if isinstance(first, cls) else second.times(first)
        return func(*(_computed(x) for x in args), **{name: _computed(x) for name, x in kwargs.items()})


# `x * activated` and the functions for it; which of them arrives differs between eager mode and torch.compile
_PRODUCTS = (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, operator.mul)


def _computed(value: Any) -> Any:
    if isinstance(value, Activated):
        return value.real()
    return type(value)(map(_computed, value)) if type(value) in (list, tuple) else value


def _on_real(function: Callable) -> Callable:
    def computed(self: Activated, *args: Any) -> Any:
        return function(self.real(), *args)

    return computed


def _reflected(function: Callable) -> Callable:
    def computed(self: Activated, other: Any) -> Any:
        return function(other, self.real())

    return computed


# Python looks operators up on the type, past __getattr__
for _name in ("add", "sub", "truediv", "pow", "matmul"):
    _function = getattr(operator, f"__{_name}__")
    setattr(Activated, f"__{_name}__", _on_real(_function))
    setattr(Activated, f"__r{_name}__", _reflected(_function))
for _name in ("lt", "le", "gt", "ge", "getitem", "neg"):
    setattr(Activated, f"__{_name}__", _on_real(getattr(operator, f"__{_name}__")))


class Product:
    """The original forward, in which the product of the activation is fused."""

    fused_act: str

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module], act_name: str) -> dict[str, object]:
        """A property in front of the layer's activation."""
        return {act_name: property(lambda self: _activation(self, act_name))}


def _activation(layer: nn.Module, act_name: str) -> Callable[[Tensor], Activated]:
    act = layer._modules[act_name] if act_name in layer._modules else layer.__dict__[act_name]

    def activated(gate: Tensor) -> Activated:
        return Activated(act, layer.fused_act, gate)

    return activated
