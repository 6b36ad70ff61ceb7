"""Parts of a sum, as ranks have sent them, added up where it belongs."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from ds_fused.ops._parts import BLOCK, sum_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(("dtype", "kept", "adds"), list(product(DTYPES, (None, torch.float32), (False, True))))
@pytest.mark.parametrize("n", [0, 1, BLOCK, 3 * BLOCK + 17])
def test_one_rounding(dtype, kept, adds, n, device):
    parts = torch.randn(5, n, device=device).to(dtype)
    out = torch.full((n,), 3.0 if adds else float("nan"), dtype=kept or dtype, device=device)
    sum_parts(parts, out, adds=adds)
    true = parts.double().sum(0) + (3.0 if adds else 0.0)
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
