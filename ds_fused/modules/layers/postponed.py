"""Values that are not computed before they are needed, in forwards that nobody rewrites.

The original's own code runs. What some of its calls return is a ``Postponed``: an operator that completes a fused op
is that op, and any other use of the value is one of the tensor it stands for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
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


def is_number(x: object) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def operators(*names: str) -> dict[str, Callable]:
    return {name: getattr(operator, f"__{name}__") for name in names}


def run_on_real(
    cls: type,
    real: Callable[[Any], Tensor],
    functions: Mapping[str, Callable],
    reflected: Mapping[str, Callable],
    arguments: Callable[[tuple], Iterable] = tuple,
) -> None:
    """Gives a class, whose objects stand for tensors, these operators: Python looks them up on the type, past
    ``__getattr__``. ``arguments``: what becomes of an operator's other arguments.
    """
    for name, function in functions.items():
        setattr(cls, f"__{name}__", _on_real(function, real, arguments))
    for name, function in reflected.items():
        setattr(cls, f"__r{name}__", _reflected(function, real))


def _on_real(function: Callable, real: Callable[[Any], Tensor], arguments: Callable[[tuple], Iterable]) -> Callable:
    def on_real(self: Any, *args: Any) -> Any:
        return function(real(self), *arguments(args))

    return on_real


def _reflected(function: Callable, real: Callable[[Any], Tensor]) -> Callable:
    def on_real(self: Any, other: Any) -> Any:
        return function(other, real(self))

    return on_real


_BOTH_WAYS = operators("sub", "truediv", "pow", "matmul")
_ONE_WAY = operators("lt", "le", "gt", "ge", "getitem", "neg", "iadd", "isub", "imul", "itruediv")
run_on_real(Postponed, lambda postponed: postponed.real(), _BOTH_WAYS | _ONE_WAY, _BOTH_WAYS)
