"""Total variation distance of a student from a teacher, from the logits of both, softmax included.

Per token, with P = softmax(teacher_logits / temperature), Q = softmax(student_logits / temperature):

    loss = sum(abs(P - Q)) / 2

where P = Q in a column, that column's slope is 0. Traffic per logit and the gradients: see _divergence_kernels.py; what
is saved for backward: see _divergence.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._triton import runs_kernels
from ds_fused.ops.losses._divergence import check_pair, counting_pair, divergence, reduced_pair
from ds_fused.ops.losses._divergence_kernels import Divergence


def tvd_reference(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    labels: Tensor | None = None,  # [...]
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    student, teacher, ignored = counting_pair(student_logits, teacher_logits, labels, temperature, ignore_index)
    loss = 0.5 * (torch.softmax(teacher, -1) - torch.softmax(student, -1)).abs().sum(-1)
    return reduced_pair(loss, student_logits.shape[:-1], ignored, reduction)


def tvd(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    labels: Tensor | None = None,  # [...] int64 or int32
    *,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Half the sum of abs(P - Q) over the vocabulary, in fp32; the mean is over the tokens that count.

    ``labels`` only say which tokens are ignored. Whoever has probabilities passes their logarithms: softmax gives them
    back. The teacher gets a gradient if it requires one.
    """
    check_pair("tvd", student_logits, teacher_logits, labels, temperature, ignore_index, reduction)
    if not runs_kernels(student_logits, teacher_logits):
        return tvd_reference(
            student_logits, teacher_logits, labels,
            temperature=temperature, ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
    what = Divergence("tvd", scale=1.0 / temperature, ignore_index=ignore_index)
    return divergence("tvd", teacher_logits, student_logits, labels, what, reduction)
