"""mhc_coefficients: projection, gates and Sinkhorn-Knopp's iterations, both ways, against fp64."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits, ulp
from mhc import streams

import ds_fused.ops.registry as registry
from ds_fused.ops.residual.mhc_coefficients import (
    mhc_coefficients,
    mhc_coefficients_reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = registry.op("mhc_coefficients").module


def judge(inputs, dtype, *, frozen=(), iterations=3, **options):
    """Without dscale: see test_sums. Few iterations, of which an interpreter takes long: see test_iterations."""
    ops = mhc_coefficients, mhc_coefficients_reference
    as_accurate(*ops, inputs, dtype, frozen=(*frozen, 3), iterations=iterations, **options)


@pytest.mark.parametrize("dtype", DTYPES)
# odd; as many streams as a tile has, several tiles of tokens; more streams than usual; two blocks of columns and one
# column
@pytest.mark.parametrize(("t", "n", "c"), [(5, 3, 7), (18, 4, 9), (3, 8, 5), (16, 1, 257)])
def test_coefficients(t, n, c, dtype, device):
    judge(streams(t, n=n, c=c, device=device), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_number(dtype, device):
    """Of whose norm the gradient is zero: what is left of it is rounding."""
    judge(streams(1, n=1, c=1, device=device), dtype, floor=3e-4)


@pytest.mark.all
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [2, 5, 16])
def test_other_numbers_of_streams(n, dtype, device):
    judge(streams(2, 3, n=n, c=6, device=device), dtype)


def dscale(op, inputs, dys):
    scale = inputs[3].requires_grad_()
    return torch.autograd.grad(op(*inputs[:3], scale), scale, dys)[0]


# Three numbers, each a sum over all tokens of which most cancels: how far PyTorch is off in one case is luck, so the
# errors of many are judged together.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("t", [5, *(pytest.param(t, marks=pytest.mark.gpu) for t in (1000, 8191))])
def test_sums(t, dtype, device):
    ours = theirs = ulps = 0.0
    for seed in range(6):
        x, *parameters = (p.to(dtype) for p in streams(t, n=4, c=9, device=device))
        inputs = [randn(*x.shape, device=device, seed=10 * seed).to(dtype), *parameters]
        shapes = (t, 4), (t, 4), (t, 4, 4)
        dys = [randn(*s, device=device, seed=10 * seed + i).float() for i, s in enumerate(shapes)]
        ops = mhc_coefficients, mhc_coefficients_reference
        sums, torchs = (dscale(op, inputs, dys) for op in ops)
        exact = dscale(ops[1], [p.detach().double() for p in inputs], [dy.double() for dy in dys])
        ours, theirs = (a + (b.double() - exact) ** 2 for a, b in ((ours, sums), (theirs, torchs)))
        ulps += ulp(exact, dtype) ** 2
    assert bool((ours.sqrt() <= 2 * theirs.sqrt() + 4 * ulps.sqrt()).all())


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
# DeepSeek-V4-Flash; fewer tokens than give each multiprocessor a whole tile; two streams; eight
@pytest.mark.parametrize(("t", "n", "c"), [(8191, 4, 4096), (1000, 4, 1280), (2049, 2, 1024), (515, 8, 768)])
def test_real_sizes(t, n, c, dtype, weight_dtype, device):
    x, *parameters = streams(t, n=n, c=c, device=device)
    judge([x, *(p if weight_dtype is None else p.to(weight_dtype) for p in parameters)], dtype, iterations=20)


# x in 16 bits, of which the coefficients make fp32 by three products; a tile of tokens, since of few numbers PyTorch's
# error may happen to be none
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_in_fp32(dtype, device):
    x, *parameters = streams(5, n=4, c=33, device=device)
    judge([x, *(p.float() for p in parameters)], dtype)
    x, weight, bias, scale = streams(16, n=2, c=5, device=device)
    judge([x.float(), weight.to(dtype), bias, scale.to(dtype)], torch.float32)


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_iterations(iterations, device):
    judge(streams(16, n=4, c=7, device=device), torch.float32, iterations=iterations)


def test_options(device):
    options = {"eps": 0.1, "pre_eps": 0.25, "sinkhorn_eps": 0.01, "post_factor": 1.5}
    judge(streams(5, n=3, c=7, device=device), torch.float32, **options)
    judge(streams(5, n=3, c=7, device=device), torch.float32, sinkhorn_eps=0.0)


def test_rows_and_columns_sum_to_one(device):
    x, *parameters = (t.float() for t in streams(7, n=4, c=9, device=device))
    res = mhc_coefficients(x, *parameters, iterations=40)[2]
    for dim in (-1, -2):
        torch.testing.assert_close(res.sum(dim), torch.ones(7, 4, device=device), rtol=1e-4, atol=1e-4)


def test_logits_that_are_far_apart(device):
    x, weight, bias, scale = streams(5, n=4, c=7, device=device)
    judge([x, weight, bias, 10 * scale], torch.float32)


def test_autocast_changes_nothing():
    x, *parameters = (t.float() for t in streams(5, n=2, c=64, device="cpu"))
    wanted = mhc_coefficients_reference(x, *parameters)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(same_bits, mhc_coefficients_reference(x, *parameters), wanted))


def test_it_is_that_of_deepseek_v4(device):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "DeepseekV4Config"):
        pytest.skip("this transformers has no DeepSeek-V4")
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4HyperConnection

    x, weight, bias, scale = (t.float() for t in streams(2, 3, n=4, c=8, device=device))
    config = transformers.DeepseekV4Config(hidden_size=8, hc_mult=4, hc_sinkhorn_iters=5, hc_eps=1e-3, rms_norm_eps=0.1)
    theirs = DeepseekV4HyperConnection(config).to(device)
    theirs.load_state_dict({"fn": weight, "base": bias, "scale": scale})
    post, res, y = theirs(x)
    options = {"iterations": 5, "eps": 0.1, "pre_eps": 1e-3, "sinkhorn_eps": 1e-3}
    pre, *ours = mhc_coefficients(x, weight, bias, scale, **options)
    torch.testing.assert_close(ours, [post, res], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((pre[..., None] * x).sum(-2), y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (0, 1), (2,), (1, 2), (0, 2), (1, 2, 3), (0, 2, 3), (0, 1, 3)])
def test_frozen(frozen, device):
    ops = mhc_coefficients, mhc_coefficients_reference
    as_accurate(*ops, streams(2, n=3, c=7, device=device), torch.bfloat16, frozen=frozen, iterations=3)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2)])
def test_some_of_the_coefficients(used, device):
    """Of those that nobody uses no gradient comes."""

    def some(op):
        return lambda *inputs: [y for i, y in enumerate(op(*inputs)) if i in used]

    ops = mhc_coefficients, mhc_coefficients_reference
    as_accurate(*map(some, ops), streams(5, n=3, c=7, device=device), torch.float32, frozen=[3])


# a tile's programs take several turns at it; parts of the tokens are added up
def test_parts_of_tokens(device, monkeypatch):
    monkeypatch.setattr(FILE, "PROGRAMS_PER_MULTIPROCESSOR_BWD", 16)
    monkeypatch.setattr(FILE, "GATES_PER_MULTIPROCESSOR", 2)
    inputs = streams(70, n=4, c=5, device=device)
    judge(inputs, torch.float32)
    for frozen in ((0, 2), (1, 2)):
        judge(inputs, torch.bfloat16, frozen=frozen)


def test_strided_streams_and_a_transposed_weight(device):
    x, weight, bias, scale = (t.bfloat16() for t in streams(6, 2, n=3, c=8, device=device))
    wide = randn(6, 2, 3, 9, device=device).bfloat16()
    for view in (x[:, 1], x.transpose(0, 1), wide[..., 1:], x[:1].expand(4, 2, 3, 8)):
        judge([view, weight, bias, scale], torch.bfloat16)
    judge([x, weight.T.contiguous().T, bias, scale], torch.bfloat16)
    every_other = [randn(m, 2, device=device)[:, 0] for m in (15, 3)]
    judge([x, weight, *every_other], torch.bfloat16)


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_empty(leading, device):
    judge(streams(*leading, n=3, c=5, device=device), torch.float32)


def test_one_token_without_a_dimension(device):
    judge(streams(n=3, c=5, device=device), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    t, n, c = 2**17 + 3, 4, 4096
    x = torch.randn(t, n, c, device=device, dtype=torch.bfloat16).requires_grad_()
    parameters = [p.bfloat16() for p in streams(n=n, c=c, device=device)[1:]]
    outputs = mhc_coefficients(x, *parameters)
    dys = [torch.linspace(-1, 1, n ** (y.ndim - 1), device=device).view(y.shape[1:]).expand_as(y) for y in outputs]
    (dx,) = torch.autograd.grad(outputs, x, dys)
    tail = x.detach()[-3:].clone().requires_grad_()
    tails = mhc_coefficients(tail, *parameters)
    (dtail,) = torch.autograd.grad(tails, tail, [dy[-3:] for dy in dys])
    torch.testing.assert_close([y[-3:] for y in outputs], [*tails], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dx[-3:], dtail, rtol=2e-2, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    judge(streams(5, n=4, c=33, device="cuda:1"), torch.bfloat16)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    torch.compiler.reset()
    leaves = [t.bfloat16().requires_grad_() for t in streams(5, 13, n=4, c=64, device=device)]
    compiled = torch.compile(mhc_coefficients, fullgraph=True)
    got, wanted = compiled(*leaves), mhc_coefficients(*leaves)
    torch.testing.assert_close(got, wanted)
    dys = [torch.ones_like(y) for y in wanted[:2]] + [torch.rand_like(wanted[2])]
    for a, b in zip(*(torch.autograd.grad(y, leaves, dys) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_errors_name_the_argument(device):
    x, weight, bias, scale = (t.float() for t in streams(2, n=3, c=5, device=device))
    for inputs, said in (
        ((x[0, 0], weight, bias, scale), r"x \(5,\) must have two last dimensions, streams and columns"),
        ((x.expand(2, 3, 5).repeat(1, 6, 1), weight, bias, scale), r"x \(2, 18, 5\) has 18 streams .* 1 to 16"),
        ((x, weight[:, :0], bias, scale), r"weight \(15, 0\) must be \(15, 15\) for x \(2, 3, 5\)"),
        ((x, weight, bias[:3], scale), r"bias \(3,\) must be \(15,\)"),
        ((x, weight, bias, scale[:1]), r"scale \(1,\) must be \(3,\)"),
        ((x.double(), weight, bias, scale), "x is torch.float64; kernels exist for"),
    ):
        with pytest.raises(ValueError, match=f"mhc_coefficients: {said}"):
            mhc_coefficients(*inputs)
    with pytest.raises(ValueError, match="iterations is 0; there must be at least 1"):
        mhc_coefficients(x, weight, bias, scale, iterations=0)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in streams(2, n=3, c=5, device="cpu")]
    ours, references = mhc_coefficients(*inputs), mhc_coefficients_reference(*inputs)
    assert all(same_bits(a, b) for a, b in zip(ours, references, strict=True))
