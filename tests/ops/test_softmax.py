"""softmax: against fp64, rows too wide for a tile, masks as torch.softmax treats them. More: test_along_rows.py."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn

from ds_fused.ops.attention.softmax import softmax, softmax_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than a tile has, the last tile short; just over a power of two
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 27, 33), (7, 1025)])
def test_softmax(shape, dtype, device):
    as_accurate(softmax, softmax_reference, [3 * randn(*shape, device=device)], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
# attention over 1023 keys; 4096; the widest that backward takes whole; in parts backward; a vocabulary
@pytest.mark.parametrize("shape", [(2, 8, 1023, 1023), (511, 4096), (513, 16384), (513, 32767), (65, 128256)])
def test_softmax_of_real_sizes(shape, dtype, device):
    as_accurate(softmax, softmax_reference, [3 * randn(*shape, device=device)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_too_wide_for_a_tile_are_in_parts(dtype, device, walked):
    # 41 columns are three parts, the last one short; so many rows that the worst error of PyTorch is no luck
    as_accurate(softmax, softmax_reference, [3 * randn(40, 41, device=device)], dtype)


@pytest.mark.parametrize("way", ["whole", "walked"])
def test_masks(way, device, request):
    if way == "walked":
        request.getfixturevalue("walked")
    x = randn(7, 41, device=device).float()
    x[0, :20] = -INF  # the first part has nothing else
    x[1, 20:] = -INF
    x[2, ::2] = -INF
    x[3, 1:] = -INF  # one is left
    x[4] *= 1e4  # all but one underflow
    x[5] += 1e4
    x[6] = 0
    as_accurate(softmax, softmax_reference, [x], torch.float32)
    # NaN where PyTorch has it
    x[0] = -INF
    x[1, 3] = float("nan")
    x[2, 39] = INF
    assert torch.equal(softmax(x).isnan(), torch.softmax(x, -1).isnan())
    assert softmax(x)[:3].isnan().all()


def test_a_gradient_that_is_expanded(device):
    x = randn(5, 33, device=device).float().requires_grad_()
    softmax(x)[:, :1].sum().backward()
    wanted = torch.autograd.grad(torch.softmax(x, -1)[:, :1].sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)
    (dx,) = torch.autograd.grad(softmax(x).sum(), x)  # one number expanded
    assert dx.abs().max() < 1e-6


def test_autocast_gives_the_dtype_of_pytorchs(device, walked):
    """fp32, but on a CPU, which autocast leaves alone."""
    for x in (randn(5, 7, device=device).bfloat16(), randn(5, 33, device=device).bfloat16()):
        with torch.autocast(device.type, torch.bfloat16):
            assert softmax(x).dtype == torch.softmax(x, -1).dtype
            as_accurate(softmax, softmax_reference, [x], torch.bfloat16)
