"""An embedding whose table may come in slabs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.ops.slab_embedding import slab_embedding
from ds_fused.ops.slabs import WeightSlabs


class SlabEmbedding:
    """Mix-in for an ``nn.Embedding`` under ZeRO-3, whose hooks would gather the whole table: they are left out."""

    padding_idx: int | None
    _ds_fused_slabs: WeightSlabs

    # collectives, and the exchange of hooks: nothing for a compiled graph
    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return past_hooks(self, "deepspeed", *args, **kwargs)

    def forward(self, input: Tensor) -> Tensor:
        return slab_embedding(input, self._ds_fused_slabs, self.padding_idx)


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
    return (getattr(hook, "__module__", None) or "").partition(".")[0] == library
