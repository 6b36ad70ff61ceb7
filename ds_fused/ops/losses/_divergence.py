"""What jsd and tvd share: autograd around the kernels of _divergence_kernels.py, checks, and steps of the references.

Saved for backward: the logits (no copy of them) and 24 bytes a token: peak and rest of each lse, and both sum(p * g).

Sizes: N tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._triton import check_dtypes, like, rows_of
from ds_fused.ops.losses._divergence_kernels import N_STATS, Divergence, divergence_bwd, divergence_fwd
from ds_fused.ops.losses._labels import flat_labels, label_facts
from ds_fused.ops.losses._loss import LossOptions, check_loss, reduced


class DivergenceFunction(torch.autograd.Function):
    """Logits [N, V] of p and of q to one loss a token [N], fp32: any reduction or weighting goes on top."""

    @staticmethod
    def forward(ctx, p: Tensor, q: Tensor, labels: Tensor | None, what: Divergence) -> Tensor:
        loss, stats = (p.new_empty(size, dtype=torch.float32) for size in (p.shape[0], (N_STATS, p.shape[0])))
        divergence_fwd(p, q, labels, loss, stats, what, ctx.needs_input_grad[0])
        ctx.save_for_backward(p, q, labels, stats)
        ctx.what = what
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        p, q, labels, stats = ctx.saved_tensors
        dp, dq = (like(x) if wanted else None for x, wanted in zip((p, q), ctx.needs_input_grad[:2], strict=True))
        divergence_bwd(dloss, p, q, labels, stats, dp, dq, ctx.what)
        return dp, dq, None, None


def divergence(
    op: str,
    p: Tensor,  # [..., V]
    q: Tensor,
    labels: Tensor | None,
    what: Divergence,
    reduction: str,
) -> Tensor:
    """The kernels' way, behind `check_pair`."""
    check_dtypes(op, p=p, q=q)
    flat = None if labels is None else flat_labels(labels)
    loss = DivergenceFunction.apply(rows_of(p), rows_of(q), flat, what)
    # no label has to be in the vocabulary here
    count = loss.shape[0] if flat is None else label_facts(flat, p.shape[-1], what.ignore_index)[0]
    return reduced(loss, p.shape[:-1], count, reduction)


def check_pair(
    op: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    temperature: float,
    ignore_index: int,
    reduction: str,
) -> None:
    """One clear error for each bad argument."""
    if student.ndim == 0 or student.shape != teacher.shape:
        raise ValueError(
            f"{op}: student_logits {tuple(student.shape)} and teacher_logits {tuple(teacher.shape)} must have one "
            "shape, [..., vocabulary]"
        )
    check_numbers(op, temperature=temperature)
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}; it must be positive and finite")
    if teacher.device != student.device:
        raise ValueError(f"{op}: teacher_logits are on {teacher.device}, student_logits on {student.device}")
    check_loss(op, LossOptions(ignore_index), labels, reduction, student.shape[:-1], student.shape[-1], student.device)


def counting_pair(
    student: Tensor, teacher: Tensor, labels: Tensor | None, temperature: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For the references: logits / temperature [N, V], in fp32 at least and zero for ignored tokens; who is ignored."""
    wide = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    s, t = (x.reshape(-1, x.shape[-1]).to(wide) / temperature for x in (student, teacher))
    if labels is None:
        return s, t, None
    ignored = labels.reshape(-1) == ignore_index
    return s.masked_fill(ignored[:, None], 0.0), t.masked_fill(ignored[:, None], 0.0), ignored


def reduced_pair(loss: Tensor, shape: torch.Size, ignored: Tensor | None, reduction: str) -> Tensor:
    """For the references: [N] to what `reduction` names."""
    if ignored is None:
        return reduced(loss, shape, loss.shape[0], reduction)
    return reduced(loss.masked_fill(ignored, 0.0), shape, (~ignored).sum(), reduction)
