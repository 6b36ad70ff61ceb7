"""sparsemax: Newton's steps against the sort in fp64, and what a projection is. More is in test_along_rows.py."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

from ds_fused.ops.attention.sparsemax import sparsemax, sparsemax_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than a tile has, the last tile short; just over a power of two.
# A few of a row are in the support, or half of it
@pytest.mark.parametrize("shape, scale", [((1,), 1.0), ((3, 7), 1.0), ((5, 27, 33), 0.1), ((3, 1025), 0.01)])
def test_sparsemax(shape, scale, dtype, device):
    as_accurate(sparsemax, sparsemax_reference, [scale * randn(*shape, device=device)], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.03])
# attention over 1023 keys; 4096; the widest that backward takes whole; in parts backward; a vocabulary
@pytest.mark.parametrize("shape", [(2, 8, 1023, 1023), (511, 4096), (513, 16384), (513, 32767), (65, 128256)])
def test_sparsemax_of_real_sizes(shape, scale, dtype, device):
    as_accurate(sparsemax, sparsemax_reference, [scale * randn(*shape, device=device)], dtype)


@pytest.mark.parametrize("scale, dtype", [(1.0, torch.float32), (0.03, torch.bfloat16), (0.03, torch.float16)])
def test_rows_too_wide_for_a_tile_are_walked(scale, dtype, device, walked):
    # 41 columns are three blocks, the last one short
    as_accurate(sparsemax, sparsemax_reference, [scale * randn(3, 41, device=device)], dtype)


def hard_rows(device) -> torch.Tensor:
    """Rows whose Newton steps are many, or whose sums are large, equal or nearly so."""
    steps = torch.arange(41, dtype=torch.float64)
    rows = [
        -(0.5**steps),  # each step drops a few
        -steps.sqrt() / 6,
        -1 / (1 + steps),
        torch.zeros(41),  # all in the support
        torch.full((41,), 1e4),
        1e4 * steps,  # one in the support
        steps / 41 - 3e3,
        torch.where(steps < 20, -INF, steps / 50),  # a mask; the first block of a walk has nothing else
        torch.where(steps == 40, 0.25, -INF),
        torch.where(steps % 2 == 0, 0.0, -1.0),  # exactly on the first threshold
    ]
    return torch.stack([row.double() for row in rows]).float().to(device)


@pytest.mark.parametrize("way", ["whole", "walked"])
def test_it_is_the_projection(way, device, request):
    if way == "walked":
        request.getfixturevalue("walked")
    x = hard_rows(device)
    as_accurate(sparsemax, sparsemax_reference, [x], torch.float32)
    y, x = sparsemax(x).double(), x.double()
    assert (y >= 0).all() and (y.sum(-1) - 1).abs().max() < 1e-5
    # y = max(x - tau, 0) with one tau a row: x - y is tau on the support and x, which is no larger, elsewhere
    tau = torch.where(y > 0, x - y, -INF).amax(-1, keepdim=True)
    off = torch.where(y > 0, (x - y - tau).abs(), (x - tau).clamp_min(0))
    assert (off <= 1e-6 * x.abs().nan_to_num(posinf=0, neginf=0).amax(-1, keepdim=True).clamp_min(1)).all()


@pytest.mark.parametrize("way", ["whole", "walked"])
def test_nan_fills_its_row(way, device, request):
    if way == "walked":
        request.getfixturevalue("walked")
    x = randn(5, 41, device=device).float()
    x[0] = -INF
    x[1, 3] = float("nan")
    x[2, 39] = INF
    x[3, 40] = float("nan")
    for function in (sparsemax, sparsemax_reference):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        # and so is its gradient, as softmax's is
        (dx,) = torch.autograd.grad(y, leaf, x[4].expand_as(y))
        for result in (y, dx):
            assert result[:4].isnan().all() and result[4].isfinite().all()


def test_a_row_does_not_depend_on_its_tile(device):
    x = torch.cat([hard_rows(device), randn(5, 41, device=device).float()])
    together = sparsemax(x)
    for i in range(x.shape[0]):
        assert same_bits(together[i], sparsemax(x[i]))


def test_fp16_keeps_the_support(device):
    # 32 in the support, the last by 2^-25, which fp16 would round to 0
    x = torch.zeros(1, 40, device=device).half()
    x[0, 0], x[0, 1], x[0, 31], x[0, 32:] = 2.0**-5, -(2.0**-20), -(2.0**-5), -1.0
    assert sparsemax_reference(x.double())[0, 31] == 2.0**-25
    assert sparsemax(x)[0, 31] == 2.0**-24
    as_accurate(sparsemax, sparsemax_reference, [x], torch.float16)


def test_autocast_leaves_the_dtype(device):
    x = randn(5, 33, device=device).bfloat16()
    with torch.autocast(device.type, torch.bfloat16):
        as_accurate(sparsemax, sparsemax_reference, [x], torch.bfloat16)
