"""How far a student's distribution over a vocabulary is from a frozen teacher's: the row passes of linear distillation.

With ``p = softmax(student / temperature)``, ``q = softmax(teacher / temperature)`` and ``m = beta q + (1 - beta) p``:

    0 < beta < 1   D = beta KL(q || m) + (1 - beta) KL(p || m)     dz = (1 - beta) p (log p - log m - KL(p || m))
    beta = 0       D = KL(q || p)                                  dz = p - q
    beta = 1       D = KL(p || q)                                  dz = p (log p - log q - D)

where dz is the gradient of D by ``student / temperature``. The kernels are _divergence_kernels.py's; here are the roles
that student and teacher have there, and the passes without kernels.

Sizes: N tokens, V vocabulary. The backward may see some columns of the rows alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.losses import _divergence_kernels
from ds_fused.ops.losses._divergence_kernels import N_STATS, Divergence
from ds_fused.ops.losses._loss import row_blocks


@dataclass(frozen=True)
class DivergenceOptions:
    """The divergence as a number of each token's two rows of logits."""

    beta: float = 0.5
    temperature: float = 1.0
    ignore_index: int = -100

    n_stats: ClassVar[int] = N_STATS

    @property
    def kind(self) -> str:
        """Which line of the table at the top."""
        return {0.0: "forward", 1.0: "reverse"}.get(self.beta, "mixture")

    def check(self, op: str) -> None:
        check_numbers(op, beta=self.beta, temperature=self.temperature)
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"{op}: beta is {self.beta}; it must lie in [0, 1]")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"{op}: temperature is {self.temperature}; it must be positive and finite")

    def passes(self, kernels: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        return (divergence_fwd, divergence_bwd) if kernels else (divergence_fwd_torch, divergence_bwd_torch)


def divergence_fwd(
    student: Tensor,  # [N, V]
    teacher: Tensor,  # [N, V]
    labels: Tensor | None,  # [N]
    loss: Tensor,  # [N] fp32, written
    stats: Tensor,  # [N_STATS, N] fp32, written; what they are is the backward's business
    options: DivergenceOptions,
) -> None:
    p, q = _roles(student, teacher, options)
    _divergence_kernels.divergence_fwd(p, q, labels, loss, stats, _what(options), wants_p=p is student)


def divergence_bwd(
    dloss: Tensor,  # [N], any stride: an expanded scalar is not copied
    student: Tensor,  # [N, n_cols]
    teacher: Tensor,  # [N, n_cols]
    labels: Tensor | None,  # [N]
    stats: Tensor,  # [N_STATS, N], of whole rows
    dstudent: Tensor,  # [N, n_cols], written; may be student itself
    options: DivergenceOptions,
) -> None:
    p, q = _roles(student, teacher, options)
    dp, dq = (dstudent if logits is student else None for logits in (p, q))
    _divergence_kernels.divergence_bwd(dloss, p, q, labels, stats, dp, dq, _what(options))


def _roles(student: Tensor, teacher: Tensor, options: DivergenceOptions) -> tuple[Tensor, Tensor]:
    """p and q of _divergence_kernels.py."""
    return (student, teacher) if options.kind == "reverse" else (teacher, student)


def _what(options: DivergenceOptions) -> Divergence:
    kind = "jsd" if options.kind == "mixture" else "kl"
    return Divergence(kind, float(options.beta), 1.0 / options.temperature, options.ignore_index)


def divergence_fwd_torch(
    student: Tensor, teacher: Tensor, labels: Tensor | None, loss: Tensor, stats: Tensor, options: DivergenceOptions
) -> None:
    """divergence_fwd without kernels."""
    beta = options.beta
    for rows in row_blocks(student):
        parts = []
        for i, logits in ((0, student), (2, teacher)):
            z = logits[rows].to(loss.dtype) * (1.0 / options.temperature)
            stats[i, rows] = z.amax(1)
            z.sub_(stats[i, rows, None])
            stats[i + 1, rows] = z.exp().sum(1).log()
            parts.append(z.sub_(stats[i + 1, rows, None]))
        a, b = parts
        p, q = a.exp(), b.exp()
        if options.kind == "mixture":
            of_p, of_q = _from_mixture_torch(a, b, beta)
            mean = _sum(p, of_p)
            apart = beta * _sum(q, of_q) + (1.0 - beta) * mean
        else:
            mean = apart = _sum(q, b - a) if options.kind == "forward" else _sum(p, a - b)
        loss[rows], stats[4, rows] = apart, mean
    if labels is not None:
        ignored = labels == options.ignore_index
        loss.masked_fill_(ignored, 0.0)
        stats.masked_fill_(ignored, 0.0)


def divergence_bwd_torch(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    dstudent: Tensor,
    options: DivergenceOptions,
) -> None:
    """divergence_bwd without kernels."""
    scale = 1.0 / options.temperature
    for rows in row_blocks(student):
        a, b = (
            (logits[rows].to(stats.dtype) * scale).sub_(stats[i, rows, None]).sub_(stats[i + 1, rows, None])
            for i, logits in ((0, student), (2, teacher))
        )
        p = a.exp()
        if options.kind == "forward":
            dz = p - b.exp()
        else:
            gap = a - b if options.kind == "reverse" else _from_mixture_torch(a, b, options.beta)[0]
            weight = 1.0 if options.kind == "reverse" else 1.0 - options.beta
            dz = weight * p * (gap.masked_fill_(p == 0.0, 0.0) - stats[4, rows, None])
        dz.mul_(dloss[rows, None] * scale)
        if labels is not None:
            dz.masked_fill_((labels[rows] == options.ignore_index)[:, None], 0.0)
        dstudent[rows] = dz.to(dstudent.dtype)


def _from_mixture_torch(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    d = b - a
    t = (-d.abs()).exp_()
    ahead = d > 0.0
    log_m = torch.where(ahead, beta + (1.0 - beta) * t, (1.0 - beta) + beta * t).log_()
    return torch.where(ahead, -d, 0.0) - log_m, torch.where(ahead, 0.0, d) - log_m


def _sum(p: Tensor, gap: Tensor) -> Tensor:
    return (p * gap.masked_fill_(p == 0.0, 0.0)).sum(1)
