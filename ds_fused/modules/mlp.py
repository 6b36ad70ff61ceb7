"""Gated MLPs: ``down(act(gate(x)) * up(x))``, with gate and up apart or packed into one projection.

Children are called, never opened: they may be LoRA, quantised or sharded.
"""

from __future__ import annotations

import functools

import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.ops import glu


class GatedMLP:
    """Projections apart, as Llama's."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    fused_act: str

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())  # hidden_states to some, x to others
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.fused_act))


class PackedMLP:
    """One projection whose first half is the gate, as Phi3's and GLM4's; its gradient is written once, too."""

    gate_up_proj: nn.Module
    down_proj: nn.Module
    fused_act: str

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return self.down_proj(glu(self.gate_up_proj(x), act=self.fused_act))


# by name: the classes are transformers', which this floor doesn't import; whether they compute that, the proof decides
_ACTS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
}


def act_of(act: object) -> str | None:
    """The name under which ``glu`` knows a silu or gelu (a layer or a function); None for any other activation."""
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if isinstance(act, nn.Module):
        return _ACTS.get(type(act).__name__)
    if isinstance(act, functools.partial):
        tanh = act.func is F.gelu and not act.args and act.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if tanh else None
    # F.gelu is a builtin and F.silu a function: identity tells them, a name would not
    return "silu" if act is F.silu else "gelu" if act is F.gelu else None
