"""The fused ops: functions of tensors, each with its PyTorch reference in its file. Needs torch and triton only."""

from ds_fused.ops.add_layer_norm import add_layer_norm
from ds_fused.ops.cross_entropy import cross_entropy
from ds_fused.ops.dyt import dyt
from ds_fused.ops.glu import glu
from ds_fused.ops.group_norm import group_norm
from ds_fused.ops.layer_norm import layer_norm
from ds_fused.ops.linear_cross_entropy import linear_cross_entropy
from ds_fused.ops.relu2 import relu2
from ds_fused.ops.rms_norm import rms_norm
from ds_fused.ops.rope import rope

__all__ = [
    "add_layer_norm",
    "cross_entropy",
    "dyt",
    "glu",
    "group_norm",
    "layer_norm",
    "linear_cross_entropy",
    "relu2",
    "rms_norm",
    "rope",
]
