"""RMS norms: plain, with a bias, of a sum, gated, modulated."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.rivals.provider import EPS, Call, Provider, Tensors, compiled, eager, liger_ops, our_ops

# --- rms_norm: x [N, D], weight [D] ---


def _llama_norm(t: Tensors):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(t["weight"].numel(), EPS)
    norm.weight = t["weight"]
    return norm, (t["x"],)


def _gemma_norm(t: Tensors):
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

    norm = Gemma2RMSNorm(t["weight"].numel(), EPS)
    norm.weight = t["weight"]
    return norm, (t["x"],)


def _torch_norm(t: Tensors) -> Call:
    return lambda: F.rms_norm(t["x"], t["weight"].shape, t["weight"], EPS)


def _liger_llama_norm(t: Tensors) -> Call:
    norm = liger_ops().liger_rms_norm
    return lambda: norm(t["x"], t["weight"], EPS)


def _liger_gemma_norm(t: Tensors) -> Call:
    norm = liger_ops().liger_rms_norm
    return lambda: norm(t["x"], t["weight"], EPS, 1.0, "gemma", False)


def _our_norm(cast: str, offset: float, **options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        norm = our_ops().rms_norm
        return lambda: norm(t["x"], t["weight"], eps=EPS, offset=offset, cast=cast, **options)

    return build


_OVER_DY = ("dy",), "writes dx over dy; dy restored untimed"
LLAMA_NORM = {
    "ds_fused": Provider(_our_norm("before_weight", 0.0)),
    "ds_fused overwrite_grad": Provider(_our_norm("before_weight", 0.0, overwrite_grad=True), *_OVER_DY),
    "hf_eager": Provider(eager(_llama_norm)),
    "torch": Provider(_torch_norm, note="multiplies by the weight before rounding"),
    "compile": Provider(compiled(_llama_norm)),
    "liger": Provider(_liger_llama_norm, *_OVER_DY),
}
GEMMA_NORM = {
    "ds_fused": Provider(_our_norm("after_weight", 1.0)),
    "ds_fused overwrite_grad": Provider(_our_norm("after_weight", 1.0, overwrite_grad=True), *_OVER_DY),
    "hf_eager": Provider(eager(_gemma_norm)),
    "compile": Provider(compiled(_gemma_norm)),
    "liger": Provider(_liger_gemma_norm, note="in_place=False, as its Gemma 2 patch sets it"),
}


# --- rms_norm with a bias; no model of transformers has one ---


def _eager_bias_norm(t: Tensors):
    def norm(x, weight, bias):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) + bias

    return norm, (t["x"], t["weight"], t["bias"])


def _our_bias_norm(t: Tensors) -> Call:
    norm = our_ops().rms_norm
    return lambda: norm(t["x"], t["weight"], bias=t["bias"], eps=EPS)


BIAS_NORM = {
    "ds_fused": Provider(_our_bias_norm),
    "hf_eager": Provider(eager(_eager_bias_norm), note="LlamaRMSNorm's steps and a bias"),
    "compile": Provider(compiled(_eager_bias_norm)),
}


# --- add_rms_norm: x, residual [N, D], weight [D] ---


def _eager_add_norm(t: Tensors):
    norm, (x,) = _llama_norm(t)

    def add_norm(x, residual):
        total = x + residual
        return norm(total), total

    return add_norm, (x, t["residual"])


def _torch_add_norm(t: Tensors) -> Call:
    def add_norm():
        total = t["x"] + t["residual"]
        return F.rms_norm(total, t["weight"].shape, t["weight"], EPS), total

    return add_norm


def _liger_add_norm(t: Tensors) -> Call:
    norm = liger_ops().liger_fused_add_rms_norm
    return lambda: norm(t["x"], t["residual"], t["weight"], EPS, in_place=False)


def _our_add_norm(t: Tensors) -> Call:
    norm = our_ops().add_rms_norm
    return lambda: norm(t["x"], t["residual"], t["weight"], eps=EPS)


ADD_NORM = {
    "ds_fused": Provider(_our_add_norm),
    "hf_eager": Provider(eager(_eager_add_norm)),
    "torch": Provider(_torch_add_norm, note="x + residual, then F.rms_norm"),
    "compile": Provider(compiled(_eager_add_norm)),
    "liger": Provider(_liger_add_norm, note="in_place=False"),
}


# --- gated_rms_norm: x, gate [N, D], weight [D] ---


def _qwen3_next_norm(t: Tensors):
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    norm = Qwen3NextRMSNormGated(t["weight"].numel(), EPS)
    norm.weight = t["weight"]
    return norm, (t["x"], t["gate"])


def _mamba2_norm(t: Tensors):
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    norm = MambaRMSNormGated(t["weight"].numel(), EPS)
    norm.weight = t["weight"]
    return norm, (t["x"], t["gate"])


def _our_gated_norm(order: str) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        norm = our_ops().gated_rms_norm
        return lambda: norm(t["x"], t["gate"], t["weight"], eps=EPS, order=order)

    return build


def gated_norm_providers(order: str) -> dict[str, Provider]:
    stock = {"norm_first": _qwen3_next_norm, "gate_first": _mamba2_norm}[order]
    return {
        "ds_fused": Provider(_our_gated_norm(order)),
        "hf_eager": Provider(eager(stock)),
        "compile": Provider(compiled(stock)),
    }


# --- modulated_rms_norm: x [B, T, D], weight [D], scale, shift [B, 1, D] ---


def _eager_modulated_norm(t: Tensors):
    norm, (x,) = _llama_norm(t)
    return lambda x, scale, shift: norm(x) * (1 + scale) + shift, (x, t["scale"], t["shift"])


def _liger_modulated_norm(t: Tensors) -> Call:
    norm = liger_ops().liger_modulated_rms_norm
    return lambda: norm(t["x"], t["weight"], t["scale"], t["shift"], EPS, in_place=False)


def _our_modulated_norm(t: Tensors) -> Call:
    norm = our_ops().modulated_rms_norm
    return lambda: norm(t["x"], t["weight"], t["scale"], t["shift"], eps=EPS)


MODULATED_NORM = {
    "ds_fused": Provider(_our_modulated_norm),
    "hf_eager": Provider(eager(_eager_modulated_norm), note="LlamaRMSNorm's steps, scaled and shifted"),
    "compile": Provider(compiled(_eager_modulated_norm)),
    "liger": Provider(_liger_modulated_norm, note="in_place=False"),
}
