"""Our replacements as DeepSpeed policies, for those who inject through ``deepspeed.module_inject.replace_module``.

    for policy in policies_for(model):
        replace_module(model, policy._orig_layer_class, replace_layer, policy)

``deepspeed.initialize`` does not go this way: ``replace_module`` leaves an attribute on every module that it visits,
and knows neither reports nor undoing. The layers end up the same.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

import torch
from deepspeed.module_inject.policy import DSPolicy
from torch import nn

from ds_fused.modules.swap import is_fused, original_class, swap, why_not_swapped
from ds_fused.policies.kinds import Kind, Way, choose, find

log = logging.getLogger("ds_fused")


class FusedLayerPolicy(DSPolicy):
    """One class of layer, of one kind. DeepSpeed makes an instance per layer, or an empty one to ask it."""

    _orig_layer_class: type[nn.Module]
    kind: Kind
    _chosen: dict[Hashable, Way | str]

    def __init__(self, client_module: nn.Module | None = None, **_options: object) -> None:
        super().__init__()
        self.client_module = client_module

    def match(self, module: nn.Module) -> bool:
        return type(module) is self._orig_layer_class

    def match_replaced(self, module: nn.Module) -> bool:
        return is_fused(module) and original_class(module) is self._orig_layer_class

    def apply(self, module: nn.Module, enable_cuda_graph: bool = False) -> nn.Module:
        """The same module, behaving as the fused layer; unchanged, with a line in the log, where that can't be."""
        ways = why_not_swapped(module) or self.kind.ways(module)
        if not ways:
            return module  # its parts are what is replaced
        way = ways if isinstance(ways, str) else self._choice(module, ways)
        if isinstance(way, Way):
            swap(module, way.mixin, way.how, **dict(way.state))
        else:
            log.warning("ds_fused: a %s stays as it is: %s", type(module).__name__, way)
        return module

    def attention(self, *_: object) -> None:
        """For policies that rebuild a whole block from its weights; ours changes one layer and hands out none."""

    @classmethod
    def _choice(cls, module: nn.Module, ways: Sequence[Way]) -> Way | str:
        """What the proof chooses, or what differed; once for layers that are alike."""
        first = next((p for p in module.parameters() if p.is_floating_point()), None)
        device, dtype = (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)
        what: Hashable = (device, dtype, tuple(ways), cls.kind.alike(module))
        if what not in cls._chosen:
            cls._chosen[what] = choose(cls.kind, module, ways, device, dtype)
        return cls._chosen[what]


def policies_for(model: nn.Module) -> list[type[FusedLayerPolicy]]:
    """A policy for each class of layer in the model that is of a kind we know; none where a key has to ask for it."""
    found = {}
    for module in model.modules():
        cls = type(module)
        kind = None if cls in found or is_fused(module) else find(module)
        if kind is not None and kind.key is None:
            members = {"_orig_layer_class": cls, "kind": kind, "_chosen": {}}
            found[cls] = type(f"Fused{cls.__name__}Policy", (FusedLayerPolicy,), members)
    return list(found.values())


def replace_layer(
    child: nn.Module, policy: type[FusedLayerPolicy], layer_id: int, prefix: str = "", state_dict: dict | None = None
) -> nn.Module:
    """The ``replace_fn`` for ``replace_module``."""
    return policy(child).apply(child)
