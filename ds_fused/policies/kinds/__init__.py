"""The kinds of layers that ops can replace: how each is recognised, and how a replacement is proven."""

from __future__ import annotations

import torch
from torch import nn

from ds_fused.policies.kinds.activations import ACTIVATION
from ds_fused.policies.kinds.adapters import ADAPTER
from ds_fused.policies.kinds.experts import EXPERTS
from ds_fused.policies.kinds.kind import Kind, Way, choose, unproven
from ds_fused.policies.kinds.layers import LAYER
from ds_fused.policies.kinds.mlps import MLP
from ds_fused.policies.kinds.norms import NORM
from ds_fused.policies.kinds.ropes import ROPE

__all__ = ["ACTIVATION", "ADAPTER", "KINDS", "NORM", "ROPE", "Kind", "Way", "choose", "find", "unproven"]

# the first that recognises a layer has it
KINDS = (NORM, ADAPTER, EXPERTS, MLP, ROPE, ACTIVATION, LAYER)


def find(module: nn.Module) -> Kind | None:
    """The kind of a layer; None where it is none of ours."""
    if isinstance(module, torch.jit.ScriptModule):
        return None  # compiled whole
    return next((kind for kind in KINDS if kind.recognises(module)), None)
