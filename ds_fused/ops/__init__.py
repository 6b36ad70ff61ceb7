"""The fused ops: functions of tensors, each with its PyTorch reference in its file. Needs torch and triton only."""

from ds_fused.ops.add_layer_norm import add_layer_norm
from ds_fused.ops.add_rms_norm import add_rms_norm
from ds_fused.ops.attention_residual import attention_residual
from ds_fused.ops.cross_entropy import cross_entropy
from ds_fused.ops.dyt import dyt
from ds_fused.ops.embedding import embedding
from ds_fused.ops.experts import experts
from ds_fused.ops.gated_rms_norm import gated_rms_norm
from ds_fused.ops.glu import glu
from ds_fused.ops.group_norm import group_norm
from ds_fused.ops.jsd import jsd
from ds_fused.ops.kl_div import kl_div
from ds_fused.ops.layer_norm import layer_norm
from ds_fused.ops.linear_cosine import linear_cosine
from ds_fused.ops.linear_cross_entropy import linear_cross_entropy
from ds_fused.ops.linear_jsd import linear_jsd
from ds_fused.ops.linear_kl_div import linear_kl_div
from ds_fused.ops.linear_log_probs import linear_log_probs
from ds_fused.ops.lora_linear import lora_linear
from ds_fused.ops.mhc_coefficients import mhc_coefficients
from ds_fused.ops.mhc_in import mhc_in
from ds_fused.ops.mhc_post_res import mhc_post_res
from ds_fused.ops.mhc_pre import mhc_pre
from ds_fused.ops.modulated_rms_norm import modulated_rms_norm
from ds_fused.ops.multi_token_attention import multi_token_attention
from ds_fused.ops.neighborhood_attention import neighborhood_attention
from ds_fused.ops.poly_norm import poly_norm
from ds_fused.ops.relu2 import relu2
from ds_fused.ops.rms_norm import rms_norm
from ds_fused.ops.rms_norm_rope import rms_norm_rope
from ds_fused.ops.rope import rope
from ds_fused.ops.softmax import softmax
from ds_fused.ops.sparsemax import sparsemax
from ds_fused.ops.tvd import tvd

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_residual",
    "cross_entropy",
    "dyt",
    "embedding",
    "experts",
    "gated_rms_norm",
    "glu",
    "group_norm",
    "jsd",
    "kl_div",
    "layer_norm",
    "linear_cosine",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_kl_div",
    "linear_log_probs",
    "lora_linear",
    "mhc_coefficients",
    "mhc_in",
    "mhc_post_res",
    "mhc_pre",
    "modulated_rms_norm",
    "multi_token_attention",
    "neighborhood_attention",
    "poly_norm",
    "relu2",
    "rms_norm",
    "rms_norm_rope",
    "rope",
    "softmax",
    "sparsemax",
    "tvd",
]
