"""Attention layers: their own forward, with its module-level rotary functions exchanged for the fused op.

The forward that runs is the original's code object over a copy of its globals in which those names are other functions:
per instance, so that a stock model in the same process stays stock. The copy is taken once for each class: of what is
patched in the original's module later only the rotary functions themselves are seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn

from ds_fused.modules.layers.postponed import computed
from ds_fused.modules.layers.qk_norm import with_waiting_norms
from ds_fused.modules.layers.rotary import Turn, fused_rotary

WORD = "apply_rotary"  # in the names of all such functions


class Rope:
    """The original forward with fused rotary functions."""

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module], *turns: tuple[str, Turn]) -> dict[str, object]:
        """``forward`` made from the original's code; ``turns``: name of a function, how it turns."""
        return {"forward": exchanged(cls.forward, fused_functions(cls, turns))}


class NormedRope:
    """The original forward with fused rotary functions, which norms of q and k wait for."""

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module], norms: tuple[str, ...], *turns: tuple[str, Turn]) -> dict[str, object]:
        """``norms``: names of the children that wait."""
        fused = exchanged(cls.forward, fused_functions(cls, turns))
        return {"forward": with_waiting_norms(fused, cls.forward, norms)}


def fused_functions(cls: type[nn.Module], turns: Iterable[tuple[str, Turn]]) -> dict[str, Callable]:
    """Name -> what stands where the rotary function of that name stood."""
    stock = rotary_functions(cls)
    # somebody may have patched the forward since, so that it calls none
    return {
        name: _unless_patched(_caller(cls.forward).__globals__, name, turn) for name, turn in turns if name in stock
    }


def _unless_patched(names: Mapping[str, object], name: str, turn: Turn) -> Callable:
    """The fused function, for as long as the original is what has its name in the module."""
    stock = names[name]
    fused = fused_rotary(stock, turn)

    def apply_rotary(*args: Any, **named: Any) -> Any:
        # a graph would guard all that the module holds
        if torch.compiler.is_compiling() or names.get(name) is stock:
            return fused(*args, **named)
        return names[name](*map(computed, args), **{key: computed(value) for key, value in named.items()})

    return apply_rotary


def rotary_functions(cls: type[nn.Module]) -> dict[str, Callable]:
    """Name -> function, of the rotary functions that the class's forward calls and ``exchanged`` can reach."""
    inner = _caller(cls.forward)
    if inner is None:
        return {}
    found = {name: inner.__globals__.get(name) for name in inner.__code__.co_names if WORD in name}
    return {name: function for name, function in found.items() if callable(function)}


def exchanged(f: FunctionType, new: Mapping[str, Callable]) -> FunctionType:
    """``f`` with globals bound to ``new``; decorators around the function that uses them are built again."""
    if not new:
        return f
    if not new.keys().isdisjoint(f.__code__.co_names):
        names = {**f.__globals__, **new}
        # torch.compile would guard what it finds in the module of that name instead
        names.pop("__name__", None)
        return _function(f, names, f.__closure__)
    inner = f.__wrapped__
    called = exchanged(inner, new)
    cells = tuple(CellType(called) if _holds(cell, inner) else cell for cell in f.__closure__)
    made = _function(f, f.__globals__, cells)
    made.__wrapped__ = called
    return made


def _caller(f: object) -> FunctionType | None:
    """The function under ``f``'s decorators that uses a rotary function, if ``exchanged`` can reach it."""
    if not isinstance(f, FunctionType):
        return None
    if any(WORD in name for name in f.__code__.co_names):
        return f
    inner = getattr(f, "__wrapped__", None)
    if inner is None or not any(_holds(cell, inner) for cell in f.__closure__ or ()):
        return None
    return _caller(inner)


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # not filled yet
        return False


def _function(f: FunctionType, names: dict[str, object], closure: tuple[CellType, ...] | None) -> FunctionType:
    """A copy of ``f`` over other globals and another closure, with all that hangs on it."""
    made = FunctionType(f.__code__, names, f.__name__, f.__defaults__, closure)
    made.__kwdefaults__ = f.__kwdefaults__
    made.__qualname__, made.__doc__, made.__module__ = f.__qualname__, f.__doc__, f.__module__
    made.__annotations__ = dict(f.__annotations__)
    made.__dict__.update(f.__dict__)
    return made
