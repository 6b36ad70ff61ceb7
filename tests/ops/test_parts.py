"""Parts of a sum, as ranks have sent them, added up where it belongs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ds_fused.ops.common._parts import BLOCK, sum_parts

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


@pytest.mark.gpu
def test_room_beside_a_product(device):
    """A sum of what a copy engine brings in the middle of a product is there before the product ends."""
    x, weight = (torch.randn(size, 8192, device=device).bfloat16() for size in (8192, 32768))
    z = torch.empty(8192, 32768, dtype=torch.bfloat16, device=device)
    brought, parts = torch.randn(2, 1 << 21).bfloat16().pin_memory(), torch.empty(2, 1 << 21, device=device).bfloat16()
    out, beside = torch.empty_like(parts[0]), torch.cuda.Stream()
    sum_parts(parts, out, adds=False, beside=True)
    torch.mm(x, weight.t(), out=z)
    begin, end, of_sum = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record()
    beside.wait_event(begin)
    with torch.cuda.stream(beside):
        parts.copy_(brought, non_blocking=True)
        sum_parts(parts, out, adds=False, beside=True)
        of_sum.record()
    torch.mm(x, weight.t(), out=z)
    end.record()
    torch.cuda.synchronize()
    assert torch.equal(out, parts.float().sum(0).bfloat16())
    if torch.cuda.get_device_capability() == (9, 0):
        assert begin.elapsed_time(of_sum) < 0.7 * begin.elapsed_time(end)
