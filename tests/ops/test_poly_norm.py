"""poly_norm: both passes against fp64, and the sums of dweight and dbias."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, as_its_last_rows, randn, same_bits, ulp

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _row_tiles
from ds_fused.ops.norms.poly_norm import poly_norm, poly_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# where many cases are judged together: fp16 is rounded as bf16 is, in another place
OF_MANY = [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.all)]
FILE = registry.op("poly_norm").module


def inputs_of(*shape, device):
    return [randn(*shape, device=device), randn(3, device=device, seed=1), randn(1, device=device, seed=2)]


def walk(monkeypatch):
    for name in ("WHOLE_ROW_FWD", "WHOLE_ROW_BWD"):
        monkeypatch.setattr(FILE, name, 8)


@pytest.mark.parametrize("dtype", DTYPES)
# one element, of whose dx equal terms cancel; odd; more rows than the persistent grid has, the last tile short; just
# over a block
@pytest.mark.parametrize("shape", [(1,), (9, 7), (5, 67, 33), (3, 1025)])
def test_poly_norm(shape, dtype, device):
    inputs, floor = inputs_of(*shape, device=device), 1e-6 if shape == (1,) else 0.0
    as_accurate(poly_norm, poly_norm_reference, inputs, dtype, frozen=[1, 2], floor=floor)


@pytest.mark.parametrize("dtype", DTYPES)
# one block of columns; two, the last with one column
@pytest.mark.parametrize("shape", [(5, 3, 9), (2, 4097)])
def test_rows_too_wide_for_a_tile_are_walked(shape, dtype, device, monkeypatch):
    walk(monkeypatch)
    as_accurate(poly_norm, poly_norm_reference, inputs_of(*shape, device=device), dtype, frozen=[1, 2])


@pytest.mark.parametrize("d", [11, 18])
def test_rows_in_blocks(d, device, monkeypatch):
    monkeypatch.setattr(_row_tiles, "LEAST_BLOCK", 4)
    # three and five of 4 columns, the last one short
    inputs = inputs_of(5, d, device=device)
    as_accurate(poly_norm, poly_norm_reference, inputs, torch.bfloat16, frozen=[1, 2])
    ours = gradients(poly_norm, torch.float32, (5, d), device, 0)
    torch.testing.assert_close(ours, gradients(poly_norm_reference, torch.float32, (5, d), device, 0))


def gradients(op, dtype, shape, device, seed):
    """Of weight and bias, four numbers."""
    x, weight, bias = (t.to(dtype) for t in inputs_of(*shape, device=device))
    x, dy = (randn(*shape, device=device, seed=10 * seed + i).to(dtype) for i in (1, 2))
    parameters = weight.requires_grad_(), bias.requires_grad_()
    return torch.cat(torch.autograd.grad(op(x, *parameters), parameters, dy))


# Each is a sum of all elements, most of which cancel: how far PyTorch is off in one case is luck, so the errors of many
# are judged together.
@pytest.mark.parametrize("dtype", OF_MANY)
@pytest.mark.parametrize(
    "shape", [(9, 7), (13, 9), (5, 67, 33), *(pytest.param((2049, d), marks=pytest.mark.gpu) for d in (4096, 40960))]
)
def test_sums(shape, dtype, device, monkeypatch):
    if shape == (13, 9):
        walk(monkeypatch)
    ours = theirs = ulps = 0.0
    for seed in range(8):
        sums, torchs = (gradients(op, dtype, shape, device, seed) for op in (poly_norm, poly_norm_reference))
        if seed == 0:
            assert same_bits(sums, gradients(poly_norm, dtype, shape, device, seed))

        def exactly(*tensors):
            return poly_norm_reference(*(t.double() for t in tensors))

        exact = gradients(exactly, dtype, shape, device, seed).double()
        ours, theirs = (a + (b.double() - exact) ** 2 for a, b in ((ours, sums), (theirs, torchs)))
        ulps += ulp(exact, dtype) ** 2
    assert bool((ours.sqrt() <= 2 * theirs.sqrt() + 4 * ulps.sqrt()).all())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
# the MLPs of PolyCom's dense model and of Llama-3-8B; the widest whole row of the backward; wide
@pytest.mark.parametrize("shape", [(1023, 8192), (515, 14336), (67, 16384), (33, 20480), (17, 40960)])
def test_poly_norm_of_real_sizes(shape, dtype, device):
    as_accurate(poly_norm, poly_norm_reference, inputs_of(*shape, device=device), dtype, frozen=[1, 2])


def test_it_is_three_norms(device):
    x, weight, bias = (t.float() for t in inputs_of(5, 33, device=device))
    cube, square, first = (torch.nn.functional.rms_norm(x**p, (33,), eps=0.1) for p in (3, 2, 1))
    expected = weight[0] * cube + weight[1] * square + weight[2] * first + bias
    torch.testing.assert_close(poly_norm(x, weight, bias, eps=0.1), expected)


def test_without_bias(device):
    inputs = [*inputs_of(5, 33, device=device)[:2], None]
    as_accurate(poly_norm, poly_norm_reference, inputs, torch.bfloat16, eps=1e-3)


@pytest.mark.parametrize("shape", [(1,), ()])
def test_parameters_of_another_dtype(shape, device):
    x, weight, bias = inputs_of(5, 33, device=device)
    inputs = [x.bfloat16(), weight.float(), bias.float().view(shape)]
    as_accurate(poly_norm, poly_norm_reference, inputs, torch.float32)
    as_accurate(poly_norm, poly_norm_reference, [x.float(), *(t.bfloat16() for t in inputs[1:])], torch.float32)


# values of 40 have cubes beyond fp16, of 0.01 squares below its smallest
@pytest.mark.parametrize("size", [0.01, 40.0])
def test_powers_stay_in_range(size, device):
    x, weight, bias = inputs_of(5, 33, device=device)
    as_accurate(poly_norm, poly_norm_reference, [size * x, weight, bias], torch.float16, frozen=[1, 2])


@pytest.mark.parametrize("walks", [False, True])
@pytest.mark.parametrize("frozen", [(0,), (0, 1), (0, 2), (1,), (2,), (1, 2)])
def test_frozen(frozen, walks, device, monkeypatch):
    if walks:
        walk(monkeypatch)
    as_accurate(poly_norm, poly_norm_reference, inputs_of(5, 33, device=device), torch.bfloat16, frozen=frozen)


def test_frozen_parameters_cost_no_sums(device, monkeypatch):
    monkeypatch.setattr(FILE, "sum_partials", None)
    monkeypatch.setattr(FILE, "partials", None)
    x, *parameters = (t.float() for t in inputs_of(5, 33, device=device))
    poly_norm(x.requires_grad_(), *parameters).sum().backward()
    assert x.grad is not None


def test_strided_rows(device):
    x = randn(6, 2, 33, device=device).bfloat16()
    for view in (x[:, 1], x[::2], x.transpose(0, 1), x[..., 1:], x[:1].expand(4, 2, 33), x[0].t()):
        inputs = [view, *inputs_of(1, 1, device=device)[1:]]
        as_accurate(poly_norm, poly_norm_reference, inputs, torch.bfloat16, frozen=[1, 2])
    weight = randn(6, device=device)[::2].float()
    as_accurate(poly_norm, poly_norm_reference, [x, weight, None], torch.bfloat16, frozen=[1])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5, 0)])
def test_empty(shape, device):
    as_accurate(poly_norm, poly_norm_reference, inputs_of(*shape, device=device), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**18 + 1, 8192  # 2^31 + 2^13 elements, 4 GiB each
    parameters = [t.bfloat16() for t in inputs_of(1, d, device=device)[1:]]
    as_its_last_rows(lambda x: poly_norm(x, *parameters), n, d, device)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    as_accurate(poly_norm, poly_norm_reference, inputs_of(5, 33, device="cuda:1"), torch.bfloat16, frozen=[1, 2])


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    torch.compiler.reset()
    compiled = torch.compile(lambda *inputs: poly_norm(*inputs) * 2, fullgraph=True)
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(5, 13, 257, device=device)]
    got, wanted = compiled(*leaves), poly_norm(*leaves) * 2
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument(device):
    x, three, one = (torch.ones(n, device=device) for n in ((2, 5), 3, 1))
    with pytest.raises(ValueError, match="poly_norm: x is a number"):
        poly_norm(x[0, 0], three, one)
    with pytest.raises(ValueError, match=r"poly_norm: weight \(2,\) must be three numbers"):
        poly_norm(x, three[:2], one)
    with pytest.raises(ValueError, match=r"poly_norm: weight \(0,\)"):  # a ZeRO-3 shard that nobody gathered
        poly_norm(x, three[:0], one)
    with pytest.raises(ValueError, match=r"poly_norm: bias \(3,\) must be one number"):
        poly_norm(x, three, three)
    with pytest.raises(ValueError, match="poly_norm: x is torch.float64"):
        poly_norm(x.double(), three, one)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in inputs_of(5, 33, device="cpu")]
    assert same_bits(poly_norm(*inputs), poly_norm_reference(*inputs))
