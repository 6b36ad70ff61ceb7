"""Linear layers under one of PEFT's adapters (LoRA)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ds_fused.modules.layers.lora import LoRALinear
from ds_fused.modules.swap import fused_class
from ds_fused.policies.kinds.kind import Kind, Way, mixed
from ds_fused.policies.proof import compare, randn, replica

KEY = "lora"
_CHILDREN = ("base_layer", "lora_A", "lora_B", "lora_dropout")
_SETTINGS = ("scaling", "lora_variant", "active_adapters", "disable_adapters", "merged")
# of the proof's copies: one adapter, switched on
_NAME, _SCALING = "adapter", 0.75
_GIVEN = {
    "_active_adapter": _NAME,
    "_disable_adapters": False,
    "merged_adapters": [],
    "scaling": {_NAME: _SCALING},
    "lora_variant": {},
}


def _recognises(module: nn.Module) -> bool:
    return all(name in module._modules for name in _CHILDREN)


def _ways(module: nn.Module) -> Sequence[Way] | str:
    missing = [name for name in _SETTINGS if not hasattr(module, name)]
    if missing:
        return f"it has no {missing[0]}, as PEFT's adapters have"
    if type(module.base_layer) is not nn.Linear:
        return f"its base layer is a {type(module.base_layer).__name__}, and not a plain Linear"
    if module.lora_variant:
        return f"its adapter is a variant, {type(next(iter(module.lora_variant.values()))).__name__}"
    return (Way(KEY, "lora_linear", LoRALinear),)


def _alike(module: nn.Module) -> Hashable:
    """Sizes, scaling and adapter are the proof's own."""
    return module.base_layer.bias is None


def _prove(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    tensors = {
        "x": randn(1, 2, 3, 32),
        "base": randn(2, 48, 32) / 6,
        "a": randn(3, 4, 32) / 6,
        "b": randn(4, 48, 4) / 2,
    }
    if module.base_layer.bias is not None:
        tensors["bias"] = randn(5, 48)

    def run(cls: type) -> Callable[[Mapping[str, Tensor]], Tensor]:
        def call(tensors: Mapping[str, Tensor]) -> Tensor:
            children = {
                "base_layer": _linear(tensors["base"], tensors.get("bias")),
                "lora_A": nn.ModuleDict({_NAME: _linear(tensors["a"])}),
                "lora_B": nn.ModuleDict({_NAME: _linear(tensors["b"])}),
                "lora_dropout": nn.ModuleDict({_NAME: nn.Identity()}),
            }
            return replica(module, cls, tensors, _GIVEN, children)(tensors["x"])

        return call

    cls = type(module)
    runs = run(cls), run(fused_class(way.mixin, cls, way.how))
    for of_layer, of_adapter in mixed(dtype):
        dtypes = {name: of_adapter if name in ("a", "b") else of_layer for name in tensors}
        differs = compare(*runs, tensors, dtypes, device)
        if differs is not None:
            return differs
    return None


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    # tensors with a history, which are no parameters
    layer._parameters.update(weight=weight, bias=bias)
    return layer


ADAPTER = Kind(_recognises, _ways, _prove, _alike, key=KEY)
