"""The fused ops: functions of tensors, each with its PyTorch reference in its file. Needs torch and triton only."""

from ds_fused.ops.cross_entropy import cross_entropy
from ds_fused.ops.glu import glu
from ds_fused.ops.linear_cross_entropy import linear_cross_entropy
from ds_fused.ops.linear_jsd import linear_jsd
from ds_fused.ops.linear_kl_div import linear_kl_div
from ds_fused.ops.linear_log_probs import linear_log_probs
from ds_fused.ops.rms_norm import rms_norm
from ds_fused.ops.rope import rope

__all__ = [
    "cross_entropy",
    "glu",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl_div",
    "linear_log_probs",
    "rms_norm",
    "rope",
]
