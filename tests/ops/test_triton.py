"""The helpers that op files share, and the interpreter that judges them on a CPU."""

from __future__ import annotations

import sys

import pytest
import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensorMode

import ds_fused.ops.common._triton as shared
import ds_fused.ops.registry  # noqa: F401  # all op files
from ds_fused.ops import rms_norm
from ds_fused.ops.common._rows import walk


@triton.jit
def _round_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + cols, mask=cols < n, other=0.0)
        tl.store(y_ptr + cols, x.to(tl.bfloat16).to(tl.float32), mask=cols < n)


def test_kernels_round_to_bf16_as_pytorch_does(device):
    # triton's own interpreter cuts off (tests/interpreter.py)
    x = torch.linspace(-3, 3, 1001, device=device)
    y = torch.empty_like(x)
    _round_kernel[(1,)](x, y, x.numel(), BLOCK=256)
    assert torch.equal(y, x.bfloat16().float())


def test_no_kernel_is_tuned_where_it_trains():
    """What a launch chooses is data, measured by benchmarks/tune.py: no step of a training tries one and another."""
    tuned = triton.runtime.Autotuner, triton.runtime.Heuristics
    modules = [module for name, module in sys.modules.items() if name.startswith("ds_fused.ops.")]
    kernels = {name: x for module in modules for name, x in vars(module).items() if name.endswith("_kernel")}
    assert len(kernels) > 50
    assert [name for name, kernel in kernels.items() if isinstance(kernel, tuned)] == []


def test_kernels_run_here(device):
    assert shared.runs_kernels(torch.empty(1, device=device))
    assert not shared.runs_kernels(torch.empty(1, device=device), torch.empty(1, device="meta"))


def test_a_fake_tensor_goes_to_pytorch():
    """It has no memory for a kernel, whichever device it says it lies on."""
    with FakeTensorMode():
        x = torch.empty(2, 8, device="cuda")
        assert not shared.runs_kernels(x)
        y = rms_norm(x, torch.empty(8, device="cuda"))
    assert y.shape == (2, 8) and y.device.type == "cuda"


@pytest.mark.parametrize(
    "make, copies",
    [
        (lambda x: x, False),  # [2, 3, 4, 5] without gaps
        (lambda x: x[..., 1:4], False),  # columns of wider rows
        (lambda x: x[:, :, 1], False),  # every fourth row
        (lambda x: x[0, 0, 0], False),  # a vector is one row
        (lambda x: x[:1, :1, :1].expand(2, 3, 4, 5), False),  # one row, read many times
        (lambda x: x.transpose(1, 2), True),
        (lambda x: x.transpose(2, 3), True),
        (lambda x: x[:0], False),
        (lambda x: x[..., :0], False),
        (lambda x: x[0, 0, 0, 0], False),  # a number
    ],
)
def test_rows_of(make, copies, device):
    x = make(torch.arange(120.0, device=device).view(2, 3, 4, 5))
    rows = shared.rows_of(x)
    assert rows.ndim == 2 and rows.shape[1] == (x.shape[-1] if x.ndim else 1)
    assert torch.equal(rows.reshape(x.shape), x)
    if x.numel():
        assert (rows.data_ptr() != x.data_ptr()) == copies


def test_walks(device):
    whole, gaps = torch.ones(5, 7, device=device), torch.ones(5, 9, device=device)[:, :7]
    number = torch.ones((), device=device).expand(5, 7)  # an upstream gradient without memory of its own
    for others in ((), (whole,), (number,)):
        way = walk(whole.shape, 4, whole, *others)
        assert (way.flat, way.n_cols, way.programs, {*way.strides}) == (True, 35, 9, {0})
        assert all(torch.equal(tensor, torch.ones_like(tensor)) and tensor.is_contiguous() for tensor in way.tensors)
    way = walk(whole.shape, 4, whole, gaps)
    assert (way.flat, way.n_cols, way.programs, way.strides) == (False, 7, 10, (7, 9))
    assert way.tensors[1].data_ptr() == gaps.data_ptr()


def test_rows_that_share_memory():
    rows = torch.ones(4, 6)
    assert all(map(shared.lie_apart, (rows, rows[:, :3], rows[:1].expand(1, 6), rows[:0])))
    assert not any(map(shared.lie_apart, (rows[:1].expand(3, 6), rows.view(-1).as_strided((3, 6), (5, 1)))))


def test_sizes():
    assert [shared.power_of_2(n) for n in (0, 1, 2, 3, 1024, 1025)] == [1, 1, 2, 4, 1024, 2048]
    assert [shared.cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert shared.warps_for(1) == 1
    assert shared.warps_for(1 << 20) * shared.LANES == 1024


def test_autocast_dtype(device):
    x = torch.empty(1, device=device)
    assert shared.autocast_dtype(x) is None
    with torch.autocast(device.type, torch.bfloat16):
        assert shared.autocast_dtype(x) is torch.bfloat16
