"""Losses of preference and of policy, from hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Inputs
from benchmarks.cases.distillation import distillation_flops, distillation_inputs
from benchmarks.cases.heads import linear_loss_flops, linear_loss_inputs
from benchmarks.rivals import preference as rivals


def dpo_inputs(generator: torch.Generator, a: int, t: int, h: int, n_vocab: int) -> Inputs:
    tensors = distillation_inputs(generator, a * t, h, n_vocab).tensors
    return Inputs(tensors | _as_answers(tensors, a, "x", "teacher_x", "labels"))


def grpo_inputs(generator: torch.Generator, a: int, t: int, h: int, n_vocab: int) -> Inputs:
    tensors = linear_loss_inputs(generator, a * t, h, n_vocab).tensors
    advantages = torch.randn(a, generator=generator, device=generator.device)
    return Inputs(tensors | _as_answers(tensors, a, "x", "labels") | {"advantages": advantages})


def _as_answers(tensors: dict[str, Tensor], a: int, *names: str) -> dict[str, Tensor]:
    """[A T, ...] as [A, T, ...]."""
    return {name: tensors[name].detach().unflatten(0, (a, -1)).requires_grad_(name == "x") for name in names}


def _dpo_flops(a: int, t: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits of both models; of both, dx and dweight
    return distillation_flops(a * t, h, n_vocab)


def _grpo_flops(a: int, t: int, h: int, n_vocab: int) -> tuple[int, int]:
    return linear_loss_flops(a * t, h, n_vocab)


CASES = (
    # two pairs of answers, and four answers
    Case(
        "linear_log_probs", "DPO", dpo_inputs, rivals.DPO,
        sweep=((4, 2048, 4096, 128256),), launch_bound=(2, 64, 256, 1024), tiny=(2, 70, 16, 96),
        flops=_dpo_flops, is_head=False,
    ),
    Case(
        "linear_log_probs", "GRPO", grpo_inputs, rivals.GRPO,
        sweep=((4, 2048, 4096, 128256),), launch_bound=(2, 64, 256, 1024), tiny=(2, 70, 16, 96),
        flops=_grpo_flops, is_head=False,
    ),
)  # fmt: skip
