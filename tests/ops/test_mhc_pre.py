"""mhc_pre: what a layer reads of streams, both ways, against fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

from ds_fused.ops.residual.mhc_pre import mhc_pre, mhc_pre_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs_of(*leading, n, c, device):
    return [randn(*leading, n, c, device=device), randn(*leading, n, device=device, seed=1)]


def judge(inputs, dtype, **options):
    as_accurate(mhc_pre, mhc_pre_reference, inputs, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; two blocks of columns, the last with one; more streams than usual
@pytest.mark.parametrize(("t", "n", "c"), [(1, 1, 1), (5, 3, 7), (2, 4, 1025), (3, 8, 5)])
def test_pre(t, n, c, dtype, device):
    judge(inputs_of(t, n=n, c=c, device=device), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "n", "c"), [(1023, 4, 4096), (515, 4, 7168), (67, 8, 1280), (33, 16, 2048)])
def test_real_sizes(t, n, c, dtype, device):
    judge(inputs_of(t, n=n, c=c, device=device), dtype)


def test_weights_of_another_dtype(device):
    x, pre = inputs_of(2, 3, n=4, c=9, device=device)
    judge([x, pre.float()], torch.bfloat16)
    judge([x.float(), pre.bfloat16()], torch.float32)


@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_frozen(frozen, device):
    judge(inputs_of(5, n=3, c=7, device=device), torch.bfloat16, frozen=frozen)


def test_strided(device):
    x, pre = (t.bfloat16() for t in inputs_of(6, 2, n=3, c=8, device=device))
    for at in (slice(None, None, 2), (slice(None), 1)):
        judge([x[at], pre[at]], torch.bfloat16)
    judge([x.transpose(1, 2), pre.transpose(1, 2)], torch.bfloat16)
    judge([x[:1].expand_as(x), pre], torch.bfloat16)


@pytest.mark.parametrize(("leading", "c"), [((0,), 5), ((2, 0), 5), ((2,), 0)])
def test_empty(leading, c, device):
    judge(inputs_of(*leading, n=3, c=c, device=device), torch.float32)


def test_one_token_without_a_dimension(device):
    judge(inputs_of(n=3, c=5, device=device), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    t, n, c = 2**17 + 3, 4, 4096
    x = torch.randn(t, n, c, device=device, dtype=torch.bfloat16).requires_grad_()
    pre = torch.rand(t, n, device=device).requires_grad_()
    y = mhc_pre(x, pre)
    dx, dpre = torch.autograd.grad(y, (x, pre), y.detach())
    tail = [t.detach()[-3:].clone().requires_grad_() for t in (x, pre)]
    y_tail = mhc_pre(*tail)
    tails = torch.autograd.grad(y_tail, tail, y_tail.detach())
    assert same_bits(y[-3:].detach(), y_tail.detach())
    assert same_bits(dx[-3:], tails[0]) and same_bits(dpre[-3:], tails[1])


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    torch.compiler.reset()
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(5, 13, n=4, c=257, device=device)]
    compiled = torch.compile(mhc_pre, fullgraph=True)
    got, wanted = compiled(*leaves), mhc_pre(*leaves)
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument(device):
    x, pre = (t.float() for t in inputs_of(2, n=3, c=5, device=device))
    with pytest.raises(ValueError, match=r"mhc_pre: x \(5,\) must have two last dimensions"):
        mhc_pre(x[0, 0], pre)
    with pytest.raises(ValueError, match=r"mhc_pre: x \(2, 18, 5\) has 18 streams .* 0 to 16"):
        mhc_pre(x.repeat(1, 6, 1), pre.repeat(1, 6))
    with pytest.raises(ValueError, match=r"mhc_pre: pre \(2, 2\) must be one value per stream of x"):
        mhc_pre(x, pre[:, :2])
    with pytest.raises(ValueError, match="mhc_pre: pre is torch.float64"):
        mhc_pre(x, pre.double())


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in inputs_of(2, n=3, c=5, device="cpu")]
    assert same_bits(mhc_pre(*inputs), mhc_pre_reference(*inputs))
