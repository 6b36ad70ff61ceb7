"""Attention layers: their own forward, with the module-level ``apply_rotary_pos_emb`` exchanged for the fused op.

The forward that runs is the original's code object over a copy of its globals in which that one name is another
function: per instance, so that a stock model in the same process stays stock. The copy is taken once for each class.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import CellType, FunctionType

from torch import Tensor, nn

from ds_fused.ops import rope

NAME = "apply_rotary_pos_emb"


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Stands where transformers' function of this name stood: turns the columns that cos and sin cover, by halves."""
    return rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)


class RopeHalf:
    """The original forward with the fused rotary embedding."""

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module]) -> dict[str, object]:
        """``forward`` made from the original's code."""
        return {"forward": exchanged(cls.forward, NAME, apply_rotary_pos_emb)}


def stock_rope(cls: type[nn.Module]) -> Callable | None:
    """The ``apply_rotary_pos_emb`` that the class's forward calls; None when it calls none by that name."""
    inner = _caller(cls.forward, NAME)
    return inner.__globals__.get(NAME) if inner is not None else None


def same_arguments(function: Callable) -> bool:
    """Whether a function can be called as ours is: (q, k, cos, sin, unsqueeze_dim=1)."""
    ours = inspect.signature(apply_rotary_pos_emb).parameters.values()
    theirs = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


def exchanged(f: FunctionType, name: str, new: Callable) -> FunctionType:
    """``f`` with the global ``name`` bound to ``new``; decorators around the function that uses it are built again."""
    if name in f.__code__.co_names:
        return _function(f, {**f.__globals__, name: new}, f.__closure__)
    inner = f.__wrapped__
    cells = tuple(CellType(exchanged(inner, name, new)) if _holds(cell, inner) else cell for cell in f.__closure__)
    return _function(f, f.__globals__, cells)


def _caller(f: object, name: str) -> FunctionType | None:
    """The function under ``f``'s decorators that uses the global ``name``, if ``exchanged`` can reach it."""
    if not isinstance(f, FunctionType):
        return None
    if name in f.__code__.co_names:
        return f
    inner = getattr(f, "__wrapped__", None)
    if inner is None or not any(_holds(cell, inner) for cell in f.__closure__ or ()):
        return None
    return _caller(inner, name)


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
