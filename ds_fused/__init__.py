"""Fused Triton kernels for HuggingFace models, delivered through DeepSpeed.

Importing this package patches nothing and imports neither torch nor triton nor deepspeed: names load on first use.
"""

from __future__ import annotations

from importlib import import_module

# said once more than in ds_fused.ops, whose import is torch's and triton's
_OPS = (
    "rms_norm", "add_rms_norm", "gated_rms_norm", "modulated_rms_norm", "attention_residual", "mhc_coefficients",
    "mhc_pre", "mhc_in", "mhc_post_res", "embedding", "softmax", "sparsemax", "multi_token_attention",
    "neighborhood_attention", "layer_norm", "add_layer_norm", "group_norm", "dyt", "poly_norm", "glu", "experts",
    "rope", "rms_norm_rope", "relu2", "lora_linear", "cross_entropy", "linear_cross_entropy", "linear_log_probs",
    "linear_jsd", "linear_kl_div", "linear_cosine", "kl_div", "jsd", "tvd",
)  # fmt: skip
# name -> the module that it is in, or is
_HOME = {
    **dict.fromkeys(_OPS, "ds_fused.ops"),
    "nn": "ds_fused.nn",
    "apply": "ds_fused.policies",
    "restore": "ds_fused.policies",
    "fuse_label_smoother": "ds_fused.modules.loss.smoother",
    "fuse_sft_loss": "ds_fused.modules.loss.sft",
    "AutoModelForCausalLM": "ds_fused.auto_models",
    "AutoModelForSeq2SeqLM": "ds_fused.auto_models",
    "AutoModelForImageTextToText": "ds_fused.auto_models",
    "AutoModelForMaskedLM": "ds_fused.auto_models",
    "compat": "ds_fused.compat",
    "install": "ds_fused.engine.install",
    "parse_config": "ds_fused.engine.config",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'ds_fused' has no attribute {name!r}; it has {', '.join(_HOME)}")
    module = import_module(_HOME[name])
    found = module if module.__name__ == f"ds_fused.{name}" else getattr(module, name)
    # not asked again
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
