"""Operators, as the dispatcher sees them: which are dear to compute again, and what they do with their arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ds_fused.modules.memory.intercept import ATTENTION, MATMUL

_aten = torch.ops.aten
PRODUCTS = frozenset((_aten.mm.default, _aten.addmm.default, _aten.bmm.default))
ADD = _aten.add_.Tensor


@functools.cache
def _kind_of(op: Any) -> str | None:
    namespace, _, name = op.name().partition("::")
    if op in PRODUCTS or op.name() == "aten::_grouped_mm":
        return MATMUL
    is_attention = namespace == "aten" and name.startswith("_scaled_dot_product_")
    # flash-attention, as a package and as it comes from the hub
    is_attention |= "flash_attn" in namespace and name.endswith(("fwd", "_forward"))
    return ATTENTION if is_attention and "backward" not in name else None


@functools.cache
def _dropout_at(op: Any) -> tuple[int, Any] | None:
    """Where an op has its dropout among its arguments, and what it is where it is not given."""
    for i, argument in enumerate(op._schema.arguments):
        if argument.name in ("dropout_p", "p_dropout"):
            return i, argument
    return None


def is_dear(op: Any, args: tuple, named: dict, kind: str) -> bool:
    """Whether a result is one of that kind, and may be handed out again."""
    if _kind_of(op) != kind:
        return False
    dropout = _dropout_at(op)
    if dropout is None:
        return True
    # with dropout it draws random numbers, and what comes after it in the repetition would get those
    at, argument = dropout
    return not (args[at] if at < len(args) else named.get(argument.name, argument.default_value))


@functools.cache
def writes(op: Any) -> bool:
    """Whether an operator writes into its first argument."""
    arguments = op._schema.arguments if isinstance(op, torch._ops.OpOverload) else ()
    return bool(arguments) and arguments[0].alias_info is not None and arguments[0].alias_info.is_write


class Watch(TorchDispatchMode):
    """Hands every operator within a call to a function."""

    supports_higher_order_operators = True

    def __init__(self, handle: Callable[[Any, tuple, dict], Any]) -> None:
        super().__init__()
        self._handle = handle

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self._handle(op, args, kwargs or {})
