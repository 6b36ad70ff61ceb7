"""Parts of a sum, as ranks have sent them, added up where it belongs; copies that run beside a product."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ds_fused.ops import _beside
from ds_fused.ops._beside import copy_beside
from ds_fused.ops._parts import BLOCK, sum_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("dtype", "kept", "adds"), list(product(DTYPES, (None, torch.float32), (False, True))))
@pytest.mark.parametrize("n", [0, 1, BLOCK, 3 * BLOCK + 17])
@pytest.mark.parametrize("beside", [False, True])
def test_one_rounding(dtype, kept, adds, n, beside, device):
    parts = torch.randn(5, n, device=device).to(dtype)
    out = torch.full((n,), 3.0 if adds else float("nan"), dtype=kept or dtype, device=device)
    sum_parts(parts, out, adds=adds, factor=0.75, beside=beside)
    true = 0.75 * parts.double().sum(0) + (3.0 if adds else 0.0)
    # fp32 sums of six numbers, then one rounding
    torch.testing.assert_close(out.double(), true, rtol=torch.finfo(out.dtype).eps, atol=2e-6)


def test_a_kernel_sums_as_plain_pytorch_does(device):
    parts, out = torch.randn(3, 1000, device=device), torch.empty(1000, device=device)
    sum_parts(parts, out, adds=False)
    assert torch.equal(out, parts.sum(0))


def test_an_overflow_stays_one(device):
    parts = torch.full((2, 8), 6e4, dtype=torch.float16, device=device)
    out = torch.empty(8, dtype=torch.float16, device=device)
    sum_parts(parts, out, adds=False)
    assert out.isinf().all()


@pytest.mark.parametrize("dtype", DTYPES)
# none, one, a turn, turns of several programs and a rest
@pytest.mark.parametrize("n", [0, 1, _beside.BLOCK, 5 * _beside.BLOCK + 17])
def test_a_copy(dtype, n, device):
    x = torch.randn(n, device=device).to(dtype)
    whole = torch.full((n + 2,), float("nan"), dtype=dtype, device=device)
    copy_beside(x, whole[1:-1])
    assert torch.equal(whole[1:-1], x) and whole[0].isnan() and whole[-1].isnan()


@pytest.mark.gpu
def test_room_beside_a_product(device):
    """A copy that is asked for in the middle of a product ends before it does."""
    x, weight, out = (torch.randn(size, 8192, device=device).bfloat16() for size in (8192, 32768, 8192))
    z = torch.empty(8192, 32768, dtype=torch.bfloat16, device=device)
    copied, beside = torch.empty_like(out), torch.cuda.Stream()
    copy_beside(out.view(-1), copied.view(-1))
    torch.mm(x, weight.t(), out=z)
    begin, end, of_copy = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record()
    torch.mm(x, weight.t(), out=z)
    end.record()
    beside.wait_event(begin)
    with torch.cuda.stream(beside):
        # so long the product has every multiprocessor
        torch.empty(1 << 22, dtype=torch.uint8, pin_memory=True).to(device, non_blocking=True)
        copy_beside(out.view(-1), copied.view(-1))
        of_copy.record()
    torch.cuda.synchronize()
    assert torch.equal(copied, out)
    if torch.cuda.get_device_capability() == (9, 0):
        assert begin.elapsed_time(of_copy) < 0.7 * begin.elapsed_time(end)
