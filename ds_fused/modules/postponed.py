"""Values that are not computed before they are needed, in forwards that nobody rewrites.

The original's own code runs. What some of its calls return is a ``Postponed``: an operator that completes a fused op
is that op, and any other use of the value is one of the tensor it stands for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Postponed:
    """Stands for a tensor. A plain object: torch.compile traces through it."""

    __slots__ = ()

    def real(self) -> Tensor:
        """The tensor."""
        raise NotImplementedError

    def times(self, other: object) -> Any:
        """The product with a tensor or a number."""
        return self.real() * computed(other)

    def plus(self, other: object) -> Any:
        """The sum with a tensor or a number."""
        return self.real() + computed(other)

    def __mul__(self, other: object) -> Any:
        return self.times(other)

    def __rmul__(self, other: object) -> Any:
        return self.times(other)

    def __add__(self, other: object) -> Any:
        return self.plus(other)

    def __radd__(self, other: object) -> Any:
        return self.plus(other)

    def __getattr__(self, name: str) -> Any:
        # dunder look-ups are questions about the type, and our own slots are set in __init__
        if name.startswith("__") or name in type(self).__slots__:
            raise AttributeError(name)
        return getattr(self.real(), name)

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if len(args) == 2 and not kwargs and (func in _PRODUCTS or func in _SUMS):
            first, second = args if isinstance(args[0], Postponed) else (args[1], args[0])
            # not by the operators, which torch.compile would bring back here
            return first.times(second) if func in _PRODUCTS else first.plus(second)
        return func(*(computed(x) for x in args), **{name: computed(x) for name, x in kwargs.items()})


# `x * postponed`, `x + postponed` and the functions for them; which of them arrives differs between eager mode and
# torch.compile
_PRODUCTS = (torch.mul, torch.multiply, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, operator.mul)
_SUMS = (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, operator.add)


def computed(value: Any) -> Any:
    """The value with the real tensor for each that is postponed, in tuples and lists too."""
    if isinstance(value, Postponed):
        return value.real()
    return type(value)(map(computed, value)) if type(value) in (list, tuple) else value


def _on_real(function: Callable) -> Callable:
    def on_real(self: Postponed, *args: Any) -> Any:
        return function(self.real(), *args)

    return on_real


def _reflected(function: Callable) -> Callable:
    def reflected(self: Postponed, other: Any) -> Any:
        return function(other, self.real())

    return reflected


# Python looks operators up on the type, past __getattr__
for _name in ("sub", "truediv", "pow", "matmul"):
    _function = getattr(operator, f"__{_name}__")
    setattr(Postponed, f"__{_name}__", _on_real(_function))
    setattr(Postponed, f"__r{_name}__", _reflected(_function))
for _name in ("lt", "le", "gt", "ge", "getitem", "neg", "iadd", "isub", "imul", "itruediv"):
    setattr(Postponed, f"__{_name}__", _on_real(getattr(operator, f"__{_name}__")))
