"""Fused Triton kernels for HuggingFace models, delivered through DeepSpeed.

Importing this package patches nothing and imports neither torch nor triton nor deepspeed: names load on first use.
"""

from __future__ import annotations

from importlib import import_module

_HOME = {
    "rms_norm": "ds_fused.ops",
    "add_rms_norm": "ds_fused.ops",
    "gated_rms_norm": "ds_fused.ops",
    "modulated_rms_norm": "ds_fused.ops",
    "attention_residual": "ds_fused.ops",
    "mhc_coefficients": "ds_fused.ops",
    "mhc_pre": "ds_fused.ops",
    "mhc_in": "ds_fused.ops",
    "mhc_post_res": "ds_fused.ops",
    "embedding": "ds_fused.ops",
    "softmax": "ds_fused.ops",
    "sparsemax": "ds_fused.ops",
    "multi_token_attention": "ds_fused.ops",
    "neighborhood_attention": "ds_fused.ops",
    "layer_norm": "ds_fused.ops",
    "add_layer_norm": "ds_fused.ops",
    "group_norm": "ds_fused.ops",
    "dyt": "ds_fused.ops",
    "poly_norm": "ds_fused.ops",
    "glu": "ds_fused.ops",
    "experts": "ds_fused.ops",
    "rope": "ds_fused.ops",
    "rms_norm_rope": "ds_fused.ops",
    "relu2": "ds_fused.ops",
    "lora_linear": "ds_fused.ops",
    "cross_entropy": "ds_fused.ops",
    "linear_cross_entropy": "ds_fused.ops",
    "linear_log_probs": "ds_fused.ops",
    "linear_jsd": "ds_fused.ops",
    "linear_kl_div": "ds_fused.ops",
    "linear_cosine": "ds_fused.ops",
    "kl_div": "ds_fused.ops",
    "jsd": "ds_fused.ops",
    "tvd": "ds_fused.ops",
    "nn": "ds_fused.nn",
    "apply": "ds_fused.policies",
    "restore": "ds_fused.policies",
    "fuse_label_smoother": "ds_fused.modules.smoother",
    "fuse_sft_loss": "ds_fused.modules.sft",
    "AutoModelForCausalLM": "ds_fused.auto_models",
    "AutoModelForSeq2SeqLM": "ds_fused.auto_models",
    "AutoModelForImageTextToText": "ds_fused.auto_models",
    "AutoModelForMaskedLM": "ds_fused.auto_models",
    "install": "ds_fused.engine.install",
    "parse": "ds_fused.engine.config",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name == "compat":
        return import_module("ds_fused.compat")
    if name not in _HOME:
        raise AttributeError(f"module 'ds_fused' has no attribute {name!r}; it has {', '.join(_HOME)}")
    module = import_module(_HOME[name])
    return module if module.__name__ == f"ds_fused.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
