"""add_rms_norm: both results and the one gradient of both summands, on rms_norm's kernels."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _row_tiles
from ds_fused.ops.norms._norms import CASTS
from ds_fused.ops.norms.add_rms_norm import add_rms_norm, add_rms_norm_reference
from ds_fused.ops.norms.rms_norm import rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = registry.op("rms_norm").module


def inputs_of(*shape, device):
    return [randn(*shape, device=device), randn(*shape, device=device, seed=1), randn(shape[-1], device=device)]


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than the persistent grid has, the last tile short; just over a power of two
@pytest.mark.parametrize("shape", [(1,), (3, 7), (5, 27, 33), pytest.param((7, 1025), marks=pytest.mark.all)])
def test_add_rms_norm(shape, dtype, cast, device):
    # eps that counts: dx of one column is a difference of equal terms otherwise, noise in any dtype
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs_of(*shape, device=device), dtype, eps=0.5, cast=cast)


@pytest.mark.gpu
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", DTYPES)
# Qwen2-0.5B; Llama-3-8B; the widest that backward takes whole; walked backward; walked forward too
@pytest.mark.parametrize("shape", [(4095, 896), (2049, 4096), (513, 16384), (513, 16385), (65, 40960)])
def test_add_rms_norm_of_real_sizes(shape, dtype, cast, device):
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs_of(*shape, device=device), dtype, cast=cast)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_wide_for_a_tile_are_walked(dtype, cast, device, monkeypatch):
    monkeypatch.setattr(KERNELS, "WHOLE_ROW_FWD", 8)
    monkeypatch.setattr(KERNELS, "WHOLE_ROW_BWD", 8)
    monkeypatch.setattr(_row_tiles, "WALK_BLOCK", 16)
    inputs = inputs_of(5, 41, device=device)
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs, dtype, cast=cast, offset=1.0)


@pytest.mark.parametrize("d", [11, 18])
@pytest.mark.parametrize("cast", CASTS)
def test_rows_in_blocks(cast, d, device, monkeypatch):
    monkeypatch.setattr(_row_tiles, "LEAST_BLOCK", 4)
    # three and five of 4 columns, the last one short
    inputs = inputs_of(5, d, device=device)
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs, torch.bfloat16, cast=cast)


@pytest.mark.parametrize("cast", CASTS)
def test_without_weight(cast, device):
    inputs = [*inputs_of(5, 33, device=device)[:2], None]
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs, torch.bfloat16, cast=cast)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32, torch.bfloat16),  # a residual stream in fp32
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.bfloat16),  # their sum is fp32
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
)
def test_dtypes_promote(dtypes, cast, device):
    inputs = [x.to(dtype) for x, dtype in zip(inputs_of(5, 33, device=device), dtypes, strict=True)]
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs, torch.bfloat16, cast=cast)


def test_the_bits_of_the_two_steps(device):
    x, residual, weight = (t.bfloat16() for t in inputs_of(64, 33, device=device))
    y, total = add_rms_norm(x, residual, weight)
    assert same_bits(total, x + residual)
    assert same_bits(y, rms_norm(x + residual, weight))


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 2)])
def test_frozen(frozen, device):
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs_of(5, 33, device=device), torch.float32, frozen=frozen)


def test_frozen_summands_leave_the_sum_out_of_the_graph(device):
    x, residual, weight = (t.float() for t in inputs_of(5, 33, device=device))
    weight.requires_grad_()
    y, total = add_rms_norm(x, residual, weight)
    assert y.requires_grad and not total.requires_grad
    y.sum().backward()
    wanted = torch.nn.functional.rms_norm(x + residual, (33,), eps=1e-6).sum(0)
    torch.testing.assert_close(weight.grad, wanted)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_that_goes_nowhere(used, device):
    def one(function):
        return lambda *inputs, **options: function(*inputs, **options)[used]

    inputs = inputs_of(5, 33, device=device)
    # PyTorch gives the weight of an unused y no gradient
    frozen = (2,) if used == 1 else ()
    as_accurate(one(add_rms_norm), one(add_rms_norm_reference), inputs, torch.bfloat16, frozen=frozen)


def test_two_summands_never_share_a_grad(device):
    x, residual, weight = (t.float().requires_grad_() for t in inputs_of(5, 33, device=device))
    torch.autograd.backward([t.sum() for t in add_rms_norm(x, residual, weight)])
    assert torch.equal(x.grad, residual.grad)
    assert x.grad.data_ptr() != residual.grad.data_ptr()

    # one tensor as both, and one that is used elsewhere too: autograd adds up, not in place
    def twice(function):
        def call(x, weight):
            y, total = function(x, x, weight)
            again, _ = function(total, x, weight)
            return y, again, total

        return call

    inputs = [randn(5, 33, device=device), randn(33, device=device)]
    as_accurate(twice(add_rms_norm), twice(add_rms_norm_reference), inputs, torch.float32)


def test_strided_rows(device):
    x = randn(6, 2, 33, device=device).bfloat16()
    for view in (x[:, 1], x[::2], x.transpose(0, 1), x[..., 1:], x[:1].expand(4, 2, 33)):  # read in place, or copied
        other = randn(*view.shape, device=device, seed=1)
        for inputs in ([view, other], [other, view]):
            inputs = [*inputs, randn(view.shape[-1], device=device)]
            as_accurate(add_rms_norm, add_rms_norm_reference, inputs, torch.bfloat16)


def test_gradients_come_in_any_layout(device):
    # .sum() hands back one number expanded, a transposed use columns apart
    results = []
    for function in (add_rms_norm, add_rms_norm_reference):
        leaves = [t.float().requires_grad_() for t in inputs_of(5, 33, device=device)]
        y, total = function(*leaves)
        weights = randn(33, 5, device=device).float()
        torch.autograd.backward([(y.t() * weights).sum(), total.sum()])
        results.append([leaf.grad for leaf in leaves])
    for ours, torchs in zip(*results, strict=True):
        torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (5, 0)])
def test_empty(shape, device):
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs_of(*shape, device=device), torch.float32)


def test_under_autocast(device):
    # what a linear layer hands on is bf16, the residual stream fp32
    inputs = inputs_of(5, 33, device=device)
    inputs = [inputs[0].bfloat16(), inputs[1].float(), inputs[2].float()]
    with torch.autocast(device.type, torch.bfloat16):
        as_accurate(add_rms_norm, add_rms_norm_reference, inputs, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**20 + 1, 2**11  # 2^31 + 2^11 elements, 4 GiB each
    x, residual = (torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(2))
    weight = torch.randn(d, device=device).bfloat16()
    results = add_rms_norm(x, residual, weight)
    torch.autograd.backward(results, [x.detach(), residual.detach()])
    tails = [t.detach()[-3:].clone().requires_grad_() for t in (x, residual)]
    tail_results = add_rms_norm(*tails, weight)
    torch.autograd.backward(tail_results, [t.detach() for t in tails])
    for whole, tail in zip(results, tail_results, strict=True):
        assert same_bits(whole[-3:].detach(), tail.detach())
    assert same_bits(x.grad[-3:], tails[0].grad)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    as_accurate(add_rms_norm, add_rms_norm_reference, inputs_of(5, 33, device="cuda:1"), torch.bfloat16)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(65, 257, device=device)]
    compiled = torch.compile(lambda *inputs: [2 * t for t in add_rms_norm(*inputs)], fullgraph=True)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    outcomes = []
    for results, inputs in (
        (compiled(*leaves), leaves),
        ([2 * t for t in add_rms_norm(*leaves)], leaves),
        ([2 * t for t in add_rms_norm_reference(*exact)], exact),
    ):
        outcomes.append([*results, *torch.autograd.grad([t.sum() for t in results], inputs)])
    for got, wanted, right in zip(*outcomes, strict=True):
        error, allowed = ((value.double() - right).abs().max() for value in (got, wanted))
        assert error <= 1.01 * allowed


def test_errors_name_the_argument(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=r"add_rms_norm: x \(2, 3\) and residual \(1, 3\)"):
        add_rms_norm(x, x[:1], None)
    with pytest.raises(ValueError, match=r"add_rms_norm: weight \(0,\) .* x \(2, 3\)"):
        add_rms_norm(x, x, torch.ones(0, device=device))
    with pytest.raises(ValueError, match="add_rms_norm: cast is 'llama'; known are before_weight"):
        add_rms_norm(x, x, None, cast="llama")
    with pytest.raises(ValueError, match="add_rms_norm: residual is torch.int64"):
        add_rms_norm(x, x.long(), None)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in inputs_of(5, 33, device="cpu")]
    ours, references = add_rms_norm(*inputs), add_rms_norm_reference(*inputs)
    assert all(same_bits(a, b) for a, b in zip(ours, references, strict=True))
