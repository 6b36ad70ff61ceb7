"""What was proven of a layer stays proven: for layers of its class that hold the same, while nobody patches their code.

Remembered is the way that computes what the layer does, by device and dtype. What differed, or could not be compared,
is compared again by the next ``apply``, and so is a layer that reads what can't be told from another's: an object, a
buffer.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence, Set
from types import BuiltinFunctionType, FunctionType

import torch
from torch import nn

from ds_fused.modules.code import Code
from ds_fused.policies.kinds.kind import Kind, Way, choose, shape_of
from ds_fused.policies.proof import attributes, facts

_PROVEN: dict[tuple[Hashable, ...], Way] = {}
# compared by their text: True, 1 and 1.0 are equal, and not the same
_PLAIN = (bool, int, float, str, type(None))
_FUNCTIONS = (FunctionType, BuiltinFunctionType)


class UntoldError(Exception):
    """A layer holds what can't be told from another's."""


def remembered(
    kind: Kind, layer: nn.Module, ways: Sequence[Way], device: torch.device, dtype: torch.dtype
) -> Way | str:
    """``choose``, once for each class, device and dtype."""
    key = _key(kind, layer, ways, device, dtype)
    chosen = None if key is None else _PROVEN.get(key)
    if chosen is None:
        chosen = choose(kind, layer, ways, device, dtype)
        if key is not None and isinstance(chosen, Way):
            _PROVEN[key] = chosen
    return chosen


def _key(
    kind: Kind, layer: nn.Module, ways: Sequence[Way], device: torch.device, dtype: torch.dtype
) -> tuple[Hashable, ...] | None:
    # nothing is proven on meta: a proof there notes which kernels it would launch, each time
    if kind.alike is not facts or device.type == "meta":
        return None
    parts = list(_parts(layer))
    held = (value for part in parts for _, value in attributes(part) if isinstance(value, _FUNCTIONS))
    mixins = (member for way in ways for member in vars(way.mixin).values() if isinstance(member, _FUNCTIONS))
    code = Code(*map(type, parts), *held, *mixins, kind.prove)
    try:
        told = tuple(_told(part, code.names - kind.given) for part in parts)
    except UntoldError:
        return None
    return kind, tuple(ways), device, dtype, code, told


def _parts(layer: nn.Module) -> Iterator[nn.Module]:
    """The layer, and what runs in its copies as well: children without parameters."""
    yield layer
    for child in layer.children():
        if next(child.parameters(), None) is None:
            yield from child.modules()


def _told(part: nn.Module, read: Set[str]) -> tuple[Hashable, ...]:
    """All that a proof could see of it. ``read``: the names in its code."""
    if any(buffer is not None for buffer in part._buffers.values()):
        raise UntoldError
    own = [(name, _word(value)) for name, value in attributes(part) if name in read or _is_plain(value)]
    shapes = [(name, None if p is None else shape_of(p)) for name, p in part._parameters.items()]
    # for those with parameters something of their size stands
    children = [
        (name, type(child), *(_word(getattr(child, size, None)) for size in ("in_features", "out_features")))
        for name, child in part._modules.items()
    ]
    inside = [shape_of(p) for child in part.children() for p in child._parameters.values() if p is not None]
    return type(part), *own, *shapes, *children, *inside


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _word(value: object) -> Hashable:
    if _is_plain(value):
        return repr(value)
    if isinstance(value, (*_FUNCTIONS, type, torch.dtype)):
        return value
    raise UntoldError
