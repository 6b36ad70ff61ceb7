"""The fused ops: functions of tensors, each with its PyTorch reference in its file. Needs torch and triton only."""

from ds_fused.ops.cross_entropy import cross_entropy
from ds_fused.ops.glu import glu
from ds_fused.ops.jsd import jsd
from ds_fused.ops.kl_div import kl_div
from ds_fused.ops.linear_cross_entropy import linear_cross_entropy
from ds_fused.ops.rms_norm import rms_norm
from ds_fused.ops.rope import rope
from ds_fused.ops.tvd import tvd

__all__ = ["cross_entropy", "glu", "jsd", "kl_div", "linear_cross_entropy", "rms_norm", "rope", "tvd"]
