"""Partial sums of which two programs share a row: scratch is half as large, and the same input has the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from accuracy import as_accurate, randn, same_bits
from allocations import Allocations
from torch import Tensor

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _sums
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._sums import leave, partials, sharers

# op -> which of its tensors are [D], of one modulation for all rows; the others are as x
VECTORS = {
    "rms_norm": (1,),
    "add_rms_norm": (2,),
    "layer_norm": (1, 2),
    "add_layer_norm": (2, 3),
    "modulated_rms_norm": (1, 2, 3),
}
every_op = pytest.mark.parametrize("name", VECTORS)
# the interpreter's multiprocessor has places for four programs of a row each: all four; three, of which one has its row
# alone; and narrow rows, several in a tile
SHAPES = [(7, 1025), (3, 1025), (5, 67, 33)]


@pytest.fixture
def shared(monkeypatch) -> None:
    """Tensors of all sizes are large."""
    monkeypatch.setattr(_sums, "SHARED_FROM", 0)


def tensors(name: str, shape: tuple[int, ...], device: torch.device) -> list[Tensor]:
    n = max(VECTORS[name]) + 1
    sizes = [shape[-1:] if i in VECTORS[name] else shape for i in range(n)]
    return [randn(*size, device=device, seed=i) for i, size in enumerate(sizes)]


@every_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_two_programs_share_a_row(shape, dtype, name, device, shared):
    op = registry.op(name)
    as_accurate(op.function, op.reference, tensors(name, shape, device), dtype, eps=0.5)


# one for each sample, whose programs are an odd number; one for each row
@pytest.mark.parametrize("of", [(2, 1, 1025), (2, 3, 1025)])
@pytest.mark.parametrize("frozen", [(), (1,), (3,)])
def test_programs_of_a_sample_share_rows(frozen, of, device, shared, monkeypatch):
    op = registry.op("modulated_rms_norm")
    monkeypatch.setattr(op.module, "WARPS_PER_MULTIPROCESSOR", 64)
    x, weight = randn(2, 3, 1025, device=device), randn(1025, device=device)
    inputs = [x, weight, randn(*of, device=device, seed=1), randn(*of, device=device, seed=2)]
    as_accurate(op.function, op.reference, inputs, torch.bfloat16, frozen=frozen)


def test_a_bias_of_rms_norm(device, shared):
    op = registry.op("rms_norm")
    inputs = [randn(7, 1025, device=device), randn(1025, device=device), randn(1025, device=device, seed=1)]

    def norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias: function(x, weight, bias=bias)

    as_accurate(norm(op.function), norm(op.reference), inputs, torch.bfloat16)


def largest_in_fp32(name: str, device: torch.device) -> int:
    """Elements of what a backward of 16 bits sums in."""
    leaves = [t.bfloat16().requires_grad_() for t in tensors(name, (8, 1025), device)]
    y = registry.op(name).function(*leaves)
    with Allocations() as made:
        sum(out.sum() for out in (y if isinstance(y, tuple) else (y,))).backward()
    return max(n for n, dtype, _ in made.seen.values() if dtype == torch.float32)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a GPU these shapes have a program a multiprocessor")
@every_op
def test_scratch_is_half_as_large(name, device, monkeypatch):
    apart = largest_in_fp32(name, device)
    monkeypatch.setattr(_sums, "SHARED_FROM", 0)
    assert 2 * largest_in_fp32(name, device) == apart


def test_who_shares():
    small = torch.empty(_sums.SHARED_FROM - 1, dtype=torch.uint8)
    large = torch.empty(_sums.SHARED_FROM // 2, dtype=torch.bfloat16)
    assert [sharers(x, 2) for x in (small, large)] == [1, 2]
    assert sharers(large, 1) == 1


@triton.jit
def _leave_kernel(values_ptr, order_ptr, sums_ptr, n_cols, n_sharers, BLOCK: tl.constexpr):
    program = tl.load(order_ptr + tl.program_id(0))
    cols = tl.arange(0, BLOCK)
    value = tl.load(values_ptr + program * n_cols + cols, mask=cols < n_cols, other=0.0)
    leave(sums_ptr + program // n_sharers * n_cols + cols, value, cols < n_cols, n_sharers)


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_the_order_of_two_does_not_matter(programs, device):
    # numbers of all sizes, of which sums are rounded
    values = (randn(programs, 1000, device=device) * torch.logspace(-3, 3, 1000, device=device)).float()
    values[0, :3] = torch.tensor([-0.0, float("inf"), float("nan")], device=device)
    rows = -(-programs // 2)
    found = []
    for order in (torch.arange(programs), torch.arange(programs).flip(0)):
        sums = partials(values, rows, 500, n_sharers=2)
        launch(_leave_kernel, (programs,), values, order.to(device), sums, 1000, 2, BLOCK=1024, num_warps=4)
        found.append(sums.view(rows, 1000))
    assert same_bits(*found)
    pairs = torch.cat([values, torch.zeros(2 * rows - programs, 1000, device=device)]).view(rows, 2, 1000)
    assert torch.equal(found[0].nan_to_num(), (0.0 + pairs[:, 0] + pairs[:, 1]).nan_to_num())


# programs are one, an odd number and the whole grid more than multiprocessors
@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("n", [133, 201, 2049])
def test_programs_of_a_gpu_share_rows(n, name, device, shared):
    op = registry.op(name)
    as_accurate(op.function, op.reference, tensors(name, (n, 4096), device), torch.bfloat16)


@pytest.mark.gpu
@every_op
@pytest.mark.parametrize("shape", [(8192, 4096), (16, 4096, 1152)])
def test_large_tensors_have_the_same_bits_each_time(shape, name, device):
    leaves = [t.bfloat16().requires_grad_() for t in tensors(name, shape, device)]
    assert sharers(leaves[0], 10**6) == 2
    y = registry.op(name).function(*leaves)
    outputs = y if isinstance(y, tuple) else (y,)
    dys = [randn(*shape, device=device, seed=9 + i).bfloat16() for i in range(len(outputs))]
    first, *others = (torch.autograd.grad(outputs, leaves, dys, retain_graph=True) for _ in range(10))
    for again in others:
        assert all(same_bits(a, b) for a, b in zip(again, first, strict=True))
