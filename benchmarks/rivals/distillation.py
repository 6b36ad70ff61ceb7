"""Distances between a student and a teacher, from hidden states and from logits."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.heads import IN_FORWARD
from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager, liger_ops, our_ops

# --- linear_jsd, linear_kl_div, linear_cosine: x, teacher_x [M, H], weight, teacher_weight [V, H], labels [M] ---


def both_heads(t: Tensors) -> tuple[Tensor, ...]:
    return t["x"], t["weight"], t["teacher_x"], t["teacher_weight"], t["labels"]


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

        return divergence, both_heads(t)

    return build


def _liger_divergence(beta: float) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        divergence = liger_ops().liger_fused_linear_jsd
        return lambda: divergence(*both_heads(t), jsd_beta=beta)

    return build


def _plain_cosine(t: Tensors):
    def cosine(x, weight, teacher_x, teacher_weight, labels):
        student, teacher = F.linear(x, weight).float(), F.linear(teacher_x, teacher_weight).float()
        counts = labels != -100
        return ((1.0 - F.cosine_similarity(student, teacher, -1)) * counts).sum() / counts.sum()

    return cosine, both_heads(t)


def _liger_cosine(t: Tensors) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearCosineSimilarityLoss

    loss = LigerFusedLinearCosineSimilarityLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    return lambda: loss(*both_heads(t))


def _our_linear_divergence(name: str, **options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        divergence = getattr(our_ops(), name)
        return lambda: divergence(*both_heads(t), **options)

    return build


def divergence_providers(name: str, beta: float) -> dict[str, Provider]:
    plain = _plain_divergence(beta)
    return {
        "ds_fused": Provider(_our_linear_divergence(name), note=f"8 MHV: {IN_FORWARD}"),
        "ds_fused keep": Provider(
            _our_linear_divergence(name, grad_in_forward=False), note="8 MHV where it fits keep_mb, else 12"
        ),
        "ds_fused keep_mb=0": Provider(
            _our_linear_divergence(name, grad_in_forward=False, keep_mb=0),
            note="12 MHV: both logits computed again in backward",
        ),
        "hf_eager": Provider(eager(plain), note="plain PyTorch"),
        "compile": Provider(compiled(plain)),
        "liger": Provider(_liger_divergence(beta), note=IN_FORWARD),
    }


COSINE = {
    "ds_fused": Provider(_our_linear_divergence("linear_cosine"), note=f"8 MHV: {IN_FORWARD}"),
    "hf_eager": Provider(eager(_plain_cosine), note="plain PyTorch"),
    "compile": Provider(compiled(_plain_cosine)),
    "liger": Provider(_liger_cosine, note="1024 tokens at a time, compiled"),
}


# --- kl_div: x [N, V] log-probabilities, target [N, V] probabilities ---


def _torch_kl_div(t: Tensors):
    return lambda x, target: F.kl_div(x, target, reduction="batchmean"), (t["x"], t["target"])


def _liger_kl_div(t: Tensors) -> Call:
    loss = liger_ops().liger_kl_div
    return lambda: loss(t["x"], t["target"], reduction="batchmean")


def _our_kl_div(t: Tensors) -> Call:
    loss = our_ops().kl_div
    return lambda: loss(t["x"], t["target"], reduction="batchmean")


KL_DIV = {
    "ds_fused": Provider(_our_kl_div),
    "hf_eager": Provider(eager(_torch_kl_div), note="F.kl_div"),
    "compile": Provider(compiled(_torch_kl_div)),
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
        loss = liger_ops().liger_jsd

        def call() -> Tensor:
            log_q, log_p = (torch.log_softmax(t[name].float(), -1) for name in ("student", "teacher"))
            return loss(log_q, log_p, t["labels"], beta)

        return call

    return build


def _liger_tvd(t: Tensors) -> Call:
    loss = liger_ops().liger_tvd

    def call() -> Tensor:
        q, p = (torch.softmax(t[name].float(), -1) for name in ("student", "teacher"))
        return loss(q, p, t["labels"], "batchmean")

    return call


def _our_divergence(op: str, **options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = getattr(our_ops(), op)
        return lambda: loss(t["student"], t["teacher"], t["labels"], **options)

    return build


_SOFTMAX_BEFORE = "PyTorch's fp32 softmax of both logits before it"


def jsd_providers(beta: float) -> dict[str, Provider]:
    torchs = _torch_jsd(beta)
    return {
        "ds_fused": Provider(_our_divergence("jsd", beta=beta)),
        "hf_eager": Provider(eager(torchs), note="the definition in PyTorch"),
        "compile": Provider(compiled(torchs)),
        "liger": Provider(_liger_jsd(beta), note=_SOFTMAX_BEFORE),
    }


TVD = {
    "ds_fused": Provider(_our_divergence("tvd")),
    "hf_eager": Provider(eager(_torch_tvd), note="the definition in PyTorch"),
    "compile": Provider(compiled(_torch_tvd)),
    "liger": Provider(_liger_tvd, note=_SOFTMAX_BEFORE),
}
