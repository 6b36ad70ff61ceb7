"""lora_linear: both passes against fp64, what is frozen, a dropout before the adapter, and the errors."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits
from torch import Tensor

from ds_fused.ops.mlp._pieces import LEFT, RIGHT, added, narrow_times, pieces, times_narrow
from ds_fused.ops.mlp.lora_linear import lora_linear, lora_linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(shape: tuple[int, ...], n_out: int, rank: int, device: torch.device) -> list[Tensor]:
    n_in = shape[-1]
    weight, a = (randn(n, n_in, device=device, seed=n) / max(n_in, 1) ** 0.5 for n in (n_out, rank))
    return [randn(*shape, device=device), weight, a, randn(n_out, rank, device=device, seed=5) / max(rank, 1) ** 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "n_out", "rank"),
    [
        ((1,), 1, 1),
        ((3, 7), 5, 2),
        ((2, 3, 33), 17, 4),
        pytest.param((2, 511, 4096), 1024, 16, marks=pytest.mark.gpu),  # Llama-3-8B's k_proj
    ],
)
@pytest.mark.parametrize("more", [(), ("bias",), ("bias", "lora_x")], ids=str)
def test_lora_linear(shape, n_out, rank, more, dtype, device):
    tensors = operands(shape, n_out, rank, device)
    if "bias" in more:
        tensors.append(randn(n_out, device=device, seed=6))
    if "lora_x" in more:
        tensors.append(randn(*shape, device=device, seed=7))
    ours, reference = (lambda *t, op=op: op(*t, scaling=0.7) for op in (lora_linear, lora_linear_reference))
    as_accurate(ours, reference, tensors, dtype)


@pytest.mark.parametrize(
    ("shape", "n_out", "rank"),
    [
        ((1,), 1, 1),
        ((3, 7), 5, 2),
        ((2, 19, 33), 17, 4),
        ((0, 5), 4, 2),
        pytest.param((2, 511, 4096), 1024, 16, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("more", [(), ("bias",), ("bias", "lora_x")], ids=str)
def test_an_adapter_in_fp32_keeps_its_bits(shape, n_out, rank, more, device):
    x, weight, a, b = operands(shape, n_out, rank, device)
    given = {"bias": randn(n_out, device=device, seed=6), "lora_x": randn(*shape, device=device, seed=7).float()}
    more = [given[name] for name in more]
    ours, reference = (lambda *t, op=op: op(*t, scaling=0.7) for op in (lora_linear, lora_linear_reference))
    as_accurate(ours, reference, [x, weight, a.float(), b.float(), *more], torch.bfloat16)


@pytest.mark.parametrize("side", [LEFT, RIGHT])
def test_pieces(side, device):
    v = torch.cat([randn(5, 7, device=device) * 10.0**-i for i in range(0, 30, 6)]).float()
    found = pieces(v, side).unflatten(1, (6, 7))
    order = [0, 0, 0, 1, 2, 1] if side == RIGHT else [0, 1, 2, 0, 0, 1]
    once = found[:, [order.index(piece) for piece in range(3)]]
    torch.testing.assert_close(once.double().sum(1), v.double(), rtol=2**-22, atol=1e-38)
    assert all(torch.equal(found[:, i], once[:, piece]) for i, piece in enumerate(order))


# less than a tile of each; more of one, shares of the rows
@pytest.mark.parametrize(
    ("m", "k", "c"), [(3, 5, 2), (70, 150, 70), pytest.param(8191, 4096, 200, marks=pytest.mark.gpu), (0, 5, 2)]
)
def test_narrow_products(m, k, c, device):
    rows, narrow = randn(m, k, device=device).bfloat16(), randn(k, c, device=device).float()
    gaps = torch.full((m, k + 3), torch.nan, device=device).bfloat16()
    gaps[:, :k] = rows
    for given in (narrow, narrow.t().contiguous().t()):
        six = times_narrow(gaps[:, :k], given, 0.7)
        wanted = 0.7 * rows.double() @ narrow.double()
        # each step is rounded once; a tensor core's own sums would be off by k 2^-28
        torch.testing.assert_close(added(six).double(), wanted, rtol=1e-5, atol=1e-6 * max(1, k) ** 0.5)
    exact = added(six).double().t() @ rows.double()
    for turned in (False, True):
        got = narrow_times(six, gaps[:, :k], turned=turned)
        torch.testing.assert_close(
            got.double(), exact.t() if turned else exact, rtol=1e-5, atol=1e-6 * max(1, m * k) ** 0.5
        )


def test_pieces_of_what_is_not_finite(device):
    v = torch.tensor([[float("inf"), float("-inf"), float("nan"), 3e38]], device=device)
    whole = pieces(v, LEFT).float().view(6, 4)[:3].sum(0)
    assert whole[:2].tolist() == [float("inf"), float("-inf")] and whole[2].isnan() and whole[3].isfinite()


@pytest.mark.parametrize("trained", ["x", "ab", "xab", "lora_x", "weight"])
def test_only_what_is_trained_has_a_gradient(trained, device):
    x, weight, a, b = (t.bfloat16() for t in operands((2, 3, 33), 17, 4, device))
    given = {"x": x, "weight": weight, "a": a, "b": b, "lora_x": x.flip(0)}
    names = {"x": ["x"], "ab": ["a", "b"], "xab": ["x", "a", "b"]}.get(trained, [trained])

    def gradients(op) -> list[Tensor]:
        leaves = {name: t.detach().clone().requires_grad_(name in names) for name, t in given.items()}
        lora_x = leaves["lora_x"] if trained == "lora_x" else None
        y = op(leaves["x"], leaves["weight"], leaves["a"], leaves["b"], None, lora_x, scaling=2.0)
        y.backward(torch.ones_like(y))
        assert all((leaf.grad is None) == (name not in names) for name, leaf in leaves.items())
        return [leaves[name].grad for name in names]

    for ours, theirs in zip(gradients(lora_linear), gradients(lora_linear_reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (3, 0)])
def test_empty(shape, device):
    as_accurate(lora_linear, lora_linear_reference, operands(shape, 4, 2, device), torch.float32)


def test_strides(device):
    x, weight, a, b = operands((3, 14), 6, 2, device)
    gaps = randn(3, 40, device=device)[:, 3:17]
    as_accurate(lora_linear, lora_linear_reference, [gaps, weight, a, b], torch.bfloat16)
    turned = [x, randn(14, 6, device=device).t(), randn(14, 2, device=device).t(), randn(2, 6, device=device).t()]
    as_accurate(lora_linear, lora_linear_reference, turned, torch.bfloat16)
    # an upstream gradient without memory of its own
    leaf = x.float().requires_grad_()
    (dx,) = torch.autograd.grad(lora_linear(leaf, *(t.float() for t in (weight, a, b))).sum(), leaf)
    wanted = (weight + b @ a).float().sum(0).expand(3, -1)
    torch.testing.assert_close(dx, wanted, rtol=1e-5, atol=1e-5)


def test_fp16_need_not_hold_what_is_scaled(device):
    """Behind an A of large numbers and an untrained B, of zeros."""
    filled = {(3, 64): 100.0, (5, 64): 0.0, (2, 64): 1.0, (5, 2): 0.0}  # x, weight, A, B
    tensors = [torch.full(shape, n, device=device).half().requires_grad_() for shape, n in filled.items()]
    y, wanted = (op(*tensors, scaling=16.0) for op in (lora_linear, lora_linear_reference))
    assert torch.equal(y, wanted)
    dy = torch.full_like(y, 2.0**-8)
    for got, exact in zip(torch.autograd.grad(y, tensors, dy), torch.autograd.grad(wanted, tensors, dy), strict=True):
        torch.testing.assert_close(got, exact)


def test_the_result_may_be_written_in(device):
    """As that of any linear layer: `y += residual`."""
    for adapter in (torch.bfloat16, torch.float32):
        x, weight, *ab = (t.bfloat16() for t in operands((2, 3, 33), 17, 4, device))
        ab = [t.to(adapter).requires_grad_() for t in ab]
        residual = randn(2, 3, 17, device=device).bfloat16()

        def gradients(add, tensors=(x, weight, *ab), residual=residual) -> tuple[Tensor, ...]:
            y = add(lora_linear(*tensors), residual)
            return y.detach(), *torch.autograd.grad(y.square().sum(), tensors[2:])

        for got, wanted in zip(gradients(Tensor.add_), gradients(Tensor.add), strict=True):
            assert same_bits(got, wanted)


def test_the_same_bits_twice(device):
    tensors = [t.bfloat16() for t in operands((2, 3, 33), 17, 4, device)]

    def results() -> list[Tensor]:
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        y = lora_linear(*leaves, scaling=0.5)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    assert all(same_bits(a, b) for a, b in zip(results(), results(), strict=True))


def test_under_autocast_it_is_the_layers(device):
    tensors = [t.float() for t in operands((3, 7), 5, 2, device)]
    with torch.autocast(device.type, torch.bfloat16):
        ours, theirs = (op(*tensors, scaling=0.5) for op in (lora_linear, lora_linear_reference))
    assert ours.dtype == torch.bfloat16 and same_bits(ours, theirs)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    tensors = [t.bfloat16().requires_grad_() for t in operands((65, 256), 128, 8, device)]
    got, wanted = torch.compile(lambda *t: lora_linear(*t) * 2, fullgraph=True)(*tensors), lora_linear(*tensors) * 2
    torch.testing.assert_close(got, wanted)
    for ours, theirs in zip(*(torch.autograd.grad(y.sum(), tensors) for y in (got, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_errors_and_the_reference(device, monkeypatch):
    x, weight, a, b = operands((3, 7), 5, 2, device)
    with pytest.raises(ValueError, match=r"lora_linear: x is \(3, 6\); with weight \(5, 7\) .* must be \(3, 7\)"):
        lora_linear(x[:, 1:], weight, a, b)
    with pytest.raises(ValueError, match=r"lora_linear: lora_b is \(2, 5\); .* rank 2 it must be \(5, 2\)"):
        lora_linear(x, weight, a, b.t())
    with pytest.raises(ValueError, match=r"lora_linear: bias is \(4,\); .* must be \(5,\)"):
        lora_linear(x, weight, a, b, torch.ones(4, device=device))
    with pytest.raises(ValueError, match="lora_linear: lora_a has 1 dimensions, .* it must have 2"):
        lora_linear(x, weight, a[0], b)
    with pytest.raises(ValueError, match="lora_linear: x is torch.float64"):
        lora_linear(*(t.double() for t in (x, weight, a, b)))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert lora_linear(*(t.double().cpu() for t in (x, weight, a, b))).dtype == torch.float64
