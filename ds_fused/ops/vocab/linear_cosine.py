"""How far a student's logits point away from a teacher's, without the whole logits of either.

    s = F.linear(student_x, student_weight, student_bias)      t = F.linear(teacher_x, teacher_weight, teacher_bias)
    loss = 1 - <s, t> / (|s| |t|)

A temperature would change nothing: lengths have no part in it. _linear_divergence.py says how it is computed, what is
saved for backward and what it costs; _cosine.py has the kernels.

Sizes: M tokens (every leading dimension, flattened), H hidden (each model its own), V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.losses._divergence import counting_pair, reduced_pair
from ds_fused.ops.vocab._cosine import EPS, CosineOptions
from ds_fused.ops.vocab._linear_divergence import linear_divergence


def linear_cosine_reference(
    student_x: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_x: Tensor,  # [..., H']
    teacher_weight: Tensor,  # [V, H']
    labels: Tensor | None = None,  # [...]
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What this file computes, in PyTorch and with all logits at once: the specification and the tests' yardstick."""
    student = F.linear(student_x, student_weight, student_bias)
    teacher = F.linear(teacher_x, teacher_weight, teacher_bias).detach()
    s, t, ignored = counting_pair(student, teacher, labels, 1.0, ignore_index)
    return reduced_pair(1.0 - F.cosine_similarity(s, t, -1, EPS), student_x.shape[:-1], ignored, reduction)


def linear_cosine(
    student_x: Tensor,  # [..., H]
    student_weight: Tensor,  # [V, H]
    teacher_x: Tensor,  # [..., H']
    teacher_weight: Tensor,  # [V, H']
    labels: Tensor | None = None,  # [...] int64 or int32
    *,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_mb: int = 512,
    keep_mb: int = 2048,
    grad_in_forward: bool = True,
) -> Tensor:
    """``1 - F.cosine_similarity(student's logits, teacher's logits, -1)``, in fp32.

    The teacher is frozen: its tensors must not require a gradient. Tokens whose label is ``ignore_index`` count
    nothing; labels have no other meaning.

    ``chunk_mb``, ``keep_mb``, ``grad_in_forward``: as linear_jsd's.
    """
    return linear_divergence(
        "linear_cosine", student_x, student_weight, teacher_x, teacher_weight, labels,
        CosineOptions(ignore_index), student_bias, teacher_bias, reduction, chunk_mb, keep_mb, grad_in_forward,
    )  # fmt: skip
