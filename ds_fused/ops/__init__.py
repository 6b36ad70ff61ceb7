"""The fused ops: functions of tensors, each with its PyTorch reference in its file. Needs torch and triton only."""

from ds_fused.ops.attention.multi_token_attention import multi_token_attention
from ds_fused.ops.attention.neighborhood_attention import neighborhood_attention
from ds_fused.ops.attention.softmax import softmax
from ds_fused.ops.attention.sparsemax import sparsemax
from ds_fused.ops.losses.cross_entropy import cross_entropy
from ds_fused.ops.losses.jsd import jsd
from ds_fused.ops.losses.kl_div import kl_div
from ds_fused.ops.losses.tvd import tvd
from ds_fused.ops.mlp.experts import experts
from ds_fused.ops.mlp.glu import glu
from ds_fused.ops.mlp.lora_linear import lora_linear
from ds_fused.ops.mlp.relu2 import relu2
from ds_fused.ops.norms.add_layer_norm import add_layer_norm
from ds_fused.ops.norms.add_rms_norm import add_rms_norm
from ds_fused.ops.norms.dyt import dyt
from ds_fused.ops.norms.gated_rms_norm import gated_rms_norm
from ds_fused.ops.norms.group_norm import group_norm
from ds_fused.ops.norms.layer_norm import layer_norm
from ds_fused.ops.norms.modulated_rms_norm import modulated_rms_norm
from ds_fused.ops.norms.poly_norm import poly_norm
from ds_fused.ops.norms.rms_norm import rms_norm
from ds_fused.ops.residual.attention_residual import attention_residual
from ds_fused.ops.residual.mhc_coefficients import mhc_coefficients
from ds_fused.ops.residual.mhc_in import mhc_in
from ds_fused.ops.residual.mhc_post_res import mhc_post_res
from ds_fused.ops.residual.mhc_pre import mhc_pre
from ds_fused.ops.rotary.rms_norm_rope import rms_norm_rope
from ds_fused.ops.rotary.rope import rope
from ds_fused.ops.vocab.embedding import embedding
from ds_fused.ops.vocab.linear_cosine import linear_cosine
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy
from ds_fused.ops.vocab.linear_jsd import linear_jsd
from ds_fused.ops.vocab.linear_kl_div import linear_kl_div
from ds_fused.ops.vocab.linear_log_probs import linear_log_probs

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
