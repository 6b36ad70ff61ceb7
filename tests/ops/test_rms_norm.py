"""rms_norm: both cast orders against fp64, the partial sums of dweight, rows too wide for a tile."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, as_its_last_rows, randn, same_bits
from torch import Tensor

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _row_tiles
from ds_fused.ops.norms._norms import CASTS
from ds_fused.ops.norms.rms_norm import rms_norm, rms_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = registry.op("rms_norm").module


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than the persistent grid has, the last tile short; just over a power of two
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 67, 33), (7, 1025)])
def test_rms_norm(shape, dtype, cast, device):
    inputs = [randn(*shape, device=device), randn(shape[-1], device=device)]
    # eps that counts: dx of one column is a difference of equal terms otherwise, noise in any dtype
    as_accurate(rms_norm, rms_norm_reference, inputs, dtype, eps=0.5, cast=cast)


@pytest.mark.gpu
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1023, 32, 128),  # Qwen3's q_norm
        (4095, 896),  # Qwen2-0.5B
        (2049, 4096),  # Llama-3-8B
        (513, 16384),  # the widest that backward takes whole
        (513, 16385),
        (65, 40960),  # walked forward too
    ],
)
def test_rms_norm_of_real_sizes(shape, dtype, cast, device):
    inputs = [randn(*shape, device=device), randn(shape[-1], device=device)]
    as_accurate(rms_norm, rms_norm_reference, inputs, dtype, cast=cast)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_wide_for_a_tile_are_walked(dtype, cast, device, monkeypatch):
    monkeypatch.setattr(FILE, "WHOLE_ROW_FWD", 8)
    monkeypatch.setattr(FILE, "WHOLE_ROW_BWD", 8)
    monkeypatch.setattr(_row_tiles, "WALK_BLOCK", 16)
    # 41 columns are three blocks, the last one short; the interpreter's four programs take more than one row
    inputs = [randn(6, 41, device=device), randn(41, device=device)]
    as_accurate(rms_norm, rms_norm_reference, inputs, dtype, cast=cast, offset=1.0)


@pytest.mark.parametrize("d", [11, 18])
@pytest.mark.parametrize("cast", CASTS)
def test_rows_in_blocks(cast, d, device, monkeypatch):
    monkeypatch.setattr(_row_tiles, "LEAST_BLOCK", 4)
    # three and five of 4 columns, the last one short
    x, weight, bias = [randn(*shape, device=device) for shape in ((5, d), (d,), (d,))]

    def norm(function):
        return lambda x, weight, **options: function(x, weight, bias=bias.to(weight.dtype), **options)

    as_accurate(norm(rms_norm), norm(rms_norm_reference), [x, weight], torch.bfloat16, cast=cast)


@pytest.mark.parametrize("cast", CASTS)
def test_offset(cast, device):
    inputs = [randn(5, 33, device=device), randn(33, device=device)]
    as_accurate(rms_norm, rms_norm_reference, inputs, torch.bfloat16, cast=cast, offset=1.0)


@pytest.mark.parametrize("cast", CASTS)
def test_without_weight(cast, device):
    as_accurate(rms_norm, rms_norm_reference, [randn(5, 33, device=device), None], torch.bfloat16, cast=cast)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("x_dtype, weight_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weight_of_another_dtype(x_dtype, weight_dtype, cast, device):
    inputs = [randn(5, 33, device=device).to(x_dtype), randn(33, device=device).to(weight_dtype)]
    as_accurate(rms_norm, rms_norm_reference, inputs, x_dtype, cast=cast)


def with_bias(function):
    """The bias as a tensor among the others, for the judge."""
    return lambda x, weight, bias, **options: function(x, weight, bias=bias, **options)


def judge_bias(x, weight, bias, dtype, **options):
    as_accurate(with_bias(rms_norm), with_bias(rms_norm_reference), [x, weight, bias], dtype, **options)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias(dtype, cast, device):
    x, weight, bias = randn(17, 33, device=device), randn(33, device=device), randn(33, device=device, seed=1)
    judge_bias(x, weight, bias, dtype, cast=cast, offset=1.0)
    judge_bias(x, None, bias, dtype, cast=cast)
    judge_bias(x, weight, bias.float(), dtype, cast=cast)  # its dtype may be that of y


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2)])
@pytest.mark.parametrize("walked", [False, True])
def test_bias_and_frozen(walked, frozen, device, monkeypatch):
    if walked:
        monkeypatch.setattr(FILE, "WHOLE_ROW_FWD", 8)
        monkeypatch.setattr(FILE, "WHOLE_ROW_BWD", 16)
        monkeypatch.setattr(_row_tiles, "WALK_BLOCK", 16)
    inputs = [randn(6, 33, device=device), randn(33, device=device), randn(33, device=device, seed=1)]
    judge_bias(*inputs, torch.bfloat16, frozen=frozen)


def test_the_normalised_row_is_rounded_before_the_weight(device):
    # bit for bit, so that a swapped model computes what the stock one does
    x, weight = randn(64, 33, device=device).bfloat16(), randn(33, device=device).bfloat16()
    wide = x.float()
    x_hat = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    stock, unrounded = weight * x_hat.bfloat16(), (weight.float() * x_hat).bfloat16()
    y = rms_norm(x, weight)
    assert (y != stock).float().mean() < 0.01  # 1/rms may differ in its last fp32 bit
    assert (y != unrounded).float().mean() > 0.05


@pytest.mark.parametrize("frozen", [(0,), (1,)])
def test_frozen(frozen, device):
    inputs = [randn(5, 33, device=device), randn(33, device=device)]
    as_accurate(rms_norm, rms_norm_reference, inputs, torch.float32, frozen=frozen)


def test_frozen_weight_costs_no_partial_sums(device, monkeypatch):
    monkeypatch.setattr(FILE, "sum_partials", None)
    x = randn(5, 33, device=device).float().requires_grad_()
    rms_norm(x, torch.ones(33, device=device)).sum().backward()
    assert x.grad is not None


def test_strided_rows(device):
    x = randn(6, 2, 33, device=device).bfloat16()
    for view in (x[:, 1], x[::2], x.transpose(0, 1), x[..., 1:], x[:1].expand(4, 2, 33)):  # read in place, or copied
        as_accurate(rms_norm, rms_norm_reference, [view, randn(view.shape[-1], device=device)], torch.bfloat16)
    columns = randn(33, 6, device=device).bfloat16().t()
    as_accurate(rms_norm, rms_norm_reference, [columns, randn(66, device=device)[::2]], torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5, 0)])
def test_empty(shape, device):
    inputs = [randn(*shape, device=device), randn(shape[-1], device=device)]
    as_accurate(rms_norm, rms_norm_reference, inputs, torch.float32)


def test_a_row_of_zeros(device):
    x = randn(3, 33, device=device)
    x[1] = 0
    as_accurate(rms_norm, rms_norm_reference, [x, randn(33, device=device)], torch.float32, eps=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**20 + 1, 2**11  # 2^31 + 2^11 elements, 4 GiB each
    weight = torch.randn(d, device=device).bfloat16()
    as_its_last_rows(lambda x: rms_norm(x, weight), n, d, device)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    inputs = [randn(5, 33, device="cuda:1"), randn(33, device="cuda:1")]
    assert torch.cuda.current_device() == 0
    as_accurate(rms_norm, rms_norm_reference, inputs, torch.bfloat16)


@pytest.mark.gpu
# a whole row; a walked one; both one after the other, when dynamo takes the width for a symbol
@pytest.mark.parametrize("widths", [(257,), (40960,), (257, 40960), (40960, 257)])
def test_compiles_to_one_graph(widths, device):
    torch.compiler.reset()  # what it saw of this function in another test makes symbols too
    compiled = torch.compile(lambda x, weight: rms_norm(x, weight) * 2, fullgraph=True)

    def results(function, *inputs):
        leaves = [t.detach().requires_grad_() for t in inputs]
        y = function(*leaves)
        return y, *torch.autograd.grad(y.sum(), leaves)

    for d in widths:
        x, weight = (randn(*shape, device=device).bfloat16() for shape in ((65, d), (d,)))
        got = results(compiled, x, weight)
        wanted = results(lambda x, weight: rms_norm(x, weight) * 2, x, weight)
        exact = results(lambda x, weight: rms_norm_reference(x, weight) * 2, x.double(), weight.double())
        # no bits are compared: a compiler that knows less of the width loads, and adds up, in another order
        for name, *values in zip(("y", "dx", "dweight"), got, wanted, exact, strict=True):
            error, allowed = ((value.double() - values[-1]).abs().max() for value in values[:2])
            assert error <= 1.01 * allowed, f"{name} at {d} columns: {error:.3g} off, {allowed:.3g} without compile"


@pytest.mark.gpu
def test_compiles_without_weight(device):
    x = randn(65, 257, device=device).bfloat16().requires_grad_()
    compiled = torch.compile(lambda x: rms_norm(x, None) * 2, fullgraph=True)
    got, wanted = compiled(x), rms_norm(x, None) * 2
    assert torch.equal(got, wanted)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, wanted)))


@pytest.mark.gpu
def test_a_cuda_graph_captures_it(device):
    x, weight = randn(65, 257, device=device).bfloat16(), randn(257, device=device).bfloat16()
    wanted = rms_norm(x, weight)  # compiles the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = rms_norm(x, weight)
    graph.replay()
    assert torch.equal(y, wanted)


def gradients(overwrite: bool, x: Tensor, weight: Tensor, dy: Tensor, **options: object) -> tuple[Tensor, ...]:
    """dx and dweight for an upstream gradient that is a copy, and the copy."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    dy = dy.clone()
    y = rms_norm(*leaves, overwrite_grad=overwrite, **options)
    return *torch.autograd.grad(y, leaves, dy), dy


def walk_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FILE, "WHOLE_ROW_BWD", 8)
    monkeypatch.setattr(_row_tiles, "WALK_BLOCK", 16)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape, walked",
    [
        ((5, 67, 33), False),  # several rows of a tile, and more of them than programs
        ((7, 1025), False),
        ((6, 41), True),
        pytest.param((1, 2049, 32, 128), False, marks=pytest.mark.gpu),
        pytest.param((2049, 4096), False, marks=pytest.mark.gpu),
        pytest.param((513, 16384), False, marks=pytest.mark.gpu),
        pytest.param((513, 16385), False, marks=pytest.mark.gpu),
    ],
)
def test_dx_may_overwrite_the_upstream_gradient(shape, walked, dtype, cast, device, monkeypatch):
    if walked:
        walk_rows(monkeypatch)
    x, weight, dy = (randn(*size, device=device, seed=i).to(dtype) for i, size in enumerate((shape, shape[-1:], shape)))
    (*wanted, kept), (*got, lent) = (gradients(overwrite, x, weight, dy, cast=cast) for overwrite in (False, True))
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    assert got[0].data_ptr() == lent.data_ptr() and same_bits(kept, dy)


def test_dx_overwrites_nothing_that_it_does_not_fit(device):
    x, weight = randn(6, 8, device=device).bfloat16(), randn(8, device=device)
    columns, rows = randn(8, 6, device=device).bfloat16().t(), randn(6, 2, 8, device=device).bfloat16()[:, 1]
    wide = randn(6, 8, device=device).float()
    for dy, scale in ((columns, weight.bfloat16()), (rows, weight.bfloat16()), (wide, weight.float())):
        leaves = [t.detach().requires_grad_() for t in (x, scale)]
        before = dy.clone()
        got = torch.autograd.grad(rms_norm(*leaves, overwrite_grad=True), leaves, dy)
        assert same_bits(dy, before)
        assert all(same_bits(a, b) for a, b in zip(got, gradients(False, x, scale, dy), strict=False))
    # all of an expanded gradient's rows are one
    leaf = x.detach().requires_grad_()
    summed, plain = (torch.autograd.grad(rms_norm(leaf, None, overwrite_grad=o).sum(), leaf)[0] for o in (True, False))
    assert same_bits(summed, plain)
    # a graph of gradients holds this one
    dy = x.detach().requires_grad_()
    torch.autograd.grad(rms_norm(leaf, None, overwrite_grad=True), leaf, dy, create_graph=True)
    assert same_bits(dy.detach(), x)


class Kept(torch.autograd.Function):
    """The sum of squares, whose gradient is made in the forward and kept."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        ctx.save_for_backward(2 * y)
        return y.square().sum()

    @staticmethod
    def backward(ctx, dloss: Tensor) -> Tensor:
        return ctx.saved_tensors[0]


def test_a_second_backward_over_an_overwritten_gradient(device):
    """Right where the gradient is made anew, an error where it was kept."""
    x, weight = randn(5, 33, device=device).float().requires_grad_(), randn(33, device=device).float()
    loss = rms_norm(x, weight, overwrite_grad=True).pow(3).sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0].clone() for _ in range(2))
    (plain,) = torch.autograd.grad(rms_norm(x, weight).pow(3).sum(), x)
    assert same_bits(first, plain) and same_bits(second, plain)
    loss = Kept.apply(rms_norm(x, weight, overwrite_grad=True))
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, x)


def test_errors_name_the_argument(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=r"rms_norm: weight \(4,\) .* x \(2, 3\)"):
        rms_norm(x, torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"rms_norm: weight \(0,\)"):  # a ZeRO-3 shard that nobody gathered
        rms_norm(x, torch.ones(0, device=device))
    with pytest.raises(ValueError, match=r"rms_norm: bias \(4,\) .* x \(2, 3\)"):
        rms_norm(x, None, bias=torch.ones(4, device=device))
    with pytest.raises(ValueError, match="rms_norm: cast is 'llama'; known are before_weight"):
        rms_norm(x, None, cast="llama")
    with pytest.raises(ValueError, match="rms_norm: x is torch.int64"):
        rms_norm(x.long(), None)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight = randn(5, 33, device="cpu").bfloat16(), randn(33, device="cpu").bfloat16()
    assert same_bits(rms_norm(x, weight), rms_norm_reference(x, weight))
