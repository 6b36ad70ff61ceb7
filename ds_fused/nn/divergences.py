"""Divergences from a target or a teacher: of log-probabilities, logits and heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ds_fused.nn._options import known, listed, nothing
from ds_fused.ops import jsd, kl_div, linear_cosine, linear_jsd, linear_kl_div, tvd


class KLDivLoss(torch.nn.KLDivLoss):
    """``torch.nn.KLDivLoss``, of log-probabilities; computed and summed in fp32."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, log_target=self.log_target, reduction=self.reduction)


class _DivergenceLoss(torch.nn.Module):
    """``op(student_logits, teacher_logits, labels)``; ``options`` are the op's: temperature, reduction ..."""

    op: Callable[..., Tensor]
    passed: tuple[str, ...] = ("labels",)  # by forward
    shapes: tuple[tuple[int, int], ...] = ((0, 1), (0, 1))  # of tensors without a row

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = known(self, self.op, options, self.passed)
        self.op(*(nothing(*shape) for shape in self.shapes), **options)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.op(student_logits, teacher_logits, labels, **self.options)

    def extra_repr(self) -> str:
        return listed(self.options)


class JSDLoss(_DivergenceLoss):
    """The generalised Jensen-Shannon divergence from a teacher's logits, ``jsd``; ``beta`` is an option too."""

    op = staticmethod(jsd)


class TVDLoss(_DivergenceLoss):
    """The total variation distance from a teacher's logits, ``tvd``."""

    op = staticmethod(tvd)


class _HeadsLoss(_DivergenceLoss):
    """``op(student_x, student_weight, teacher_x, teacher_weight, labels)``; the teacher is frozen."""

    passed = ("labels", "student_bias", "teacher_bias")
    shapes = ((0, 1), (1, 1), (0, 1), (1, 1))

    def forward(
        self,
        student_x: Tensor,
        student_weight: Tensor,
        teacher_x: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        heads = student_x, student_weight, teacher_x, teacher_weight
        return self.op(*heads, labels, student_bias=student_bias, teacher_bias=teacher_bias, **self.options)


class LinearJSDLoss(_HeadsLoss):
    """The generalised Jensen-Shannon divergence of two heads, ``linear_jsd``; ``beta`` is an option too."""

    op = staticmethod(linear_jsd)


class LinearKLDivLoss(_HeadsLoss):
    """The KL divergence of two heads, ``linear_kl_div``, forward; ``reverse`` is an option too."""

    op = staticmethod(linear_kl_div)


class LinearCosineLoss(_HeadsLoss):
    """One minus the cosine between the logits of two heads, ``linear_cosine``."""

    op = staticmethod(linear_cosine)
