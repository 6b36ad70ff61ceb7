"""A linear layer under an adapter of PEFT's (``peft.tuners.lora.Linear``): base layer and adapter as one node.

Its children are opened, not called, where to multiply is all that they do, in one dtype or, by the kernels, with the
adapter in fp32 over a layer in bf16, which is how PEFT makes them unless it is told otherwise. Where one is quantised,
hooked or of another class, where there are several adapters or none, where the adapter is merged, switched off or a
variant (DoRA), under autocast, in a compiled graph and under transforms of torch.func, the layer's own code runs.

Under a layer's checkpoint the result is kept as that of any linear layer is (``kept.py``), with the adapter in it: one
tensor a layer, for the base's and the adapter's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.modules.layers.linear import linear_of
from ds_fused.modules.memory.kept import Empty, postponable
from ds_fused.ops.common._triton import is_transformed
from ds_fused.ops.mlp.lora_linear import LoRALinearFunction, fits


class LoRALinear:
    """``base_layer(x) + scaling * lora_B(lora_A(lora_dropout(x)))``."""

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        operands = None if args or named or torch.compiler.is_compiling() else _operands(self, x)
        if operands is None:
            return super().forward(x, *args, **named)

        def make(empty: Empty | None) -> Tensor:
            return LoRALinearFunction.apply(x, *operands, empty)

        return postponable(make, is_kept=True)


def _operands(layer: nn.Module, x: Tensor) -> tuple | None:
    """weight, A, B, bias, what A is given if not x, scaling; None where the layer's own code is to run."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or is_transformed():
        return None
    (name,) = names
    if name not in layer.lora_A or name in layer.lora_variant:
        return None
    found = [linear_of(child) for child in (layer.base_layer, layer.lora_A[name], layer.lora_B[name])]
    if None in found:
        return None
    base, a, b = found
    if a.bias is not None or b.bias is not None or not fits(x, base.weight, base.bias, a.weight, b.weight):
        return None
    dropout = layer.lora_dropout[name]
    is_off = isinstance(dropout, nn.Identity) or not dropout.training
    # in the adapter's dtype, for which other numbers are drawn than for x's
    given = None if is_off else dropout(x.to(a.weight.dtype))
    return base.weight, a.weight, b.weight, base.bias, given, layer.scaling[name]
