"""dyt: both passes against fp64, the sums of dalpha, dweight and dbias, tanh near 0 and near 1."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, as_its_last_rows, randn, same_bits, ulp

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _row_tiles
from ds_fused.ops.norms.dyt import dyt, dyt_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# where many cases are judged together: fp16 is rounded as bf16 is, in another place
OF_MANY = [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.all)]
FILE = registry.op("dyt").module


def inputs_of(*shape, device):
    alpha = torch.tensor([0.7], dtype=torch.float64, device=device)
    return [randn(*shape, device=device), alpha, *(randn(shape[-1], device=device, seed=seed) for seed in (2, 3))]


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than the persistent grid has, the last tile short; several blocks of columns
@pytest.mark.parametrize("shape", [(1,), (9, 7), (5, 67, 33), (7, 65)])
def test_dyt(shape, dtype, device, monkeypatch):
    monkeypatch.setattr(FILE, "MOST_COLS", 32)
    as_accurate(dyt, dyt_reference, inputs_of(*shape, device=device), dtype, frozen=[1])


def test_columns_in_blocks_of_fewer_to_spare(device, monkeypatch):
    monkeypatch.setattr(_row_tiles, "LEAST_BLOCK", 4)
    # five of 4, the last one short, not one of 32
    assert _row_tiles.tile_of_columns(18, 8, 1, FILE.MOST_COLS).cols == 4
    as_accurate(dyt, dyt_reference, inputs_of(5, 18, device=device), torch.bfloat16, frozen=[1])


def dalphas(op, dtype, shape, device, seed):
    x, alpha, weight, bias = (t.to(dtype) for t in inputs_of(*shape, device=device))
    x, dy = (randn(*shape, device=device, seed=10 * seed + i).to(dtype) for i in (1, 2))
    return torch.autograd.grad(op(x, alpha.requires_grad_(), weight, bias), alpha, dy)[0]


# One number, the sum of all elements, most of which cancel: how far PyTorch is off in one case is luck, so the errors
# of many are judged together.
@pytest.mark.parametrize("dtype", OF_MANY)
@pytest.mark.parametrize("shape", [(9, 7), (5, 67, 33), pytest.param((2049, 4096), marks=pytest.mark.gpu)])
def test_dalpha(shape, dtype, device, monkeypatch):
    monkeypatch.setattr(FILE, "MOST_COLS", 32 if shape[-1] < 64 else FILE.MOST_COLS)
    ours = theirs = ulps = 0.0
    for seed in range(16):
        dalpha, torchs = (dalphas(op, dtype, shape, device, seed) for op in (dyt, dyt_reference))
        if seed == 0:
            assert same_bits(dalpha, dalphas(dyt, dtype, shape, device, seed))

        def exactly(*tensors):
            return dyt_reference(*(t.double() for t in tensors))

        exact = dalphas(exactly, dtype, shape, device, seed)
        ours, theirs = (a + float((b.double() - exact.double()) ** 2) for a, b in ((ours, dalpha), (theirs, torchs)))
        ulps += float(ulp(exact.double(), dtype)) ** 2
    assert ours**0.5 <= 2 * theirs**0.5 + 4 * ulps**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4095, 768), (2049, 4096), (65, 40960)])  # ViT-B, LLaMA-7B, wide
def test_dyt_of_real_sizes(shape, dtype, device):
    as_accurate(dyt, dyt_reference, inputs_of(*shape, device=device), dtype, frozen=[1])


def test_without_bias(device):
    as_accurate(dyt, dyt_reference, [*inputs_of(5, 33, device=device)[:3], None], torch.bfloat16)


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32", "bfloat16"), ("float32", "bfloat16", "float32")])
@pytest.mark.parametrize("shape", [(1,), ()])
def test_mixed_dtypes_promote(shape, dtypes, device):
    x, alpha, weight, bias = inputs_of(5, 33, device=device)
    x_dtype, alpha_dtype, weight_dtype = (getattr(torch, name) for name in dtypes)
    inputs = [x.to(x_dtype), alpha.view(shape).to(alpha_dtype), weight.to(weight_dtype), bias.to(weight_dtype)]
    as_accurate(dyt, dyt_reference, inputs, torch.float32)


def test_tanh_keeps_its_bits_near_zero_and_near_one(device):
    x = torch.cat([10.0 ** torch.arange(-30, 3), torch.linspace(0.2, 12, 400)]).to(device)
    x = torch.cat([x, -x, torch.zeros(1, device=device)]).requires_grad_()
    one = torch.ones(1, device=device)
    y = dyt(x, one, torch.ones_like(x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    exact = x.detach().double()
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(y.double(), exact.tanh(), rtol=4 * eps, atol=1e-38)
    # 1 - tanh^2 of large x is what a difference of 1 and 1 could not be
    torch.testing.assert_close(dx.double(), exact.cosh() ** -2, rtol=32 * eps, atol=1e-38)


@pytest.mark.parametrize("trained", [0, 1, 2, 3])
def test_frozen(trained, device):
    frozen = [i for i in range(4) if i != trained]
    as_accurate(dyt, dyt_reference, inputs_of(5, 33, device=device), torch.float32, frozen=frozen)


def test_frozen_parameters_cost_no_sums(device, monkeypatch):
    monkeypatch.setattr(FILE, "sum_partials", None)
    monkeypatch.setattr(FILE, "partials", None)
    x, *parameters = (t.float() for t in inputs_of(5, 33, device=device))
    dyt(x.requires_grad_(), *parameters).sum().backward()
    assert x.grad is not None


def test_strided_rows(device):
    x = randn(6, 2, 33, device=device).bfloat16()
    for view in (x[:, 1], x[::2], x.transpose(0, 1), x[..., 1:], x[:1].expand(4, 2, 33), x[0].t()):
        inputs = inputs_of(*view.shape, device=device)
        as_accurate(dyt, dyt_reference, [view, *inputs[1:]], torch.bfloat16)
    x, alpha, *_ = inputs_of(5, 33, device=device)
    vectors = [randn(66, device=device, seed=seed)[::2] for seed in (0, 1)]
    as_accurate(dyt, dyt_reference, [x, alpha, *vectors], torch.float32)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5, 0)])
def test_empty(shape, device):
    as_accurate(dyt, dyt_reference, inputs_of(*shape, device=device), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**20 + 1, 2**11  # 2^31 + 2^11 elements, 4 GiB each
    parameters = [t.bfloat16() for t in inputs_of(1, d, device=device)[1:]]
    as_its_last_rows(lambda x: dyt(x, *parameters), n, d, device)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    as_accurate(dyt, dyt_reference, inputs_of(5, 33, device="cuda:1"), torch.bfloat16)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    torch.compiler.reset()
    compiled = torch.compile(lambda *inputs: dyt(*inputs) * 2, fullgraph=True)
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(65, 257, device=device)]
    got, wanted = compiled(*leaves), dyt(*leaves) * 2
    torch.testing.assert_close(got, wanted)
    for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument(device):
    x, one = torch.ones(2, 3, device=device), torch.ones(1, device=device)
    with pytest.raises(ValueError, match=r"dyt: alpha \(3,\) must be one number"):
        dyt(x, x[0], x[0])
    with pytest.raises(ValueError, match=r"dyt: weight \(4,\) .* x \(2, 3\)"):
        dyt(x, one, torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"dyt: bias \(0,\)"):  # a ZeRO-3 shard that nobody gathered
        dyt(x, one, x[0], torch.ones(0, device=device))
    with pytest.raises(ValueError, match="dyt: x is torch.float64"):
        dyt(x.double(), one, x[0])


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in inputs_of(5, 33, device="cpu")]
    assert same_bits(dyt(*inputs), dyt_reference(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_fp32_have_gradients_in_fp32(dtype, device):
    """Small values, whose tanh in 16 bits is off by more than fp32 tells."""
    x = torch.linspace(-0.2, 0.2, 64, dtype=torch.float64, device=device).expand(4, 64).to(dtype)
    parameters = [torch.full((1,), 0.5, device=device), torch.ones(64, device=device), torch.zeros(64, device=device)]
    as_accurate(dyt, dyt_reference, [x, *parameters], dtype)
