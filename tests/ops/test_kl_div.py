"""kl_div: loss and both gradients against fp64, equal to PyTorch's wherever that is a number, nothing for no target."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, nan_filled, randn

from ds_fused.ops.losses.kl_div import kl_div, kl_div_reference

op_file = importlib.import_module("ds_fused.ops.losses.kl_div")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "batchmean", "sum", "none"]


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setattr(op_file, "BLOCK", 32)


def some(*shape, device, log_target):
    target = 2 * randn(*shape, device=device, seed=1)
    return [
        (2 * randn(*shape, device=device)).log_softmax(-1),
        target.log_softmax(-1) if log_target else target.softmax(-1),
    ]


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 2, 4097)])  # least; odd; one column over a block
def test_kl_div(shape, dtype, log_target, device):
    inputs = some(*shape, device=device, log_target=log_target)
    as_accurate(kl_div, kl_div_reference, inputs, dtype, log_target=log_target, reduction="batchmean")


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_blocks_and_rows_apart(reduction, log_target, device, blocks):
    x, t = some(2, 2, 43, device=device, log_target=log_target)
    options = {"log_target": log_target, "reduction": reduction}
    as_accurate(kl_div, kl_div_reference, [x, t], torch.bfloat16, **options)
    x, t = x.bfloat16()[..., 3:38], t.bfloat16().transpose(0, 1).contiguous().transpose(0, 1)[..., 5:40]
    as_accurate(kl_div, kl_div_reference, [x, t], torch.bfloat16, **options)
    as_accurate(kl_div, kl_div_reference, [x.float(), t], torch.float32, **options)  # two dtypes


@pytest.mark.all
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 31, 32, 33, 96])  # around a block
def test_full_product(width, dtype, reduction, log_target, device, blocks):
    inputs = some(4, width, device=device, log_target=log_target)
    as_accurate(kl_div, kl_div_reference, inputs, dtype, log_target=log_target, reduction=reduction)


@pytest.mark.gpu
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_size(dtype, log_target, device):
    inputs = some(255, 128256, device=device, log_target=log_target)
    as_accurate(kl_div, kl_div_reference, inputs, dtype, log_target=log_target, reduction="batchmean")


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_over_two_to_the_31_elements(device):
    x = torch.randn(16800, 128256, device=device, dtype=torch.bfloat16).requires_grad_()
    t = torch.rand(16800, 128256, device=device, dtype=torch.bfloat16)
    loss = kl_div(x, t, reduction="none")
    (dx,) = torch.autograd.grad(loss, x, torch.ones_like(loss))
    for rows in (slice(0, 4), slice(-4, None)):
        exact = kl_div_reference(x.detach()[rows], t[rows], reduction="none")
        assert torch.equal(loss[rows], exact) and torch.equal(dx[rows], -t[rows])


@pytest.mark.parametrize("frozen", [0, 1])
@pytest.mark.parametrize("log_target", [False, True])
def test_frozen(frozen, log_target, device):
    inputs = some(3, 7, device=device, log_target=log_target)
    as_accurate(kl_div, kl_div_reference, inputs, torch.bfloat16, frozen=(frozen,), log_target=log_target)


def test_a_frozen_target_keeps_no_input(device):
    x, t = (y.float() for y in some(3, 7, device=device, log_target=False))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.data_ptr()) or y, lambda y: y):
        kl_div(x.requires_grad_(), t)
    assert kept == [t.data_ptr()]


@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (7,), ()])
def test_the_reference_is_pytorch(shape, reduction, log_target):
    inputs = (
        [y.requires_grad_() for y in some(*shape, device="cpu", log_target=log_target)]
        if shape
        else [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (-0.3, 0.4)]
    )
    results = []
    for loss_of in (
        partial(F.kl_div, reduction=reduction, log_target=log_target),
        partial(kl_div_reference, reduction=reduction, log_target=log_target),
    ):
        loss = loss_of(*inputs)
        results.append([loss, *torch.autograd.grad(loss.sum(), inputs)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("log_target", [False, True])
def test_no_target_counts_nothing(log_target, device):
    x, t = some(4, 9, device=device, log_target=log_target)
    t[:, 2:5] = float("-inf") if log_target else 0.0
    x[:, 4:6] = float("-inf")  # once where the target has something: an infinite loss; PyTorch has NaN for the other
    as_accurate(kl_div, kl_div_reference, [x, t], torch.float32, log_target=log_target, reduction="none", frozen=(1,))
    x[:, 4:6] = -1.0
    as_accurate(kl_div, kl_div_reference, [x, t], torch.float32, log_target=log_target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_under_autocast_a_result_has_the_dtype_of_pytorchs(dtype, device):
    x, target = (t.to(dtype) for t in some(3, 6, device=device, log_target=False))
    with torch.autocast(device.type, torch.bfloat16):
        wanted = torch.nn.functional.kl_div(x, target, reduction="none")
        assert kl_div(x, target, reduction="none").dtype == wanted.dtype


def test_empty(device):
    x = torch.empty(0, 7, device=device, requires_grad=True)
    for reduction, is_right in (("mean", torch.isnan), ("batchmean", torch.isnan), ("sum", torch.logical_not)):
        loss = kl_div(x, x.detach(), reduction=reduction)
        with nan_filled():
            (dx,) = torch.autograd.grad(loss, x)
        assert is_right(loss) and dx.shape == (0, 7)


def test_plain_path_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, t = some(3, 7, device="cpu", log_target=False)
    assert torch.equal(kl_div(x, t), kl_div_reference(x, t))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": torch.zeros(7)}, r"input \(2, 7\) and target \(7,\) must have one shape"),
        ({"target": torch.zeros(2, 7, device="meta")}, "target is on meta, input on cpu"),
        ({"reduction": "avg"}, "reduction is 'avg'; it must be 'mean', 'batchmean', 'sum' or 'none'"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=f"kl_div: .*{message}"):
        kl_div(**{"input": torch.zeros(2, 7), "target": torch.zeros(2, 7), **changes})


def test_fp64_has_no_kernel(device):
    wide = torch.zeros(2, 7, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="kl_div: input is torch.float64"):
        kl_div(wide, wide)
