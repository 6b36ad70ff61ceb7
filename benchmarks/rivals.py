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


def _our_glu(act: str) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        glu = _ops().glu
        return lambda: glu(t["gate"], t["up"], act)

    return build


def glu_providers(act: str) -> dict[str, Provider]:
    hf = _hf_glu({"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[act])
    note = "writes the gradients over gate and up; both restored untimed"
    liger = {"silu": _liger_silu, "gelu_tanh": _liger_gelu}[act]
    return {
        "ds_fused": Provider(_our_glu(act)),
        "hf_eager": Provider(_eager(hf)),
        "compile": Provider(_compiled(hf)),
        "liger": Provider(liger, ("gate", "up"), note),
    }


# --- rope: q [B, Hq, T, D], k [B, Hk, T, D] (views of [B, T, H, D]), cos and sin [1, T, D] ---


def _hf_rope(t: Tensors):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb, (t["q"], t["k"], t["cos"], t["sin"])


def _liger_rope(t: Tensors) -> Call:
    rope = _liger().liger_rope
    return lambda: rope(t["q"], t["k"], t["cos"], t["sin"])


def _our_rope(t: Tensors) -> Call:
    rope = _ops().rope
    return lambda: rope(t["q"], t["k"], t["cos"], t["sin"])


ROPE = {
    "ds_fused": Provider(_our_rope),
    "hf_eager": Provider(_eager(_hf_rope)),
    "compile": Provider(_compiled(_hf_rope)),
    "liger": Provider(_liger_rope, ("q", "k", "dq", "dk"), "in place on q, k, dq, dk; all restored untimed"),
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


CROSS_ENTROPY = {
    "ds_fused": Provider(_our_loss()),
    "ds_fused overwrite_logits": Provider(
        _our_loss(overwrite_logits=True), ("logits",), "writes the gradient over the logits; restored untimed"
    ),
    "hf_eager": Provider(_eager(_hf_loss)),
    "compile": Provider(_compiled(_hf_loss)),
    "liger": Provider(_liger_loss, ("logits",), "gradient made in forward, over the logits; restored untimed"),
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
    "ds_fused": Provider(_our_linear_loss(), note="6 MHV for the tiles that fit keep_mb, 8 MHV for the others"),
    "ds_fused keep_mb=0": Provider(_our_linear_loss(keep_mb=0), note="8 MHV: logits computed again in backward"),
    # more than any case's logits
    "ds_fused keep all": Provider(_our_linear_loss(keep_mb=1 << 20), note="6 MHV: all logits kept, in x's dtype"),
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


# --- linear_jsd and linear_kl_div: x [M, H], weight [V, H], teacher_x [M, H], teacher_weight [V, H], labels [M] ---


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


def _our_divergence(name: str, **options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        divergence = getattr(_ops(), name)
        return lambda: divergence(*_heads(t), **options)

    return build


def divergence_providers(name: str, beta: float) -> dict[str, Provider]:
    plain = _plain_divergence(beta)
    return {
        "ds_fused": Provider(_our_divergence(name), note="8 MHV where it fits keep_mb, else 12"),
        "ds_fused keep_mb=0": Provider(
            _our_divergence(name, keep_mb=0), note="12 MHV: both logits computed again in backward"
        ),
        "hf_eager": Provider(_eager(plain), note="plain PyTorch"),
        "compile": Provider(_compiled(plain)),
        "liger": Provider(_liger_divergence(beta), note=_IN_FORWARD),
    }
