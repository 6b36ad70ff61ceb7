"""Kullback-Leibler divergence of a student's head from a teacher's, without the whole logits of either.

Per token, with ``p`` the student's distribution and ``q`` the teacher's, each ``softmax(F.linear(x, weight, bias) /
temperature)``:

    loss = sum(q * (log q - log p))       dz = p - q                            forward: the student covers the teacher
    loss = sum(p * (log p - log q))       dz = p * (log p - log q - loss)       reverse: it seeks the teacher's modes

These are the ends of linear_jsd, beta = 0 and beta = 1. _linear_divergence.py says how they are computed, what is saved
for backward and what it costs; _divergence_kernels.py has the kernels.

Sizes: M tokens (every leading dimension, flattened), H hidden (each model its own), V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from ds_fused.ops.vocab._linear_divergence import linear_divergence
from ds_fused.ops.vocab._teacher_divergence import DivergenceOptions
from ds_fused.ops.vocab.linear_jsd import linear_jsd_reference


def linear_kl_div_reference(
    student_x: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_x: Tensor,  # [..., H']
    teacher_weight: Tensor,  # [V, H']
    labels: Tensor | None = None,  # [...]
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What this file computes, in PyTorch and with all logits at once: the specification and the tests' yardstick."""
    return linear_jsd_reference(
        student_x, student_weight, teacher_x, teacher_weight, labels,
        beta=float(reverse), temperature=temperature, student_bias=student_bias, teacher_bias=teacher_bias,
        ignore_index=ignore_index, reduction=reduction,
    )  # fmt: skip


def linear_kl_div(
    student_x: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_x: Tensor,  # [..., H']
    teacher_weight: Tensor,  # [V, H']
    labels: Tensor | None = None,  # [...] int64 or int32
    *,
    reverse: bool = False,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_mb: int = 512,
    keep_mb: int = 2048,
    grad_in_forward: bool = True,
) -> Tensor:
    """KL(teacher || student) of two heads, or with ``reverse`` KL(student || teacher), in fp32.

    It is not multiplied by ``temperature ** 2``. The teacher is frozen: its tensors must not require a gradient. Tokens
    whose label is ``ignore_index`` count nothing; labels have no other meaning.

    ``chunk_mb``: MiB of logits, both models', that are worked on at a time; less where weights are small.

    ``grad_in_forward``: where the loss is a mean or a sum and x not in fp16, gradients are made in the forward, chunk
    after chunk: each logit is computed once and none is kept, and a second backward raises. Otherwise, and in a graph
    of torch.compile, ``keep_mb`` MiB of gradients of the student's logits are kept for backward; for the other tokens
    both logits are computed again. The result is the same.
    """
    return linear_divergence(
        "linear_kl_div", student_x, student_weight, teacher_x, teacher_weight, labels,
        DivergenceOptions(float(reverse), temperature, ignore_index), student_bias, teacher_bias, reduction,
        chunk_mb, keep_mb, grad_in_forward,
    )  # fmt: skip
