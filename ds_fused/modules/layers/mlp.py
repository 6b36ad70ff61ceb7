"""Gated MLPs: ``down(act(gate(x)) * up(x))``, with gate and up apart or packed into one projection.

Children are called, never opened: they may be LoRA, quantised or sharded. Their names are the layer's own.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks

from ds_fused.modules.swap import hooks_of_all, is_observed
from ds_fused.ops import glu, relu2


class Gate(NamedTuple):
    """In which of its forms ``glu`` computes a layer's gate."""

    act: str = "silu"
    interleaved: bool = False
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0


def gated(gate: Gate, x: Tensor, up: Tensor | None = None, *, seen: bool = False) -> Tensor:
    """``glu`` of x and up, or of x that holds both: what projections have just made.

    ``seen``: by somebody else, too, who may read it again.
    """
    return glu(
        x, up, gate.act, interleaved=gate.interleaved, alpha=gate.alpha, limit=gate.limit, offset=gate.offset,
        overwrite_inputs=not (seen or _is_kept(x) or (up is not None and _is_kept(up))),
    )  # fmt: skip


def _is_kept(x: Tensor) -> bool:
    """Whether what made it reads it again in backward: a product does not, but a tanh behind one does."""
    if torch.compiler.is_compiling():
        return False
    base = x._base
    return hasattr(type(x.grad_fn), "_saved_result") or (
        base is not None and hasattr(type(base.grad_fn), "_saved_result")
    )


def _are_seen(*projections: nn.Module) -> bool:
    """Whether hooks have got what they return, or a layer within has made; a compiled graph sees to its memory
    itself."""
    if torch.compiler.is_compiling():
        return False
    if _global_forward_hooks:
        return True
    # most have no layers within
    layers = (layer for each in projections for layer in (each.modules() if each._modules else (each,)))
    return any(is_observed(layer, "_forward_hooks") for layer in layers)


def _is_given(x: Tensor, *results: Tensor) -> bool:
    """Whether a projection has returned what it was given, or a view of it: nn.Identity. The other reads it again."""
    if torch.compiler.is_compiling():
        return False
    owner = x if x._base is None else x._base
    return any([y is owner or y._base is owner for y in results])


def activation_of(layer: nn.Module, name: str) -> object:
    """What the layer has under this name itself: a child, or a function."""
    act = layer._modules.get(name)
    return vars(layer).get(name) if act is None else act


def is_other(act: object, known: str) -> bool:
    """Whether an activation is no longer the one that is fused, or somebody has hung hooks on it since."""
    if act_of(act) != known:
        return True
    if not isinstance(act, nn.Module):
        return False
    kinds = "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"
    return bool(hooks_of_all(*kinds)) if torch.compiler.is_compiling() else is_observed(act, *kinds)


def is_patched(layer: nn.Module) -> bool:
    """Whether the layer's activation is to be called where it is."""
    act = None if layer.fused_act_name is None else activation_of(layer, layer.fused_act_name)
    return act is not None and is_other(act, layer.fused_gate.act)


class GatedMLP:
    """Projections apart, as Llama's."""

    fused_gate: Gate
    fused_children: tuple[str, str, str]  # gate, up, down
    fused_act_name: str | None = None  # None: a function in its forward

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        if is_patched(self):
            return super().forward(*args, **named)
        (x,) = (*args, *named.values())  # hidden_states to some, x to others
        gate, up, down = (getattr(self, name) for name in self.fused_children)
        results = gate(x), up(x)
        return down(gated(self.fused_gate, *results, seen=_are_seen(gate, up) or _is_given(x, *results)))


class PackedMLP:
    """One projection whose first half is the gate, as Phi3's and GLM4's; its gradient is written once, too."""

    fused_gate: Gate
    fused_children: tuple[str, str]  # gate and up, down
    fused_act_name: str | None = None  # None: a function in its forward

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        if is_patched(self):
            return super().forward(*args, **named)
        (x,) = (*args, *named.values())
        gate_up, down = (getattr(self, name) for name in self.fused_children)
        result = gate_up(x)
        return down(gated(self.fused_gate, result, seen=_are_seen(gate_up) or _is_given(x, result)))


class ReLU2:
    """An activation without a gate, as Nemotron's MLPs have it."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return relu2(x)


# by name: the classes are transformers', which this floor doesn't import; whether they compute that, the proof decides
_ACTS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def act_of(act: object) -> str | None:
    """The name under which ``glu`` knows an activation (a layer or a function); None for those it doesn't."""
    if isinstance(act, nn.GELU):
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    if isinstance(act, nn.Module):
        return _ACTS.get(type(act).__name__)
    if isinstance(act, functools.partial):
        tanh = act.func is F.gelu and not act.args and act.keywords == {"approximate": "tanh"}
        return "gelu_tanh" if tanh else None
    # F.gelu is a builtin and F.silu a function: identity tells them, a name would not
    known = {F.silu: "silu", F.gelu: "gelu", F.relu: "relu"}
    return known.get(act) if callable(act) else None
