"""relu2: both passes against fp64, rows with gaps read in place."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

from ds_fused.ops.mlp.relu2 import BLOCK, relu2, relu2_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (2, 3, BLOCK + 1)])  # one element; odd; just over a block
def test_relu2(shape, dtype, device):
    as_accurate(relu2, relu2_reference, [randn(*shape, device=device)], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_relu2_of_a_real_size(dtype, device):
    as_accurate(relu2, relu2_reference, [randn(511, 24576, device=device)], dtype)  # Nemotron-4-15B


def test_strides(device):
    gaps = randn(3, 40, device=device).bfloat16()[:, 3:17]
    as_accurate(relu2, relu2_reference, [gaps], torch.bfloat16)
    columns_apart = randn(7, 3, device=device).bfloat16().t()
    as_accurate(relu2, relu2_reference, [columns_apart], torch.bfloat16)
    x = randn(3, 7, device=device).float().requires_grad_()
    (dx,) = torch.autograd.grad(relu2(x).sum(), x)  # an upstream gradient without memory of its own
    assert torch.equal(dx, 2 * x.detach().clamp_min(0))


def test_zeros_and_extremes(device):
    x = torch.tensor([-0.0, 0.0, float("nan"), -1e-30, 1e10, -1e10, float("inf"), float("-inf")], device=device)
    as_accurate(relu2, relu2_reference, [x], torch.float32)
    assert relu2(torch.full((1,), 300.0, dtype=torch.float16, device=device)).isinf().all()


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (2, 0, 3)])
def test_empty(shape, device):
    as_accurate(relu2, relu2_reference, [randn(*shape, device=device)], torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    x = torch.randn(2**18 + 1, 2**13, dtype=torch.bfloat16, device=device).requires_grad_()
    y = relu2(x)
    y.backward(y.detach())
    tail = x.detach()[-3:].clone().requires_grad_()
    y_tail = relu2(tail)
    y_tail.backward(y_tail.detach())
    assert same_bits(y[-3:].detach(), y_tail.detach())
    assert same_bits(x.grad[-3:], tail.grad)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    x = randn(65, 257, device=device).bfloat16().requires_grad_()
    got, wanted = torch.compile(lambda x: relu2(x) * 2, fullgraph=True)(x), relu2(x) * 2
    assert torch.equal(got, wanted)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, wanted)))


def test_errors_and_the_reference(device, monkeypatch):
    with pytest.raises(ValueError, match="relu2: x is torch.float64"):
        relu2(torch.ones(2, 3, dtype=torch.float64, device=device))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert relu2(torch.ones(2, 3, dtype=torch.float64)).dtype == torch.float64
