"""Embeddings whose table is never whole."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.modules.layers.linear import own_weight
from ds_fused.modules.swap import is_class_patched


class SlabEmbedding:
    """Mix-in for an ``nn.Embedding`` under ZeRO-3, whose hooks would gather the whole table: they are left out."""

    padding_idx: int | None
    # (ids, padding_idx=...) -> rows; None in a copy, which has a table of its own
    _ds_fused_lookup: Callable[..., Tensor] | None

    # collectives, and the exchange of hooks: nothing for a compiled graph
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._looks_up() or is_class_patched(self):
            return nn.Module.__call__(self, *args, **kwargs)
        return past_hooks(self, "deepspeed", *args, **kwargs)

    def _looks_up(self) -> bool:
        """Not where its weight is computed from others since, by pruning or a parametrization."""
        return self._ds_fused_lookup is not None and own_weight(self) is not None

    def forward(self, input: Tensor) -> Tensor:
        if not self._looks_up():
            # not the next in line: that may be the forward which this one is called by
            return nn.Embedding.forward(self, input)
        return self._ds_fused_lookup(input, padding_idx=self.padding_idx)


def slab_embedding_of(cls: type[nn.Embedding]) -> type | None:
    """The mix-in for an embedding class: plain, or with a forward of its own around the plain one, as Gemma's scaled.

    Such a forward says ``super().forward(ids)``; its code runs on as it is, with another class to be super of. None
    where a class is neither.
    """
    if cls is nn.Embedding:
        return SlabEmbedding
    forward = vars(cls).get("forward")
    if cls.__bases__ != (nn.Embedding,) or not isinstance(forward, FunctionType):
        return None
    if forward.__code__.co_freevars != ("__class__",) or "forward" not in forward.__code__.co_names:
        return None
    return _around(forward)


@functools.cache
def _around(forward: FunctionType) -> type:
    mixin = type("SlabEmbeddingInside", (SlabEmbedding,), {"__doc__": "Looks up within a forward of the original."})
    made = FunctionType(forward.__code__, forward.__globals__, "forward", forward.__defaults__, (CellType(mixin),))
    made.__kwdefaults__ = forward.__kwdefaults__
    mixin.forward = made
    return mixin


# where nn.Module keeps the hooks that act on a forward; backward hooks of layers are others
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def past_hooks(module: nn.Module, library: str, *args: Any, **kwargs: Any) -> Any:
    """A module's own call, with every hook but those that were written in ``library``."""
    before = {name: module.__dict__[name] for name in _HOOKS}
    try:
        for name, hooks in before.items():
            module.__dict__[name] = OrderedDict((k, hook) for k, hook in hooks.items() if not _of(hook, library))
        return nn.Module.__call__(module, *args, **kwargs)
    finally:
        module.__dict__.update(before)


def _of(hook: Callable, library: str) -> bool:
    # what decorators keep: ZeRO-3's are wrapped by torch.compiler.disable, and for library_of they are torch's
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == library
