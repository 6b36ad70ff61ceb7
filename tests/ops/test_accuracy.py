"""The judge is judged: as_accurate must refuse ops that are wrong in the ways ops go wrong."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, nan_filled, randn, same_bits, ulp
from torch import Tensor

forgot = iter(range(100))  # differs from call to call


def double_reference(x: Tensor) -> Tensor:
    return 2 * x


class Faulty(torch.autograd.Function):
    """2 x, with one fault."""

    @staticmethod
    def forward(ctx, x: Tensor, fault: str) -> Tensor:
        ctx.fault = fault
        y = torch.empty_like(x)
        y.copy_(2 * x)
        if fault == "imprecise":
            y *= 1.001
        elif fault == "unwritten":
            y[1:] = torch.empty_like(x)[1:]
        elif fault == "random":
            y += next(forgot) * 1e-7
        elif fault == "writes input":
            x.detach().zero_()
        elif fault == "dtype":
            y = y.double()
        return y

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, None]:
        if ctx.fault == "gradient":
            return 2.001 * dy, None
        if ctx.fault == "no gradient":
            return None, None
        if ctx.fault == "writes dy":
            return dy.mul_(2), None
        return 2 * dy.float(), None


@pytest.mark.parametrize(
    "fault, message",
    [
        ("imprecise", "output 0: error"),
        ("unwritten", "output 0: NaN where fp64 has none"),
        ("random", "output 0 differs from run to run"),
        ("writes input", "input 0 was written to"),
        ("writes dy", "the gradient of output 0 was written to"),
        ("gradient", "gradient of input 0: error"),
        ("no gradient", "gradient of input 0: missing"),
        ("dtype", "output 0 is torch.float64"),
    ],
)
def test_faults_are_found(fault, message, device):
    with pytest.raises(AssertionError, match=message):
        as_accurate(lambda x: Faulty.apply(x, fault), double_reference, [randn(5, 3, device=device)], torch.float32)


def test_no_fault(device):
    as_accurate(lambda x: Faulty.apply(x, ""), double_reference, [randn(5, 3, device=device)], torch.float32)


def test_a_gradient_nobody_asked_for(device):
    inputs = [randn(5, device=device), randn(5, device=device)]
    as_accurate(torch.mul, torch.mul, inputs, torch.float32, frozen=(1,))
    with pytest.raises(RuntimeError, match="does not require grad"):
        as_accurate(torch.mul, torch.mul, inputs, torch.float32, frozen=(0, 1))


def test_memory_is_nan(device):
    with nan_filled():
        made = [torch.empty(3, device=device), torch.ones(3, device=device).new_empty(2)]
        made += [torch.empty_like(made[0]), torch.empty_strided((2, 2), (1, 2), device=device)]
    assert all(x.isnan().all() for x in made)


def test_bits():
    zero = torch.zeros(1)
    assert not same_bits(zero, -zero)
    assert same_bits(torch.full((1,), float("nan")), torch.full((1,), float("nan")))
    assert not same_bits(zero, zero.double())
    x = torch.tensor([0.75, 1.0, 1.5, 2.0, 0.0], dtype=torch.float64)
    eps = torch.finfo(torch.bfloat16).eps
    assert ulp(x, torch.bfloat16).tolist() == [eps / 2, eps, eps, 2 * eps, torch.finfo(torch.bfloat16).tiny * eps]
