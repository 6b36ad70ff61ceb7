"""What is kept of a function under a checkpoint, and that everything else of it is computed again."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.memory.intercept import ATTENTION, MATMUL
from ds_fused.modules.memory.kept import LEVELS, Empty, Learnt, Recording, needed_bytes, postponable, tensors_of

N, D = 5, 6


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]


def gradients(function, inputs: list[Tensor], learnt: Learnt | None = None, level: str = "matmuls") -> list[Tensor]:
    """The output and the gradients; under a checkpoint that keeps where something can be learnt."""
    torch.manual_seed(0)
    context = {} if learnt is None else {"context_fn": Recording(learnt, LEVELS[level]).contexts}
    y = checkpoint(function, *inputs, use_reentrant=False, **context)
    return [y.detach(), *torch.autograd.grad(y.sum() + (y * y).sum(), inputs)]


def same(got: list[Tensor], wanted: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def assert_stock(function, inputs: list[Tensor], level: str = "matmuls") -> Recording:
    stock = gradients(function, inputs)
    learnt = Learnt()
    for _ in range(3):
        assert same(gradients(function, inputs, learnt, level), stock)
    return counted(function, inputs, level, learnt)


def counted(function, inputs: list[Tensor], level: str, learnt: Learnt | None = None) -> Recording:
    recording = Recording(learnt or Learnt(), LEVELS[level], counts=True)
    checkpoint(function, *inputs, use_reentrant=False, context_fn=recording.contexts)
    return recording


def test_what_is_kept_is_counted():
    def function(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, w)), v)

    recording = assert_stock(function, leaves((2, N, D), (7, D), (3, 7)))
    assert recording.kept_bytes() == 4 * 2 * N * 7
    assert needed_bytes(recording.sizes, recording.learnt, MATMUL) == 4 * 2 * N * 7
    assert needed_bytes(recording.sizes, recording.learnt, ATTENTION) == 0


@pytest.mark.parametrize("shape", [(N, D), (2, N, D), (0, D)])
def test_products(shape):
    def function(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
        y = F.linear(x, w, b).sigmoid()
        return F.linear(torch.addmm(b, y.flatten(0, -2), v).exp(), v)

    assert_stock(function, leaves(shape, (7, D), (7,), (7, 7)))


@torch.library.custom_op("flash_attn_of_a_test::_flash_attn_forward", mutates_args=())
def flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> list[Tensor]:
    RAN.append(dropout_p)
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    if dropout_p:
        weights = torch.dropout(weights, dropout_p, True)
    return [weights @ v, weights]


RAN: list[float] = []


class Flash(torch.autograd.Function):
    """As the package's: an op of its own, in a function of its own."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
        out, weights = torch.ops.flash_attn_of_a_test._flash_attn_forward(q, k, v, dropout_p)
        ctx.save_for_backward(v, weights)
        return out

    @staticmethod
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        v, weights = ctx.saved_tensors
        return dout * v, dout, weights.transpose(-1, -2) @ dout, None


@pytest.mark.parametrize("dropout_p, runs", [(0.0, 1), (0.5, 2)])
def test_flash_attention(monkeypatch, dropout_p, runs):
    import transformers.modeling_flash_attention_utils as home

    monkeypatch.setattr(home, "_flash_fn", Flash.apply)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.dropout(home._flash_fn(q, k, v, dropout_p), 0.3, True).sin()

    inputs = leaves(*[(2, N, D)] * 3)
    assert_stock(function, inputs, "attention")
    RAN.clear()
    gradients(function, inputs, Learnt(), "attention")
    assert len(RAN) == runs
    assert home._flash_fn == Flash.apply


class Late(torch.autograd.Function):
    """A product that saves its inputs behind it, and reads its own result in between."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w.t()
        y += 1
        return y * y.abs().max() if Late.reads else y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return dy @ w, dy.T @ x

    reads = False


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("level", ["full", "matmuls"])
def test_a_last_product_is_put_off_until_it_is_read(monkeypatch, reads, level):
    monkeypatch.setattr(Late, "reads", reads)
    monkeypatch.setattr(F, "linear", Late.apply)
    ends = True

    def function(x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w)
        return y if ends else y.sin()

    inputs = leaves((N, D), (D, D))
    stock = gradients(function, inputs)
    learnt = Learnt()
    for _ in range(2):
        assert same(gradients(function, inputs, learnt, level), stock)
    assert learnt.ends_within and learnt.unread == 1
    # what was learnt is wrong for once
    ends = False
    assert same(gradients(function, inputs, Learnt(1, True), level), gradients(function, inputs))


class Many(torch.autograd.Function):
    """Two products and a dropout, of which backward computes all again: x and w are kept."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor, empty: Empty | None) -> Tensor:
        ctx.state = torch.get_rng_state()
        ctx.save_for_backward(x, w)
        return Many.compute(x, w) if empty is None else empty()

    @staticmethod
    def compute(x: Tensor, w: Tensor) -> Tensor:
        RAN.append(0.5)
        return F.linear(torch.dropout(F.linear(x, w), 0.5, True), w)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.random.fork_rng(), torch.enable_grad():
            torch.set_rng_state(ctx.state)
            y = Many.compute(*leaves)
        return *torch.autograd.grad(y, leaves, dy), None


def many(x: Tensor, w: Tensor) -> Tensor:
    return postponable(lambda empty: Many.apply(x, w, empty), lambda: Many.compute(x, w))


# what follows the call -> how often it is computed in a step, once learnt: the repetition ends within it or does not
@pytest.mark.parametrize(
    "behind, runs",
    [(lambda y, w: y + 1, 2), (lambda y, w: y.sin(), 3), (lambda y, w: F.linear(torch.dropout(y, 0.5, True), w), 3)],
    ids=["sum", "sin", "product"],
)
@pytest.mark.parametrize("level", LEVELS)
def test_many_products_are_one_call_that_is_put_off_until_it_is_read(level, behind, runs):
    def function(x: Tensor, w: Tensor) -> Tensor:
        return behind(many(F.linear(x, w).sin(), w), w)

    inputs = leaves((N, D), (D, D))
    RAN.clear()
    stock = gradients(function, inputs)
    assert len(RAN) == 3
    learnt = Learnt()
    for _ in range(3):
        RAN.clear()
        assert same(gradients(function, inputs, learnt, level), stock)
    assert len(RAN) == runs
    # what was learnt is wrong for once: its values are read, or what it is not expected to come to is
    n_calls = len(counted(function, inputs, level).calls)
    for unread in range(1, n_calls + 1):
        for ends_within in (True, False):
            assert same(gradients(function, inputs, Learnt(unread, ends_within), level), stock)


def test_many_products_count_as_one_that_keeps_nothing():
    recording = counted(lambda x, w: many(F.linear(x, w).sin(), w), leaves((N, D), (D, D)), "matmuls")
    assert recording.sizes == [(MATMUL, 4 * N * D), (MATMUL, 0)]
    assert recording.kept_bytes() == 4 * N * D


def test_a_repetition_that_computes_something_else_is_an_error():
    calls = []

    def function(x: Tensor, w: Tensor) -> Tensor:
        calls.append(None)
        y = F.scaled_dot_product_attention(x, x, x) if len(calls) == 1 else torch.addmm(x[0, 0], x[0, 0], w)
        return F.linear(y, w).sin()

    with pytest.raises(RuntimeError, match="the repetition of a layer came to aten.*addmm.* where .*was kept"):
        gradients(function, leaves((1, 1, N, N), (N, N)), Learnt())


def test_a_compiled_part_is_computed_again():
    @functools.partial(torch.compile, backend="eager")
    def part(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(x, w).sigmoid()

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(part(F.linear(x, w).sigmoid(), w), w).sin()

    if torch.cuda.is_available():
        # a compiler does, and a checkpoint refuses to have it done within
        torch.cuda.init()
    recording = assert_stock(function, leaves((N, D), (D, D)))
    assert recording.kept_bytes() == 2 * 4 * N * D


def test_a_checkpoint_within():
    def inner(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(F.linear(x, w).sin(), w).sin()

    def function(x: Tensor, w: Tensor) -> Tensor:
        return F.linear(checkpoint(inner, x, w, use_reentrant=False), w).sin()

    assert_stock(function, leaves((N, D), (D, D)))


def test_tensors_of():
    x, y = torch.zeros(1), torch.zeros(2)
    assert tensors_of(x) == (x,)
    assert tensors_of([x, 3, (y,)]) == (x,)
    assert tensors_of(None) == ()
