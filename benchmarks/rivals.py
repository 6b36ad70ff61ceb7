"""How each library computes each op: one builder per op and provider.

A builder takes a case's tensors and returns the call that is timed. It imports its library itself, so that a library
which is missing or broken costs its own row and nothing else.

    hf_eager         the function or module of transformers.models, called as its models call it; where it has none,
                     the formula in plain PyTorch
    compile          the same under torch.compile(fullgraph=True, dynamic=False)
    torch            PyTorch's own fused function, where there is one
    liger            liger_kernel, called as its own patches call it
    ds_fused         ours
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = Mapping[str, Tensor]
Call = Callable[[], "Tensor | tuple[Tensor, ...]"]
EPS = 1e-6


@dataclass(frozen=True)
class Provider:
    build: Callable[[Tensors], Call]
    # names of the tensors it writes into; they are restored before every call, outside the timed region
    overwrites: tuple[str, ...] = ()
    note: str = ""


def _ops():
    import ds_fused.ops

    return ds_fused.ops


def _liger():
    import liger_kernel.transformers.functional

    return liger_kernel.transformers.functional


def _compiled(build: Callable[[Tensors], tuple[Callable, tuple]]) -> Callable[[Tensors], Call]:
    """The call of an eager builder's (function, arguments) through torch.compile."""

    def compiled(t: Tensors) -> Call:
        function, arguments = build(t)
        function = torch.compile(function, fullgraph=True, dynamic=False)
        return lambda: function(*arguments)

    return compiled


def _eager(build: Callable[[Tensors], tuple[Callable, tuple]]) -> Callable[[Tensors], Call]:
    def eager(t: Tensors) -> Call:
        function, arguments = build(t)
        return lambda: function(*arguments)

    return eager


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
    norm = _liger().liger_rms_norm
    return lambda: norm(t["x"], t["weight"], EPS)


def _liger_gemma_norm(t: Tensors) -> Call:
    norm = _liger().liger_rms_norm
    return lambda: norm(t["x"], t["weight"], EPS, 1.0, "gemma", False)


def _our_norm(cast: str, offset: float) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        norm = _ops().rms_norm
        return lambda: norm(t["x"], t["weight"], eps=EPS, offset=offset, cast=cast)

    return build


LLAMA_NORM = {
    "ds_fused": Provider(_our_norm("before_weight", 0.0)),
    "hf_eager": Provider(_eager(_llama_norm)),
    "torch": Provider(_torch_norm, note="multiplies by the weight before rounding"),
    "compile": Provider(_compiled(_llama_norm)),
    "liger": Provider(_liger_llama_norm, ("dy",), "writes dx over dy; dy restored untimed"),
}
GEMMA_NORM = {
    "ds_fused": Provider(_our_norm("after_weight", 1.0)),
    "hf_eager": Provider(_eager(_gemma_norm)),
    "compile": Provider(_compiled(_gemma_norm)),
    "liger": Provider(_liger_gemma_norm, note="in_place=False, as its Gemma 2 patch sets it"),
}


# --- rms_norm with a bias; no model of transformers has one ---


def _eager_bias_norm(t: Tensors):
    def norm(x, weight, bias):
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) + bias

    return norm, (t["x"], t["weight"], t["bias"])


def _our_bias_norm(t: Tensors) -> Call:
    norm = _ops().rms_norm
    return lambda: norm(t["x"], t["weight"], bias=t["bias"], eps=EPS)


BIAS_NORM = {
    "ds_fused": Provider(_our_bias_norm),
    "hf_eager": Provider(_eager(_eager_bias_norm), note="LlamaRMSNorm's steps and a bias"),
    "compile": Provider(_compiled(_eager_bias_norm)),
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
    norm = _liger().liger_fused_add_rms_norm
    return lambda: norm(t["x"], t["residual"], t["weight"], EPS, in_place=False)


def _our_add_norm(t: Tensors) -> Call:
    norm = _ops().add_rms_norm
    return lambda: norm(t["x"], t["residual"], t["weight"], eps=EPS)


ADD_NORM = {
    "ds_fused": Provider(_our_add_norm),
    "hf_eager": Provider(_eager(_eager_add_norm)),
    "torch": Provider(_torch_add_norm, note="x + residual, then F.rms_norm"),
    "compile": Provider(_compiled(_eager_add_norm)),
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
        norm = _ops().gated_rms_norm
        return lambda: norm(t["x"], t["gate"], t["weight"], eps=EPS, order=order)

    return build


def gated_norm_providers(order: str) -> dict[str, Provider]:
    stock = {"norm_first": _qwen3_next_norm, "gate_first": _mamba2_norm}[order]
    return {
        "ds_fused": Provider(_our_gated_norm(order)),
        "hf_eager": Provider(_eager(stock)),
        "compile": Provider(_compiled(stock)),
    }


# --- modulated_rms_norm: x [B, T, D], weight [D], scale, shift [B, 1, D] ---


def _eager_modulated_norm(t: Tensors):
    norm, (x,) = _llama_norm(t)
    return lambda x, scale, shift: norm(x) * (1 + scale) + shift, (x, t["scale"], t["shift"])


def _liger_modulated_norm(t: Tensors) -> Call:
    norm = _liger().liger_modulated_rms_norm
    return lambda: norm(t["x"], t["weight"], t["scale"], t["shift"], EPS, in_place=False)


def _our_modulated_norm(t: Tensors) -> Call:
    norm = _ops().modulated_rms_norm
    return lambda: norm(t["x"], t["weight"], t["scale"], t["shift"], eps=EPS)


MODULATED_NORM = {
    "ds_fused": Provider(_our_modulated_norm),
    "hf_eager": Provider(_eager(_eager_modulated_norm), note="LlamaRMSNorm's steps, scaled and shifted"),
    "compile": Provider(_compiled(_eager_modulated_norm)),
    "liger": Provider(_liger_modulated_norm, note="in_place=False"),
}


# --- attention_residual: stack [N, T, D] or N blocks [T, D], query, weight [D]; no model of transformers has one ---


def _attention_residual(stack, query, weight):
    wide = stack.float()
    keys = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight
    shares = (keys * query).sum(-1, keepdim=True).softmax(0)
    return (shares * wide).sum(0).to(stack.dtype)


def _blocks(t: Tensors) -> list[Tensor]:
    return [x for name, x in t.items() if name.startswith("block")]


def _eager_attention_residual(t: Tensors):
    return _attention_residual, (t["stack"], t["query"], t["weight"])


def _eager_listed_attention_residual(t: Tensors):
    def stacked(query, weight, *blocks):
        return _attention_residual(torch.stack(blocks), query, weight)

    return stacked, (t["query"], t["weight"], *_blocks(t))


def _liger_attention_residual(t: Tensors) -> Call:
    op = _liger().liger_attn_res
    return lambda: op(t["stack"], t["query"], t["weight"], EPS)


def _liger_listed_attention_residual(t: Tensors) -> Call:
    op, blocks = _liger().liger_attn_res, _blocks(t)
    return lambda: op(torch.stack(blocks), t["query"], t["weight"], EPS)


def _our_attention_residual(t: Tensors) -> Call:
    op, blocks = _ops().attention_residual, t["stack"] if "stack" in t else _blocks(t)
    return lambda: op(blocks, t["query"], t["weight"], eps=EPS)


ATTENTION_RESIDUAL = {
    "ds_fused": Provider(_our_attention_residual),
    "hf_eager": Provider(_eager(_eager_attention_residual), note="the formula in fp32"),
    "compile": Provider(_compiled(_eager_attention_residual)),
    "liger": Provider(_liger_attention_residual),
}
LISTED_ATTENTION_RESIDUAL = {
    "ds_fused": Provider(_our_attention_residual),
    "hf_eager": Provider(_eager(_eager_listed_attention_residual), note="torch.stack and the formula in fp32"),
    "compile": Provider(_compiled(_eager_listed_attention_residual)),
    "liger": Provider(_liger_listed_attention_residual, note="of torch.stack: a list itself is an error"),
}


# --- hyper-connections: x [T, N, C], phi [N C, M], bias [M], scale [3]; pre, post [T, N], res [T, N, N], y [T, C] ---


def _deepseek_v4(x, phi, bias, scale):
    """The coefficients by the steps of transformers' DeepSeek-V4, whose class returns no pre."""
    n = x.shape[1]
    flat = x.flatten(1).float()
    flat = flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + EPS)
    mixes = F.linear(flat, phi.T.float()).split([n, n, n * n], dim=-1)
    pre, post, res = (s * part + b for s, part, b in zip(scale, mixes, bias.split([n, n, n * n]), strict=True))
    res = torch.softmax(res.view(-1, n, n), dim=-1) + EPS
    res = res / (res.sum(dim=-2, keepdim=True) + EPS)
    for _ in range(19):
        res = res / (res.sum(dim=-1, keepdim=True) + EPS)
        res = res / (res.sum(dim=-2, keepdim=True) + EPS)
    return torch.sigmoid(pre), 2 * torch.sigmoid(post), res


def _stock_pre(x, pre):
    return (pre.unsqueeze(-1) * x).sum(dim=1).to(x.dtype)


def _stock_post_res(x, y, post, res):
    return post.to(x.dtype).unsqueeze(-1) * y.unsqueeze(-2) + torch.matmul(res.to(x.dtype), x)


def _stock_connection(x, phi, bias, scale):
    pre, post, res = _deepseek_v4(x, phi, bias, scale)
    return _stock_post_res(x, _stock_pre(x, pre), post, res)


def _arguments(function: Callable, *names: str) -> Callable[[Tensors], tuple[Callable, tuple]]:
    return lambda t: (function, tuple(t[name] for name in names))


def _liger_coefficients(t: Tensors) -> Callable:
    op = _liger().liger_mhc_coeffs
    fp32 = t["x"].dtype == torch.float32
    return lambda: op(t["x"], t["phi"], t["bias"], *t["scale"].unbind(), allow_fp32=fp32)


def _liger_pre(t: Tensors) -> Call:
    op = _liger().liger_mhc_pre
    return lambda: op(t["x"], t["pre"])


def _liger_post_res(t: Tensors) -> Call:
    op = _liger().liger_mhc_post_res
    return lambda: op(t["x"], t["y"], t["post"], t["res"])


def _liger_connection(t: Tensors) -> Call:
    coefficients, liger = _liger_coefficients(t), _liger()

    def call():
        pre, post, res = coefficients()
        return liger.liger_mhc_post_res(t["x"], liger.liger_mhc_pre(t["x"], pre), post, res)

    return call


def _our_coefficients(t: Tensors) -> Call:
    op = _ops().mhc_coefficients
    return lambda: op(t["x"], t["phi"].T, t["bias"], t["scale"], eps=EPS)


def _our_pre(t: Tensors) -> Call:
    op = _ops().mhc_pre
    return lambda: op(t["x"], t["pre"])


def _our_post_res(t: Tensors) -> Call:
    op = _ops().mhc_post_res
    return lambda: op(t["x"], t["y"], t["post"], t["res"])


def _our_connection(t: Tensors) -> Call:
    ops = _ops()

    def call():
        y, post, res, x = ops.mhc_in(t["x"], t["phi"].T, t["bias"], t["scale"], eps=EPS)
        return ops.mhc_post_res(x, y, post, res)

    return call


_COEFFICIENTS = _arguments(_deepseek_v4, "x", "phi", "bias", "scale")
_PRE, _POST_RES = _arguments(_stock_pre, "x", "pre"), _arguments(_stock_post_res, "x", "y", "post", "res")
_CONNECTION = _arguments(_stock_connection, "x", "phi", "bias", "scale")
_V4 = "DeepSeek-V4's steps"
COEFFICIENTS = {
    "ds_fused": Provider(_our_coefficients, note="with a copy of the transposed phi"),
    "hf_eager": Provider(_eager(_COEFFICIENTS), note=_V4),
    "compile": Provider(_compiled(_COEFFICIENTS)),
    "liger": Provider(_liger_coefficients),
}
STREAMS_PRE = {
    "ds_fused": Provider(_our_pre),
    "hf_eager": Provider(_eager(_PRE), note=_V4),
    "compile": Provider(_compiled(_PRE)),
    "liger": Provider(_liger_pre),
}
STREAMS_POST_RES = {
    "ds_fused": Provider(_our_post_res),
    "hf_eager": Provider(_eager(_POST_RES), note=_V4 + ", weights in bf16"),
    "compile": Provider(_compiled(_POST_RES)),
    "liger": Provider(_liger_post_res),
}
CONNECTION = {
    "ds_fused": Provider(_our_connection, note="with a copy of the transposed phi"),
    "hf_eager": Provider(_eager(_CONNECTION), note=_V4),
    "compile": Provider(_compiled(_CONNECTION)),
    "liger": Provider(_liger_connection),
}


# --- embedding: ids [N], weight [V, H] ---


def _hf_embedding(t: Tensors):
    # what nn.Embedding does
    return F.embedding, (t["ids"], t["weight"])


def _our_embedding(t: Tensors) -> Call:
    embedding = _ops().embedding
    return lambda: embedding(t["ids"], t["weight"])


EMBEDDING = {
    "ds_fused": Provider(_our_embedding),
    "hf_eager": Provider(_eager(_hf_embedding)),
    "compile": Provider(_compiled(_hf_embedding)),
}


# --- softmax and sparsemax: x [N, D] ---


def _eager_softmax(t: Tensors):
    # as the attention of transformers calls it
    return lambda x: F.softmax(x, dim=-1, dtype=torch.float32).to(x.dtype), (t["x"],)


def _torch_softmax(t: Tensors) -> Call:
    return lambda: torch.softmax(t["x"], -1)


def _liger_softmax(t: Tensors) -> Call:
    softmax = _liger().liger_softmax
    return lambda: softmax(t["x"])


def _our_softmax(t: Tensors) -> Call:
    softmax = _ops().softmax
    return lambda: softmax(t["x"])


def _eager_sparsemax(t: Tensors):
    # no model of transformers has one: the sort of the paper
    from ds_fused.ops.sparsemax import sparsemax_reference

    return sparsemax_reference, (t["x"],)


def _liger_sparsemax(t: Tensors) -> Call:
    sparsemax = _liger().liger_sparsemax
    return lambda: sparsemax(t["x"])


def _our_sparsemax(t: Tensors) -> Call:
    sparsemax = _ops().sparsemax
    return lambda: sparsemax(t["x"])


SOFTMAX = {
    "ds_fused": Provider(_our_softmax),
    "hf_eager": Provider(_eager(_eager_softmax)),
    "torch": Provider(_torch_softmax),
    "compile": Provider(_compiled(_eager_softmax)),
    "liger": Provider(_liger_softmax),
}
SPARSEMAX = {
    "ds_fused": Provider(_our_sparsemax),
    "hf_eager": Provider(_eager(_eager_sparsemax), note="our reference: sort and cumsum in fp32"),
    "compile": Provider(_compiled(_eager_sparsemax)),
    "liger": Provider(_liger_sparsemax, note="torch.sort in fp32, then a kernel"),
}


# --- layer_norm, add_layer_norm: x, residual [N, D], weight, bias [D] ---


def _layer_norm(t: Tensors):
    # what HuggingFace models hold is PyTorch's layer
    return lambda x, weight, bias: F.layer_norm(x, weight.shape, weight, bias, EPS), (t["x"], t["weight"], t["bias"])


def _liger_layer_norm(t: Tensors) -> Call:
    norm = _liger().liger_layer_norm
    return lambda: norm(t["x"], t["weight"], t["bias"], EPS)


def _our_layer_norm(t: Tensors) -> Call:
    norm = _ops().layer_norm
    return lambda: norm(t["x"], t["weight"], t["bias"], eps=EPS)


LAYER_NORM = {
    "ds_fused": Provider(_our_layer_norm),
    "hf_eager": Provider(_eager(_layer_norm), note="PyTorch's own kernel"),
    "compile": Provider(_compiled(_layer_norm)),
    "liger": Provider(_liger_layer_norm),
}


def _add_layer_norm(t: Tensors):
    def add_norm(x, residual, weight, bias):
        total = x + residual
        return F.layer_norm(total, weight.shape, weight, bias, EPS), total

    return add_norm, (t["x"], t["residual"], t["weight"], t["bias"])


def _liger_add_layer_norm(t: Tensors) -> Call:
    norm = _liger().liger_layer_norm

    def add_norm():
        total = t["x"] + t["residual"]
        return norm(total, t["weight"], t["bias"], EPS), total

    return add_norm


def _our_add_layer_norm(t: Tensors) -> Call:
    norm = _ops().add_layer_norm
    return lambda: norm(t["x"], t["residual"], t["weight"], t["bias"], eps=EPS)


ADD_LAYER_NORM = {
    "ds_fused": Provider(_our_add_layer_norm),
    "hf_eager": Provider(_eager(_add_layer_norm), note="PyTorch's own kernels"),
    "compile": Provider(_compiled(_add_layer_norm)),
    "liger": Provider(_liger_add_layer_norm, note="its layer norm after PyTorch's add: it has no such op"),
}


# --- group_norm: x [N, C, H, W], weight, bias [C] ---

N_GROUPS = 32


def _group_norm(t: Tensors):
    arguments = t["x"], t["weight"], t["bias"]
    return lambda x, weight, bias: F.group_norm(x, N_GROUPS, weight, bias, EPS), arguments


def _liger_group_norm(t: Tensors) -> Call:
    norm = _liger().liger_group_norm
    return lambda: norm(t["x"], t["weight"], t["bias"], t["weight"].numel(), N_GROUPS, EPS)


def _our_group_norm(t: Tensors) -> Call:
    norm = _ops().group_norm
    return lambda: norm(t["x"], N_GROUPS, t["weight"], t["bias"], eps=EPS)


GROUP_NORM = {
    "ds_fused": Provider(_our_group_norm),
    "hf_eager": Provider(_eager(_group_norm), note="PyTorch's own kernels"),
    "compile": Provider(_compiled(_group_norm)),
    "liger": Provider(_liger_group_norm),
}


# --- dyt: x [N, D], alpha [1], weight, bias [D] ---


def _dyt(t: Tensors):
    arguments = t["x"], t["alpha"], t["weight"], t["bias"]
    return lambda x, alpha, weight, bias: weight * torch.tanh(alpha * x) + bias, arguments


def _liger_dyt(t: Tensors) -> Call:
    dyt = _liger().liger_dyt
    return lambda: dyt(t["x"], t["alpha"], t["weight"], t["bias"])


def _our_dyt(t: Tensors) -> Call:
    dyt = _ops().dyt
    return lambda: dyt(t["x"], t["alpha"], t["weight"], t["bias"])


DYT = {
    "ds_fused": Provider(_our_dyt),
    "hf_eager": Provider(_eager(_dyt)),
    "compile": Provider(_compiled(_dyt)),
    "liger": Provider(_liger_dyt),
}


# --- poly_norm: x [N, D], weight [3], bias [1] ---


def _poly_norm(t: Tensors):
    def normed(v):
        return v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + EPS)

    def poly_norm(x, weight, bias):
        wide = x.float()
        y = weight[0] * normed(wide**3) + weight[1] * normed(wide**2) + weight[2] * normed(wide) + bias
        return y.to(x.dtype)

    return poly_norm, (t["x"], t["weight"], t["bias"])


def _liger_poly_norm(t: Tensors) -> Call:
    poly_norm = _liger().liger_poly_norm
    return lambda: poly_norm(t["x"], t["weight"], t["bias"], EPS, in_place=False)


def _our_poly_norm(t: Tensors) -> Call:
    poly_norm = _ops().poly_norm
    return lambda: poly_norm(t["x"], t["weight"], t["bias"], eps=EPS)


POLY_NORM = {
    "ds_fused": Provider(_our_poly_norm),
    "hf_eager": Provider(_eager(_poly_norm), note="the formula in fp32"),
    "compile": Provider(_compiled(_poly_norm)),
    "liger": Provider(_liger_poly_norm, note="in_place=False; powers of the forward in bf16"),
}


# --- glu: gate, up [N, D] ---


def _hf_glu(act: str):
    def build(t: Tensors):
        from transformers.activations import ACT2FN

        activation = ACT2FN[act]
        return lambda gate, up: activation(gate) * up, (t["gate"], t["up"])

    return build


def _liger_silu(t: Tensors) -> Call:
    from liger_kernel.ops import LigerSiLUMulFunction

    return lambda: LigerSiLUMulFunction.apply(t["gate"], t["up"])


def _liger_gelu(t: Tensors) -> Call:
    from liger_kernel.ops import LigerGELUMulFunction

    return lambda: LigerGELUMulFunction.apply(t["gate"], t["up"])


def _our_glu(act: str, **options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        glu = _ops().glu
        return lambda: glu(t["gate"], t["up"], act, **options)

    return build


def glu_providers(act: str) -> dict[str, Provider]:
    hf = _hf_glu({"gelu_tanh": "gelu_pytorch_tanh"}.get(act, act))
    note = "writes the gradients over gate and up; both restored untimed"
    providers = {
        "ds_fused": Provider(_our_glu(act)),
        "ds_fused overwrite_inputs": Provider(_our_glu(act, overwrite_inputs=True), ("gate", "up"), note),
        "hf_eager": Provider(_eager(hf)),
        "compile": Provider(_compiled(hf)),
    }
    liger = {"silu": _liger_silu, "gelu_tanh": _liger_gelu}.get(act)
    if liger is not None:
        providers["liger"] = Provider(liger, ("gate", "up"), note)
    return providers


# --- glu, packed: gate_up [N, 2D] ---


def _hf_packed(t: Tensors):
    def packed(gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return up * F.silu(gate)

    return packed, (t["gate_up"],)


def _liger_packed(t: Tensors) -> Call:
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return lambda: LigerFusedGateUpSiLUMulFunction.apply(t["gate_up"])


def _hf_gpt_oss(t: Tensors):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    class Experts:
        alpha, limit = GPT_OSS["alpha"], GPT_OSS["limit"]

    return lambda gate_up: GptOssExperts._apply_gate(Experts, gate_up), (t["gate_up"],)


def _our_packed(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        glu = _ops().glu
        return lambda: glu(t["gate_up"], **options)

    return build


def _our_chunked(t: Tensors) -> Call:
    glu = _ops().glu
    return lambda: glu(*t["gate_up"].chunk(2, dim=-1))


GPT_OSS = {"alpha": 1.702, "limit": 7.0, "offset": 1.0}
PACKED_GLU = {
    "ds_fused": Provider(_our_packed()),
    "ds_fused chunked": Provider(_our_chunked, note="halves as two tensors: autograd puts their gradients together"),
    "hf_eager": Provider(_eager(_hf_packed)),
    "compile": Provider(_compiled(_hf_packed)),
    "liger": Provider(_liger_packed, note="its Megatron integration's, not in place"),
}
GPT_OSS_GLU = {
    "ds_fused": Provider(_our_packed(interleaved=True, **GPT_OSS)),
    "hf_eager": Provider(_eager(_hf_gpt_oss)),
    "compile": Provider(_compiled(_hf_gpt_oss)),
}


# --- tiled_mlp: x [1, T, H], gate_weight, up_weight [I, H], down_weight [H, I] ---

N_TILES = 8


def _mlp_config(t: Tensors):
    from transformers import LlamaConfig

    intermediate_size, hidden_size = t["gate_weight"].shape
    return LlamaConfig(hidden_size=hidden_size, intermediate_size=intermediate_size, num_attention_heads=1)


def _with_weights(mlp: torch.nn.Module, t: Tensors) -> torch.nn.Module:
    for name in ("gate", "up", "down"):
        getattr(mlp, f"{name}_proj").weight = t[f"{name}_weight"]
    return mlp


def _llama_mlp(t: Tensors) -> torch.nn.Module:
    from transformers.models.llama.modeling_llama import LlamaMLP

    with torch.device("meta"):
        mlp = LlamaMLP(_mlp_config(t))
    return _with_weights(mlp, t)


def _hf_mlp(t: Tensors):
    return _llama_mlp(t), (t["x"],)


def _our_mlp(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        import ds_fused

        model = torch.nn.Sequential(_llama_mlp(t))
        if not ds_fused.apply(model, {"swiglu": True}, **options).replaced:
            raise RuntimeError("the MLP was left as it is")
        return lambda: model(t["x"])

    return build


def _liger_mlp(t: Tensors) -> Call:
    from liger_kernel.transformers.tiled_mlp import LigerTiledSwiGLUMLP

    with torch.device("meta"):
        mlp = LigerTiledSwiGLUMLP(_mlp_config(t), num_shards=N_TILES)
    _with_weights(mlp, t)
    return lambda: mlp(t["x"])


TILED_MLP = {
    "ds_fused": Provider(_our_mlp(tiles=N_TILES), note=f"{N_TILES} tiles"),
    "ds_fused whole": Provider(_our_mlp(), note="not tiled"),
    "hf_eager": Provider(_eager(_hf_mlp), note="not tiled"),
    "compile": Provider(_compiled(_hf_mlp), note="not tiled"),
    "liger": Provider(_liger_mlp, note=f"{N_TILES} tiles"),
}


# --- rope: q [B, Hq, T, D], k [B, Hk, T, D] (views of [B, T, H, D]), cos and sin [1, T, D] ---


def _hf_rope(t: Tensors):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb, (t["q"], t["k"], t["cos"], t["sin"])


def _liger_rope(t: Tensors) -> Call:
    rope = _liger().liger_rope
    return lambda: rope(t["q"], t["k"], t["cos"], t["sin"])


class _Produced(torch.autograd.Function):
    """x as if something had computed it: a leaf may not be overwritten."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.data

    @staticmethod
    def backward(ctx, dx: Tensor) -> Tensor:
        return dx


def _our_rope(*angles: str, sections: bool = False, **options) -> Callable[[Tensors], Call]:
    """``angles``: names of what q and k are turned by; none: cos and sin."""

    def build(t: Tensors) -> Call:
        rope, turned_by = _ops().rope, [t[name] for name in angles or ("cos", "sin")]
        more = options | ({"sections": _sections_of(t["q"].shape[-1])} if sections else {})
        if not more.get("inplace"):
            return lambda: rope(t["q"], t["k"], *turned_by, **more)
        produced = _Produced.apply
        return lambda: rope(produced(t["q"]), produced(t["k"]), *turned_by, **more)

    return build


_INPLACE = ("q", "k"), "forward over q and k; both restored untimed"
ROPE = {
    "ds_fused": Provider(_our_rope()),
    "ds_fused inplace": Provider(_our_rope(inplace=True), *_INPLACE),
    "hf_eager": Provider(_eager(_hf_rope)),
    "compile": Provider(_compiled(_hf_rope)),
    "liger": Provider(_liger_rope, ("q", "k", "dq", "dk"), "in place on q, k, dq, dk; all restored untimed"),
}


# --- rms_norm_rope: as rope, and q_weight, k_weight [D] ---


def _norm_then_rope(norm: Callable[[Tensor, Tensor], Tensor], rope: Callable, t: Tensors):
    """Norms over [B, T, H, D], as models call them: of transposed heads some would make a copy first."""

    def norm_rope(q, k, cos, sin):
        q, k = (norm(x.transpose(1, 2), t[name]).transpose(1, 2) for x, name in ((q, "q_weight"), (k, "k_weight")))
        return rope(q, k, cos, sin)

    return norm_rope, (t["q"], t["k"], t["cos"], t["sin"])


def _hf_norm_rope(t: Tensors):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

    norms = {}
    for weight in (t["q_weight"], t["k_weight"]):
        norms[id(weight)] = norm = Qwen3RMSNorm(weight.numel(), eps=EPS)
        norm.weight = weight
    return _norm_then_rope(lambda x, weight: norms[id(weight)](x), apply_rotary_pos_emb, t)


def _liger_norm_rope(t: Tensors) -> Call:
    norm, rope = _liger().liger_rms_norm, _liger().liger_rope
    call, tensors = _norm_then_rope(lambda x, weight: norm(x, weight, EPS, in_place=False), rope, t)
    return lambda: call(*tensors)


def _our_norm_then_rope(t: Tensors) -> Call:
    norm, rope = _ops().rms_norm, _ops().rope
    call, tensors = _norm_then_rope(lambda x, weight: norm(x, weight, eps=EPS), rope, t)
    return lambda: call(*tensors)


def _our_norm_rope(t: Tensors) -> Call:
    norm_rope = _ops().rms_norm_rope
    return lambda: norm_rope(t["q"], t["k"], t["q_weight"], t["k_weight"], t["cos"], t["sin"], eps=EPS)


NORM_ROPE = {
    "ds_fused": Provider(_our_norm_rope),
    "ds_fused apart": Provider(_our_norm_then_rope, note="rms_norm twice, then rope"),
    "hf_eager": Provider(_eager(_hf_norm_rope)),
    "compile": Provider(_compiled(_hf_norm_rope)),
    "liger": Provider(_liger_norm_rope, ("dq", "dk"), "norms not in place; rope in place, dq and dk restored untimed"),
}


# --- rope by sections: cos and sin [3, B, T, D]; with complex angles: q, k [B, T, H, D], freqs [B, T, D/2] ---


def _sections_of(d: int) -> list[int]:
    """Of d/2 pairs a quarter turns by time, the rest half and half: 16, 24, 24 in a head of 128."""
    return [d // 8, 3 * d // 16, 3 * d // 16]


def _hf_sections(t: Tensors):
    from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

    sections = _sections_of(t["q"].shape[-1])

    def rope(q, k, cos, sin):
        cos, sin = (
            torch.cat([part[i % 3] for i, part in enumerate(x.split(sections * 2, dim=-1))], dim=-1) for x in (cos, sin)
        )
        return apply_rotary_pos_emb(q, k, cos, sin)

    return rope, (t["q"], t["k"], t["cos"], t["sin"])


def _liger_sections(t: Tensors) -> Call:
    from liger_kernel.transformers.qwen2vl_mrope import liger_multimodal_rotary_pos_emb as rope

    sections = _sections_of(t["q"].shape[-1])
    return lambda: rope(t["q"], t["k"], t["cos"], t["sin"], sections)


def _hf_complex(t: Tensors):
    from transformers.models.llama4.modeling_llama4 import apply_rotary_emb

    return apply_rotary_emb, (t["q"], t["k"], t["freqs"])


def _liger_complex(t: Tensors) -> Call:
    from liger_kernel.transformers.llama4_rope import liger_llama4_text_rotary_pos_emb as rope

    return lambda: rope(t["q"], t["k"], t["freqs"])


_COMPLEX = {"interleaved": True, "unsqueeze_dim": 2, "keep_dtype": True}


def partial_rope_providers(family: str, *, interleaved: bool) -> dict[str, Provider]:
    """cos and sin [1, T, R] of fewer columns than q and k, as ``family`` of transformers.models turns them."""

    def hf(t: Tensors):
        from importlib import import_module

        module = import_module(f"transformers.models.{family}.modeling_{family}")
        return module.apply_rotary_pos_emb, (t["q"], t["k"], t["cos"], t["sin"])

    return {
        "ds_fused": Provider(_our_rope(interleaved=interleaved)),
        "ds_fused inplace": Provider(_our_rope(interleaved=interleaved, inplace=True), *_INPLACE),
        "hf_eager": Provider(_eager(hf)),
        "compile": Provider(_compiled(hf)),
    }


ROPE_SECTIONS = {
    "ds_fused": Provider(_our_rope(sections=True)),
    "ds_fused inplace": Provider(_our_rope(sections=True, inplace=True), *_INPLACE),
    "hf_eager": Provider(_eager(_hf_sections), note="the sections put together each time, as remote code does"),
    "compile": Provider(_compiled(_hf_sections)),
    "liger": Provider(_liger_sections, ("q", "k", "dq", "dk"), "in place on q, k, dq, dk; all restored untimed"),
}
ROPE_COMPLEX = {
    "ds_fused": Provider(_our_rope("freqs", **_COMPLEX)),
    "ds_fused inplace": Provider(_our_rope("freqs", **_COMPLEX, inplace=True), *_INPLACE),
    "hf_eager": Provider(_eager(_hf_complex)),
    "compile": Provider(_compiled(_hf_complex)),
    "liger": Provider(_liger_complex, ("q", "k", "dq", "dk"), "may write over its arguments; all restored untimed"),
}


# --- experts: x [T, H], gate_up [E, 2I, H], down [E, H, I], ids and weights [T, k] ---


def _hf_experts(implementation: str) -> Callable[[Tensors], tuple[Callable, tuple]]:
    def build(t: Tensors):
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        n_experts, hidden, intermediate = t["down"].shape
        sizes = {"hidden_size": hidden, "moe_intermediate_size": intermediate, "num_experts": n_experts}
        config = Qwen3MoeConfig(**sizes)
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = Qwen3MoeExperts(config)
        experts.gate_up_proj, experts.down_proj = t["gate_up"], t["down"]
        return experts, (t["x"], t["ids"], t["weights"])

    return build


def _liger_experts(t: Tensors) -> Call:
    from liger_kernel.ops import LigerFusedMoEFunction

    # as its LigerExperts calls it
    return lambda: LigerFusedMoEFunction.apply(t["x"], t["gate_up"], t["down"], t["ids"].to(torch.int32), t["weights"])


def _our_experts(t: Tensors) -> Call:
    experts = _ops().experts
    return lambda: experts(t["x"], t["gate_up"], t["down"], t["ids"], t["weights"])


EXPERTS = {
    "ds_fused": Provider(_our_experts),
    "hf_eager": Provider(_eager(_hf_experts("eager"))),
    "torch": Provider(_eager(_hf_experts("grouped_mm")), note="transformers' experts by PyTorch's grouped_mm"),
    "compile": Provider(_compiled(_hf_experts("grouped_mm")), note="by grouped_mm"),
    "liger": Provider(_liger_experts),
}


# --- relu2: x [N, D] ---


def _hf_relu2(t: Tensors):
    from transformers.activations import ACT2FN

    return ACT2FN["relu2"], (t["x"],)


def _liger_relu2(t: Tensors) -> Call:
    from liger_kernel.ops.relu_squared import LigerReLUSquaredFunction

    return lambda: LigerReLUSquaredFunction.apply(t["x"])


def _our_relu2(t: Tensors) -> Call:
    relu2 = _ops().relu2
    return lambda: relu2(t["x"])


RELU2 = {
    "ds_fused": Provider(_our_relu2),
    "hf_eager": Provider(_eager(_hf_relu2)),
    "compile": Provider(_compiled(_hf_relu2)),
    "liger": Provider(_liger_relu2, ("x", "dy"), "may write over its arguments; both restored untimed"),
}


# --- cross_entropy: logits [N, V], labels [N] ---


def _hf_loss(t: Tensors):
    from transformers.loss.loss_utils import ForCausalLMLoss

    n_vocab = t["logits"].shape[-1]

    def loss(logits, labels):
        return ForCausalLMLoss(logits, None, n_vocab, shift_labels=labels)

    return loss, (t["logits"], t["labels"])


def _liger_loss(t: Tensors) -> Call:
    loss = _liger().liger_cross_entropy
    return lambda: loss(t["logits"], t["labels"])


def _our_loss(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = _ops().cross_entropy
        return lambda: loss(t["logits"], t["labels"], **options)

    return build


def loss_providers(upstream: float) -> dict[str, Provider]:
    """``upstream``: the gradient that the loss is given, which ours may know in the forward."""
    in_forward = "gradient made in forward, over the logits; restored untimed"
    ours = {
        "ds_fused": Provider(_our_loss()),
        "ds_fused overwrite_logits": Provider(
            _our_loss(overwrite_logits=True), ("logits",), "writes the gradient over the logits; restored untimed"
        ),
        "ds_fused grad_in_forward": Provider(
            _our_loss(grad_in_forward=True, upstream=upstream), ("logits",), f"{in_forward}; told upstream={upstream:g}"
        ),
    }
    if upstream != 1.0:
        ours["ds_fused grad_in_forward scaled"] = Provider(
            _our_loss(grad_in_forward=True), ("logits",), f"{in_forward}; not told, so scaled in backward"
        )
    return ours | {
        "hf_eager": Provider(_eager(_hf_loss)),
        "compile": Provider(_compiled(_hf_loss)),
        "liger": Provider(_liger_loss, ("logits",), in_forward),
    }


# --- linear_cross_entropy: x [M, H], weight [V, H], labels [M] ---


def _hf_linear_loss(t: Tensors):
    from transformers.loss.loss_utils import ForCausalLMLoss

    n_vocab = t["weight"].shape[0]

    def loss(x, weight, labels):
        return ForCausalLMLoss(F.linear(x, weight), None, n_vocab, shift_labels=labels)

    return loss, (t["x"], t["weight"], t["labels"])


def _liger_linear_loss(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = _liger().liger_fused_linear_cross_entropy
        return lambda: loss(t["x"], t["weight"], t["labels"], **options)

    return build


def _our_linear_loss(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = _ops().linear_cross_entropy
        return lambda: loss(t["x"], t["weight"], t["labels"], **options)

    return build


_IN_FORWARD = "gradients made in forward"
LINEAR_CROSS_ENTROPY = {
    "ds_fused": Provider(_our_linear_loss(), note=f"6 MHV: {_IN_FORWARD}"),
    "ds_fused fp32": Provider(
        _our_linear_loss(accumulate="fp32"), note=f"6 MHV: {_IN_FORWARD}, dweight added up in fp32"
    ),
    # as many tokens at a time as Liger takes of Llama-3's vocabulary
    "ds_fused chunk_mb=64": Provider(
        _our_linear_loss(chunk_mb=64, accumulate="native"), note=f"6 MHV: {_IN_FORWARD}, dweight added up in its dtype"
    ),
    "ds_fused keep": Provider(
        _our_linear_loss(grad_in_forward=False), note="6 MHV for the tiles that fit keep_mb, 8 MHV for the others"
    ),
    "ds_fused keep_mb=0": Provider(
        _our_linear_loss(grad_in_forward=False, keep_mb=0), note="8 MHV: logits computed again in backward"
    ),
    "hf_eager": Provider(_eager(_hf_linear_loss)),
    "compile": Provider(_compiled(_hf_linear_loss)),
    "liger": Provider(_liger_linear_loss(), note=_IN_FORWARD),
    "liger chunk_mem_const=8": Provider(_liger_linear_loss(chunk_mem_const=8), note=_IN_FORWARD),
    "liger chunk_mem_const=16": Provider(_liger_linear_loss(chunk_mem_const=16), note=_IN_FORWARD),
}


# --- linear_log_probs: x [M, H], weight [V, H], labels [M] ---


def _plain_log_probs(entropy: bool):
    def build(t: Tensors):
        def log_probs(x, weight, labels):
            logits = F.linear(x, weight).float()
            picked = -F.cross_entropy(logits, labels, reduction="none")
            if not entropy:
                return picked
            log_p = torch.log_softmax(logits, -1)
            return picked, -(log_p.exp() * log_p).sum(-1).masked_fill(labels == -100, 0.0)

        return log_probs, (t["x"], t["weight"], t["labels"])

    return build


def _our_log_probs(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        log_probs = _ops().linear_log_probs
        return lambda: log_probs(t["x"], t["weight"], t["labels"], **options)

    return build


def log_probs_providers(entropy: bool) -> dict[str, Provider]:
    plain = _plain_log_probs(entropy)
    return {
        "ds_fused": Provider(
            _our_log_probs(entropy=entropy), note="6 MHV for the tiles that fit keep_mb, 8 for others"
        ),
        "ds_fused keep_mb=0": Provider(
            _our_log_probs(entropy=entropy, keep_mb=0), note="8 MHV: logits computed again in backward"
        ),
        "hf_eager": Provider(_eager(plain), note="plain PyTorch"),
        "compile": Provider(_compiled(plain)),
    }


# --- linear_log_probs in a loss: x and teacher_x [A, T, H], both weights [V, H], labels [A, T], advantages [A] ---


def _plain_answers(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(F.linear(x, weight).float().flatten(0, 1), labels.flatten(), reduction="none")
    return -losses.view(labels.shape)


def _plain_dpo(t: Tensors):
    def dpo(x, weight, teacher_x, teacher_weight, labels):
        with torch.no_grad():
            before = _plain_answers(teacher_x, teacher_weight, labels)
        chosen, rejected = (_plain_answers(x, weight, labels) - before).sum(-1).chunk(2)
        return -F.logsigmoid(0.1 * (chosen - rejected)).mean()

    return dpo, _heads(t)


def _plain_grpo(t: Tensors):
    def grpo(x, weight, labels, advantages):
        log_probs, counts = _plain_answers(x, weight, labels), labels != -100
        ratio = (log_probs - log_probs.detach()).exp()
        gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        return -(gain * counts).sum() / counts.sum()

    return grpo, (t["x"], t["weight"], t["labels"], t["advantages"])


def _our_dpo(t: Tensors) -> Call:
    from ds_fused import nn

    loss, (x, weight, ref_x, ref_weight, labels) = nn.LinearDPOLoss(beta=0.1), _heads(t)
    return lambda: loss(x, weight, labels, ref_x=ref_x, ref_weight=ref_weight)


def _our_grpo(t: Tensors) -> Call:
    from ds_fused import nn

    loss, mask = nn.LinearGRPOLoss(loss_type="bnpo"), t["labels"] != -100
    return lambda: loss(t["x"], t["weight"], t["labels"], t["advantages"], mask)


def _liger_dpo(t: Tensors) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, (x, weight, ref_x, ref_weight, labels) = LigerFusedLinearDPOLoss(beta=0.1), _heads(t)
    return lambda: loss(weight, x, labels, None, ref_x, ref_weight)[0]


def _liger_grpo(t: Tensors) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="bnpo", use_ref_model=False)
    ids, mask = t["labels"].clamp_min(0), t["labels"] != -100
    return lambda: loss(t["x"], t["weight"], ids, mask, t["advantages"])[0]


DPO = {
    "ds_fused": Provider(_our_dpo),
    "hf_eager": Provider(_eager(_plain_dpo), note="plain PyTorch"),
    "compile": Provider(_compiled(_plain_dpo)),
    "liger": Provider(_liger_dpo, note="a pair at a time, compiled"),
}
GRPO = {
    "ds_fused": Provider(_our_grpo),
    "hf_eager": Provider(_eager(_plain_grpo), note="plain PyTorch"),
    "compile": Provider(_compiled(_plain_grpo)),
    "liger": Provider(_liger_grpo, note="an answer at a time, its loss compiled"),
}


# --- linear_jsd, linear_kl_div, linear_cosine: x, teacher_x [M, H], weight, teacher_weight [V, H], labels [M] ---


def _plain_divergence(beta: float):
    def build(t: Tensors):
        def divergence(x, weight, teacher_x, teacher_weight, labels):
            student = torch.log_softmax(F.linear(x, weight).float(), -1)
            teacher = torch.log_softmax(F.linear(teacher_x, teacher_weight).float(), -1)
            if beta == 0.0:
                apart = F.kl_div(student, teacher, reduction="none", log_target=True)
            else:
                mixture = torch.logaddexp(teacher + math.log(beta), student + math.log(1.0 - beta))
                apart = beta * F.kl_div(mixture, teacher, reduction="none", log_target=True)
                apart = apart + (1.0 - beta) * F.kl_div(mixture, student, reduction="none", log_target=True)
            counts = labels != -100
            return (apart.sum(-1) * counts).sum() / counts.sum()

        return divergence, _heads(t)

    return build


def _heads(t: Tensors) -> tuple[Tensor, ...]:
    return t["x"], t["weight"], t["teacher_x"], t["teacher_weight"], t["labels"]


def _liger_divergence(beta: float) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        divergence = _liger().liger_fused_linear_jsd
        return lambda: divergence(*_heads(t), jsd_beta=beta)

    return build


def _plain_cosine(t: Tensors):
    def cosine(x, weight, teacher_x, teacher_weight, labels):
        student, teacher = F.linear(x, weight).float(), F.linear(teacher_x, teacher_weight).float()
        counts = labels != -100
        return ((1.0 - F.cosine_similarity(student, teacher, -1)) * counts).sum() / counts.sum()

    return cosine, _heads(t)


def _liger_cosine(t: Tensors) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss

    loss = LigerFusedLinearCosineSimilarityLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    return lambda: loss(*_heads(t))


# --- kl_div: x [N, V] log-probabilities, target [N, V] probabilities ---


def _torch_kl_div(t: Tensors):
    return lambda x, target: F.kl_div(x, target, reduction="batchmean"), (t["x"], t["target"])


def _liger_kl_div(t: Tensors) -> Call:
    loss = _liger().liger_kl_div
    return lambda: loss(t["x"], t["target"], reduction="batchmean")


def _our_kl_div(t: Tensors) -> Call:
    loss = _ops().kl_div
    return lambda: loss(t["x"], t["target"], reduction="batchmean")


KL_DIV = {
    "ds_fused": Provider(_our_kl_div),
    "hf_eager": Provider(_eager(_torch_kl_div), note="F.kl_div"),
    "compile": Provider(_compiled(_torch_kl_div)),
    "liger": Provider(_liger_kl_div),
}


# --- jsd, tvd: student and teacher [N, V] logits, labels [N] ---


def _torch_jsd(beta: float):
    """From the definition; in fp32, as the losses of transformers are."""

    def loss(student, teacher, labels):
        log_q, log_p = (torch.log_softmax(x.float(), -1) for x in (student, teacher))
        if beta == 0.0:
            each = log_p.exp() * (log_p - log_q)
        else:
            log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
            each = beta * log_p.exp() * (log_p - log_m) + (1.0 - beta) * log_q.exp() * (log_q - log_m)
        return _mean_of_counting(each.sum(-1), labels)

    return lambda t: (loss, (t["student"], t["teacher"], t["labels"]))


def _torch_tvd(t: Tensors):
    def loss(student, teacher, labels):
        q, p = (torch.softmax(x.float(), -1) for x in (student, teacher))
        return _mean_of_counting(0.5 * (p - q).abs().sum(-1), labels)

    return loss, (t["student"], t["teacher"], t["labels"])


def _mean_of_counting(loss: Tensor, labels: Tensor) -> Tensor:
    counts = labels != -100
    return torch.where(counts, loss, 0.0).sum() / counts.sum()


def _liger_jsd(beta: float) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = _liger().liger_jsd

        def call() -> Tensor:
            log_q, log_p = (torch.log_softmax(t[name].float(), -1) for name in ("student", "teacher"))
            return loss(log_q, log_p, t["labels"], beta)

        return call

    return build


def _liger_tvd(t: Tensors) -> Call:
    loss = _liger().liger_tvd

    def call() -> Tensor:
        q, p = (torch.softmax(t[name].float(), -1) for name in ("student", "teacher"))
        return loss(q, p, t["labels"], "batchmean")

    return call


def _our_divergence(op: str, **options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = getattr(_ops(), op)
        return lambda: loss(t["student"], t["teacher"], t["labels"], **options)

    return build


def _our_linear_divergence(name: str, **options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        divergence = getattr(_ops(), name)
        return lambda: divergence(*_heads(t), **options)

    return build


def divergence_providers(name: str, beta: float) -> dict[str, Provider]:
    plain = _plain_divergence(beta)
    return {
        "ds_fused": Provider(_our_linear_divergence(name), note=f"8 MHV: {_IN_FORWARD}"),
        "ds_fused keep": Provider(
            _our_linear_divergence(name, grad_in_forward=False), note="8 MHV where it fits keep_mb, else 12"
        ),
        "ds_fused keep_mb=0": Provider(
            _our_linear_divergence(name, grad_in_forward=False, keep_mb=0),
            note="12 MHV: both logits computed again in backward",
        ),
        "hf_eager": Provider(_eager(plain), note="plain PyTorch"),
        "compile": Provider(_compiled(plain)),
        "liger": Provider(_liger_divergence(beta), note=_IN_FORWARD),
    }


COSINE = {
    "ds_fused": Provider(_our_linear_divergence("linear_cosine"), note="8 MHV: gradients made in forward"),
    "hf_eager": Provider(_eager(_plain_cosine), note="plain PyTorch"),
    "compile": Provider(_compiled(_plain_cosine)),
    "liger": Provider(_liger_cosine, note="1024 tokens at a time, compiled"),
}

_SOFTMAX_BEFORE = "PyTorch's fp32 softmax of both logits before it"


def jsd_providers(beta: float) -> dict[str, Provider]:
    torchs = _torch_jsd(beta)
    return {
        "ds_fused": Provider(_our_divergence("jsd", beta=beta)),
        "hf_eager": Provider(_eager(torchs), note="the definition in PyTorch"),
        "compile": Provider(_compiled(torchs)),
        "liger": Provider(_liger_jsd(beta), note=_SOFTMAX_BEFORE),
    }


TVD = {
    "ds_fused": Provider(_our_divergence("tvd")),
    "hf_eager": Provider(_eager(_torch_tvd), note="the definition in PyTorch"),
    "compile": Provider(_compiled(_torch_tvd)),
    "liger": Provider(_liger_tvd, note=_SOFTMAX_BEFORE),
}
