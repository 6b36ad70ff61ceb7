"""Generalized Jensen-Shannon divergence of a student from a teacher, from the logits of both, softmax included.

Per token, with P = softmax(teacher_logits / temperature), Q = softmax(student_logits / temperature):

    M    = beta * P + (1 - beta) * Q
    loss = beta * KL(P || M) + (1 - beta) * KL(Q || M)      0 < beta < 1
    loss = KL(P || Q), forward                              beta = 0
    loss = KL(Q || P), reverse                              beta = 1

as in "On-Policy Distillation of Language Models" (Agarwal et al. 2023); the two KLs are the limits of loss / beta and
of loss / (1 - beta). TRL and Liger mean the same by beta. Nothing is multiplied by temperature**2.

Traffic per logit and the gradients: see _divergence_kernels.py; what is saved for backward: see _divergence.py.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._triton import runs_kernels
from ds_fused.ops.losses._divergence import check_pair, counting_pair, divergence, reduced_pair
from ds_fused.ops.losses._divergence_kernels import Divergence


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of rows; 0 from where p is 0, whatever q is."""
    p = log_p.exp()
    return (p * torch.where(p == 0.0, 0.0, log_p - log_q)).sum(-1)


def jsd_reference(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    labels: Tensor | None = None,  # [...]
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    student, teacher, ignored = counting_pair(student_logits, teacher_logits, labels, temperature, ignore_index)
    log_q, log_p = F.log_softmax(student, -1), F.log_softmax(teacher, -1)
    if beta == 0.0:
        loss = _kl(log_p, log_q)
    elif beta == 1.0:
        loss = _kl(log_q, log_p)
    else:
        # finite: a mean of two -inf has no gradient
        log_p, log_q = (x.clamp_min(0.25 * torch.finfo(x.dtype).min) for x in (log_p, log_q))
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        loss = beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)
    return reduced_pair(loss, student_logits.shape[:-1], ignored, reduction)


def jsd(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor,  # [..., V]
    labels: Tensor | None = None,  # [...] int64 or int32
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Generalized Jensen-Shannon divergence over the vocabulary, in fp32; the mean is over the tokens that count.

    ``beta`` = 0 is KL(teacher || student), 1 is KL(student || teacher). ``labels`` only say which tokens are ignored.
    Log-probabilities are logits too: softmax gives back their distribution. The teacher gets a gradient if it
    requires one.
    """
    check_pair("jsd", student_logits, teacher_logits, labels, temperature, ignore_index, reduction)
    check_numbers("jsd", beta=beta)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"jsd: beta is {beta}; it must lie in [0, 1]")
    if not runs_kernels(student_logits, teacher_logits):
        return jsd_reference(
            student_logits, teacher_logits, labels,
            beta=beta, temperature=temperature, ignore_index=ignore_index, reduction=reduction,
        )  # fmt: skip
    p, q = (student_logits, teacher_logits) if beta == 1.0 else (teacher_logits, student_logits)
    kind = "jsd" if 0.0 < beta < 1.0 else "kl"
    return divergence("jsd", p, q, labels, Divergence(kind, float(beta), 1.0 / temperature, ignore_index), reduction)
