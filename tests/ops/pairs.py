"""What the tests of jsd and tvd share: logits of a student and a teacher, and what holds for both losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from accuracy import nan_filled, randn
from torch import Tensor


def pair(*shape: int, device: torch.device, ignore_index: int = -100) -> list[Tensor]:
    """Student, teacher and labels, a third of them ignored."""
    labels = torch.arange(torch.Size(shape[:-1]).numel()).view(shape[:-1])
    labels.view(-1)[1::3] = ignore_index
    return [3 * randn(*shape, device=device), 3 * randn(*shape, device=device, seed=1), labels.to(device)]


def ignored_rows_are_zero_and_not_read(loss_of: Callable[..., Tensor], device: torch.device) -> None:
    student, teacher, labels = pair(4, 7, device=device)
    student, teacher = student.float(), teacher.float()
    student[1], teacher[1] = float("nan"), float("inf")
    student.requires_grad_(), teacher.requires_grad_()
    loss = loss_of(student, teacher, labels, reduction="none")
    upstream = torch.tensor([1.0, float("inf"), 1.0, 2.0], device=device)
    with nan_filled():
        gradients = torch.autograd.grad(loss, (student, teacher), upstream)
    assert loss[1] == 0 and loss.isfinite().all()
    for gradient in gradients:
        assert not gradient[1].any() and gradient[0::2].isfinite().all() and gradient[0::2].abs().sum(1).all()


def nothing_counts(loss_of: Callable[..., Tensor], device: torch.device) -> None:
    student, teacher, labels = pair(3, 7, device=device)
    student = student.bfloat16().requires_grad_()
    for reduction, is_right in (("mean", torch.isnan), ("sum", torch.logical_not)):
        loss = loss_of(student, teacher.bfloat16(), torch.full_like(labels, -100), reduction=reduction)
        (dstudent,) = torch.autograd.grad(loss, student)
        assert is_right(loss) and not dstudent.any()
    empty = torch.empty(0, 7, device=device, requires_grad=True)
    assert loss_of(empty, empty.detach()).isnan()
    loss = loss_of(empty, empty.detach(), reduction="sum")
    loss.backward()
    assert loss == 0 and empty.grad.shape == (0, 7)


def same_distribution(loss_of: Callable[..., Tensor], device: torch.device) -> None:
    """No loss and no slope, to the last bit."""
    student = pair(4, 71, device=device)[0].bfloat16().requires_grad_()
    loss = loss_of(student, student.detach(), reduction="none")
    (dstudent,) = torch.autograd.grad(loss.sum(), student)
    assert not loss.any() and not dstudent.any()


def over_two_to_the_31_elements(
    loss_of: Callable[..., Tensor], reference: Callable[..., Tensor], device: torch.device
) -> None:
    student = torch.randn(16800, 128256, device=device, dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn(16800, 128256, device=device, dtype=torch.bfloat16)
    loss = loss_of(student, teacher, reduction="none")
    (dstudent,) = torch.autograd.grad(loss.sum(), student)
    for rows in (slice(0, 4), slice(-4, None)):
        part = student.detach()[rows].double().requires_grad_()
        exact = reference(part, teacher[rows].double(), reduction="none")
        (dexact,) = torch.autograd.grad(exact.sum(), part)
        assert (loss[rows] - exact).abs().max() < 1e-5
        # where two of a million probabilities are all but equal fp32 may take the other one for the larger, and tvd's
        # slope turns there
        p, q = (logits[rows].double().log_softmax(-1) for logits in (part.detach(), teacher))
        apart = (p - q).abs() > 2**-18
        assert ((dstudent[rows] - dexact).abs() * apart).max() < 2**-8 * dexact.abs().max()
        assert (~apart).sum() < 100


ERRORS = [
    ({"teacher_logits": torch.zeros(2, 8)}, r"student_logits \(2, 7\) and teacher_logits \(2, 8\) must have one shape"),
    ({"teacher_logits": torch.zeros(2, 7, device="meta")}, "teacher_logits are on meta, student_logits on cpu"),
    ({"student_logits": torch.zeros(2, 0), "teacher_logits": torch.zeros(2, 0)}, "a vocabulary of 0"),
    ({"labels": torch.tensor([0, 1, 2])}, r"labels \(3,\) must have the shape of the tokens, \(2,\)"),
    ({"labels": torch.tensor([0.0, 1.0])}, "labels are torch.float32; they must be int64 or int32"),
    ({"labels": torch.tensor([0, 1], device="meta")}, "labels are on meta"),
    ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
    ({"temperature": float("inf")}, "temperature is inf; it must be positive and finite"),
    ({"reduction": "avg"}, "reduction is 'avg'; it must be 'mean', 'sum' or 'none'"),
]


def refuses(loss_of: Callable[..., Tensor], changes: dict[str, object], message: str) -> None:
    arguments = {"student_logits": torch.zeros(2, 7), "teacher_logits": torch.zeros(2, 7), **changes}
    with pytest.raises(ValueError, match=f"{loss_of.__name__}: .*{message}"):
        loss_of(**arguments)
