"""What holds for softmax and sparsemax: any dimension and strides, devices, graphs and errors."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, as_its_last_rows, randn, same_bits
from torch import Tensor

from ds_fused.ops.registry import Op, op

each_op = pytest.mark.parametrize("row", [op("softmax"), op("sparsemax")], ids=lambda row: row.name)


def judge(row: Op, x: Tensor, dtype: torch.dtype, **options: int) -> None:
    as_accurate(row.function, row.reference, [x], dtype, **options)


@each_op
@pytest.mark.parametrize("dim", [0, 1, -2, 2, -3])
def test_any_dimension(dim, row, device):
    judge(row, randn(3, 7, 5, device=device), torch.float32, dim=dim)


@each_op
def test_strided_rows(row, device):
    x = randn(6, 2, 33, device=device).bfloat16()
    for view in (x[:, 1], x[::2], x.transpose(0, 1), x[..., 1:], x[:1].expand(4, 2, 33), x[..., 0].t()):
        judge(row, view, torch.bfloat16)


@each_op
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5, 0)])
def test_empty(shape, row, device):
    judge(row, randn(*shape, device=device), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@each_op
def test_more_elements_than_int32(row, device):
    n, d = 2**20 + 1, 2**11  # 2^31 + 2^11 elements, 4 GiB each
    as_its_last_rows(row.function, n, d, device)


@pytest.mark.gpu
@pytest.mark.gpus
@each_op
def test_runs_on_the_tensors_own_device(row):
    assert torch.cuda.current_device() == 0
    judge(row, randn(5, 33, device="cuda:1"), torch.bfloat16)


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("shape", [(65, 257), (3, 40960)])
def test_compiles_to_one_graph(shape, row, device):
    x = randn(*shape, device=device).float().requires_grad_()
    compiled = torch.compile(lambda x: row.function(x) * 2, fullgraph=True)
    got, wanted = compiled(x), row.function(x) * 2
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(*(torch.autograd.grad((y * y).sum(), x)[0] for y in (got, wanted)))


@pytest.mark.gpu
@each_op
@pytest.mark.parametrize("d", [257, 65536])
def test_a_cuda_graph_captures_it(d, row, device):
    x = randn(65, d, device=device).bfloat16()
    wanted = row.function(x)  # compiles the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = row.function(x)
    # twice: those who meet are counted from zero each time
    for _ in range(2):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, wanted)


@pytest.mark.gpu
def test_programs_meet_on_several_streams(device):
    softmax = op("softmax").function
    xs = [randn(128, 128256, device=device).bfloat16() for _ in range(4)]
    wanted = [softmax(x) for x in xs]
    streams = [torch.cuda.Stream(device) for _ in xs]
    torch.cuda.synchronize(device)
    got = []
    for x, stream in zip(xs, streams, strict=True):
        with torch.cuda.stream(stream):
            got.append(softmax(x))
    torch.cuda.synchronize(device)
    assert all(torch.equal(y, z) for y, z in zip(got, wanted, strict=True))


@each_op
def test_errors_name_the_argument(row, device):
    x = torch.ones(2, 3, device=device)
    for dim in (2, -3):
        with pytest.raises(ValueError, match=rf"{row.name}: dim is {dim}; x \(2, 3\) has dimensions -2 to 1"):
            row.function(x, dim)
    with pytest.raises(ValueError, match=f"{row.name}: x is a number"):
        row.function(x.sum())
    for dtype in (torch.int64, torch.float64):
        with pytest.raises(ValueError, match=f"{row.name}: x is {dtype}"):
            row.function(x.to(dtype))


@each_op
def test_without_the_interpreter_a_cpu_runs_the_reference(row, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x = randn(5, 33, device="cpu").bfloat16()
    assert same_bits(row.function(x), row.reference(x))
    assert row.function(x.double()).dtype == torch.float64
