"""Gated linear units."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F

from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager, our_ops

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
        glu = our_ops().glu
        return lambda: glu(t["gate"], t["up"], act, **options)

    return build


def glu_providers(act: str) -> dict[str, Provider]:
    hf = _hf_glu({"gelu_tanh": "gelu_pytorch_tanh"}.get(act, act))
    note = "writes the gradients over gate and up; both restored untimed"
    providers = {
        "ds_fused": Provider(_our_glu(act)),
        "ds_fused overwrite_inputs": Provider(_our_glu(act, overwrite_inputs=True), ("gate", "up"), note),
        "hf_eager": Provider(eager(hf)),
        "compile": Provider(compiled(hf)),
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
        glu = our_ops().glu
        return lambda: glu(t["gate_up"], **options)

    return build


def _our_chunked(t: Tensors) -> Call:
    glu = our_ops().glu
    return lambda: glu(*t["gate_up"].chunk(2, dim=-1))


GPT_OSS = {"alpha": 1.702, "limit": 7.0, "offset": 1.0}
PACKED_GLU = {
    "ds_fused": Provider(_our_packed()),
    "ds_fused chunked": Provider(_our_chunked, note="halves as two tensors: autograd puts their gradients together"),
    "hf_eager": Provider(eager(_hf_packed)),
    "compile": Provider(compiled(_hf_packed)),
    "liger": Provider(_liger_packed, note="its Megatron integration's, not in place"),
}
GPT_OSS_GLU = {
    "ds_fused": Provider(_our_packed(interleaved=True, **GPT_OSS)),
    "hf_eager": Provider(eager(_hf_gpt_oss)),
    "compile": Provider(compiled(_hf_gpt_oss)),
}
