"""Losses of preference and of policy, from hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.rivals.distillation import both_heads
from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager

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

    return dpo, both_heads(t)


def _plain_grpo(t: Tensors):
    def grpo(x, weight, labels, advantages):
        log_probs, counts = _plain_answers(x, weight, labels), labels != -100
        ratio = (log_probs - log_probs.detach()).exp()
        gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(0.8, 1.2) * advantages[:, None])
        return -(gain * counts).sum() / counts.sum()

    return grpo, (t["x"], t["weight"], t["labels"], t["advantages"])


def _our_dpo(t: Tensors) -> Call:
    from ds_fused import nn

    loss, (x, weight, ref_x, ref_weight, labels) = nn.LinearDPOLoss(beta=0.1), both_heads(t)
    return lambda: loss(x, weight, labels, ref_x=ref_x, ref_weight=ref_weight)


def _our_grpo(t: Tensors) -> Call:
    from ds_fused import nn

    loss, mask = nn.LinearGRPOLoss(loss_type="bnpo"), t["labels"] != -100
    return lambda: loss(t["x"], t["weight"], t["labels"], t["advantages"], mask)


def _liger_dpo(t: Tensors) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss, (x, weight, ref_x, ref_weight, labels) = LigerFusedLinearDPOLoss(beta=0.1), both_heads(t)
    return lambda: loss(weight, x, labels, None, ref_x, ref_weight)[0]


def _liger_grpo(t: Tensors) -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="bnpo", use_ref_model=False)
    ids, mask = t["labels"].clamp_min(0), t["labels"] != -100
    return lambda: loss(t["x"], t["weight"], ids, mask, t["advantages"])[0]


DPO = {
    "ds_fused": Provider(_our_dpo),
    "hf_eager": Provider(eager(_plain_dpo), note="plain PyTorch"),
    "compile": Provider(compiled(_plain_dpo)),
    "liger": Provider(_liger_dpo, note="a pair at a time, compiled"),
}
GRPO = {
    "ds_fused": Provider(_our_grpo),
    "hf_eager": Provider(eager(_plain_grpo), note="plain PyTorch"),
    "compile": Provider(compiled(_plain_grpo)),
    "liger": Provider(_liger_grpo, note="an answer at a time, its loss compiled"),
}
