"""Activations that are an op by themselves: the squared ReLU of MLPs without a gate, and of experts without one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ds_fused.modules.layers.mlp import ReLU2, act_of
from ds_fused.policies.kinds.kind import Kind, Way, both, compared, one_argument
from ds_fused.policies.proof import randn


def _recognises(module: nn.Module) -> bool:
    return act_of(module) == "relu2"


def _ways(module: nn.Module) -> Sequence[Way] | str:
    return one_argument(module) or (Way("relu2", "relu2", ReLU2),)


def _prove(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    tensors = {"x": 2 * randn(1, 2, 3, 32)}
    runs = both(module, way, lambda layer, tensors: layer(tensors["x"]))
    return compared(runs, tensors, device, dtype)


ACTIVATION = Kind(_recognises, _ways, _prove)
