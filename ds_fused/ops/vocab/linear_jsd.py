"""Generalised Jensen-Shannon divergence of a student's head and a teacher's, without the whole logits of either.

    p = softmax(F.linear(student_x, student_weight, student_bias) / temperature)
    q = softmax(F.linear(teacher_x, teacher_weight, teacher_bias) / temperature)
    m = beta * q + (1 - beta) * p
    loss = beta * KL(q || m) + (1 - beta) * KL(p || m)        beta = 0: KL(q || p);  beta = 1: KL(p || q)

The loss of on-policy distillation (Agarwal et al., "On-Policy Distillation of Language Models", 2023), from hidden
states. _linear_divergence.py says how it is computed, what is saved for backward and what it costs;
_divergence_kernels.py has the kernels.

Sizes: M tokens (every leading dimension, flattened), H hidden (each model its own), V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.losses.jsd import jsd_reference
from ds_fused.ops.vocab._linear_divergence import linear_divergence
from ds_fused.ops.vocab._teacher_divergence import DivergenceOptions


def linear_jsd_reference(
    student_x: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_x: Tensor,  # [..., H']
    teacher_weight: Tensor,  # [V, H']
    labels: Tensor | None = None,  # [...]
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What this file computes, in PyTorch and with all logits at once: the specification and the tests' yardstick."""
    student = F.linear(student_x, student_weight, student_bias)
    teacher = F.linear(teacher_x, teacher_weight, teacher_bias).detach()
    return jsd_reference(
        student, teacher, labels, beta=beta, temperature=temperature, ignore_index=ignore_index, reduction=reduction
    )


def linear_jsd(
    student_x: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_x: Tensor,  # [..., H']
    teacher_weight: Tensor,  # [V, H']
    labels: Tensor | None = None,  # [...] int64 or int32
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_mb: int = 512,
    keep_mb: int = 2048,
    grad_in_forward: bool = True,
) -> Tensor:
    """The generalised Jensen-Shannon divergence of two heads, in fp32; the logits of neither exist as a whole.

    ``beta * KL(teacher || m) + (1 - beta) * KL(student || m)`` with the mixture ``m = beta * teacher + (1 - beta) *
    student``; ``beta=0`` is KL(teacher || student), the forward KL, and ``beta=1`` KL(student || teacher). It is not
    multiplied by ``temperature ** 2``. The teacher is frozen: its tensors must not require a gradient. Tokens whose
    label is ``ignore_index`` count nothing; labels have no other meaning.

    ``chunk_mb``: MiB of logits, both models', that are worked on at a time; less where weights are small.

    ``grad_in_forward``: where the loss is a mean or a sum and x not in fp16, gradients are made in the forward, chunk
    after chunk: each logit is computed once and none is kept, and a second backward raises. Otherwise, and in a graph
    of torch.compile, ``keep_mb`` MiB of gradients of the student's logits are kept for backward; for the other tokens
    both logits are computed again. The result is the same.
    """
    return linear_divergence(
        "linear_jsd", student_x, student_weight, teacher_x, teacher_weight, labels,
        DivergenceOptions(beta, temperature, ignore_index), student_bias, teacher_bias, reduction, chunk_mb, keep_mb,
        grad_in_forward,
    )  # fmt: skip
