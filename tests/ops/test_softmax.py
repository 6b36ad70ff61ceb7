"""softmax: against fp64, rows too wide for a tile, masks of -inf as torch.softmax treats them."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

from ds_fused.ops.softmax import softmax, softmax_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than a tile has, the last tile short; just over a power of two
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 27, 33), (7, 1025)])
def test_softmax(shape, dtype, device):
    as_accurate(softmax, softmax_reference, [3 * randn(*shape, device=device)], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
# attention over 1023 keys; 4096; the widest that backward takes whole; walked backward; a vocabulary
@pytest.mark.parametrize("shape", [(2, 8, 1023, 1023), (511, 4096), (513, 16384), (513, 32767), (65, 128256)])
def test_softmax_of_real_sizes(shape, dtype, device):
    as_accurate(softmax, softmax_reference, [3 * randn(*shape, device=device)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_too_wide_for_a_tile_are_walked(dtype, device, walked):
    # 41 columns are three blocks, the last one short; so many rows that the worst error of PyTorch is no luck
    as_accurate(softmax, softmax_reference, [3 * randn(40, 41, device=device)], dtype)


@pytest.mark.parametrize("way", ["whole", "walked"])
def test_masks(way, device, request):
    if way == "walked":
        request.getfixturevalue("walked")
    x = randn(7, 41, device=device).float()
    x[0, :20] = -INF  # the first block of a walk has nothing else
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


@pytest.mark.parametrize("dim", [0, 1, -2, 2, -3])
def test_any_dimension(dim, device):
    as_accurate(softmax, softmax_reference, [randn(3, 7, 5, device=device)], torch.float32, dim=dim)


def test_strided_rows(device):
    x = randn(6, 2, 33, device=device).bfloat16()
    for view in (x[:, 1], x[::2], x.transpose(0, 1), x[..., 1:], x[:1].expand(4, 2, 33), x[..., 0].t()):
        as_accurate(softmax, softmax_reference, [view], torch.bfloat16)


def test_a_gradient_that_is_expanded(device):
    x = randn(5, 33, device=device).float().requires_grad_()
    softmax(x)[:, :1].sum().backward()
    wanted = torch.autograd.grad(torch.softmax(x, -1)[:, :1].sum(), x)[0]
    torch.testing.assert_close(x.grad, wanted)
    (dx,) = torch.autograd.grad(softmax(x).sum(), x)  # one number expanded
    assert dx.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5, 0)])
def test_empty(shape, device):
    as_accurate(softmax, softmax_reference, [randn(*shape, device=device)], torch.float32)


def test_autocast_gives_fp32(device, walked):
    for x in (randn(5, 7, device=device).bfloat16(), randn(5, 33, device=device).bfloat16()):
        with torch.autocast(device.type, torch.bfloat16):
            assert softmax(x).dtype == torch.float32
            as_accurate(softmax, softmax_reference, [x], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**20 + 1, 2**11  # 2^31 + 2^11 elements, 4 GiB each
    x = torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_()
    y = softmax(x)
    y.backward(x.detach())
    tail = x.detach()[-3:].clone().requires_grad_()
    y_tail = softmax(tail)
    y_tail.backward(tail.detach())
    assert same_bits(y[-3:].detach(), y_tail.detach())
    assert same_bits(x.grad[-3:], tail.grad)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    as_accurate(softmax, softmax_reference, [randn(5, 33, device="cuda:1")], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(65, 257), (3, 40960)])
def test_compiles_to_one_graph(shape, device):
    x = randn(*shape, device=device).float().requires_grad_()
    compiled = torch.compile(lambda x: softmax(x) * 2, fullgraph=True)
    got, wanted = compiled(x), softmax(x) * 2
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad((y * y).sum(), x)[0] for y in (got, wanted)))


@pytest.mark.gpu
def test_a_cuda_graph_captures_it(device):
    x = randn(65, 257, device=device).bfloat16()
    wanted = softmax(x)  # compiles the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = softmax(x)
    graph.replay()
    assert torch.equal(y, wanted)


def test_errors_name_the_argument(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=r"softmax: dim is 2; x \(2, 3\) has dimensions -2 to 1"):
        softmax(x, 2)
    with pytest.raises(ValueError, match="softmax: x is a number"):
        softmax(x.sum())
    with pytest.raises(ValueError, match="softmax: x is torch.int64"):
        softmax(x.long())


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = randn(5, 33, device="cpu").bfloat16()
    assert same_bits(softmax(x), softmax_reference(x))
    assert softmax(x.double()).dtype == torch.float64
