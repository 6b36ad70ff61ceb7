"""A tiled layer is the layer: outputs, all gradients, one gradient for each parameter and backward."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.layers.mlp import Gate, GatedMLP
from ds_fused.modules.layers.tiled_mlp import TiledMLP, Tiles, tiled
from ds_fused.modules.swap import swap, unswap


class MLP(nn.Module):
    """Llama's, with a bias to sum over rows and whatever else a test wants."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 5)
        self.dropout = nn.Dropout(dropout)
        self.act_fn = nn.SiLU()
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.rows.append(x.shape[-2])
        return self.down_proj(self.dropout(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


@pytest.fixture
def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP()


def tile(module: nn.Module, tiles: int) -> nn.Module:
    made = copy.deepcopy(module)
    swap(made, TiledMLP, fused_tiles=Tiles(tiles))
    return made


def run(module: nn.Module, x: Tensor, micro_batches: int = 1) -> list[Tensor | None]:
    """The last output, and the gradients of x and of all parameters."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    module.zero_grad()
    for i in range(micro_batches):
        y = module((1 + i) * x)
        dy = torch.linspace(-1, 2, y.numel()).view_as(y).to(y.dtype)
        y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def close(got: list[Tensor | None], wanted: list[Tensor | None], tolerance: float = 1e-5) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype and a.shape == b.shape
            assert torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 20])  # 14 rows: whole tiles, a short last one, one each, empty ones
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_it_is_the_layer(mlp, tiles, micro_batches):
    x = torch.randn(2, 7, 6, requires_grad=True)
    fused = tile(mlp, tiles)
    close(run(fused, x, micro_batches), run(mlp, x, micro_batches))
    size = -(-14 // tiles)
    assert max(fused.rows) == size and len(fused.rows) == 2 * tiles * micro_batches
    assert sum(fused.rows) == 2 * 14 * micro_batches


@pytest.mark.parametrize("shape", [(1, 6), (0, 6), (2, 0, 6), (2, 3, 2, 6)])
def test_shapes(mlp, shape):
    x = torch.randn(shape, requires_grad=True)
    close(run(tile(mlp, 3), x), run(mlp, x))


def test_rows_that_do_not_lie_side_by_side(mlp):
    x = torch.randn(7, 2, 12)[..., ::2].transpose(0, 1)
    close(run(tile(mlp, 3), x), run(mlp, x))
    x, fused = x.requires_grad_(), tile(mlp, 3)
    fused.zero_grad(), mlp.zero_grad()
    fused(x).transpose(0, 1)[:, :, 1:].sum().backward()
    mlp(x.detach()).transpose(0, 1)[:, :, 1:].sum().backward()
    close([p.grad for p in fused.parameters()], [p.grad for p in mlp.parameters()])


def test_what_is_frozen_gets_no_gradient(mlp):
    x = torch.randn(2, 7, 6)
    close(run(tile(mlp, 3), x), run(mlp, x))  # x alone
    mlp.up_proj.requires_grad_(False)
    x.requires_grad_()
    close(run(tile(mlp, 3), x), run(mlp, x))
    mlp.requires_grad_(False)
    fused = tile(mlp, 3)
    close(run(fused, x), run(mlp, x))
    fused.rows.clear()
    assert not fused(x.detach()).requires_grad
    with torch.no_grad():
        assert not fused(x).requires_grad
    assert len(fused.rows) == 6


def test_gradients_of_16_bits_are_rounded_once(mlp):
    """Of many equal tiles the last ones would be lost in a sum of 16 bits."""
    mlp.bfloat16()
    x = torch.randn(1, 6).bfloat16().expand(2048, 6)

    def judged(module: nn.Module) -> list[Tensor]:
        module.zero_grad()
        module(x).sum().backward()
        return [p.grad.double() for p in module.parameters()]

    wide = copy.deepcopy(mlp).double()
    wide(x.double()).sum().backward()
    exact = [p.grad for p in wide.parameters()]
    for ours, stock, truth in zip(judged(tile(mlp, 1024)), judged(mlp), exact, strict=True):
        ulps = 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (stock - truth).abs().max() + ulps


def test_every_parameter_is_told_once_a_backward(mlp):
    fused, seen = tile(mlp, 4), []
    for name, p in fused.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, p.grad.clone())))
    x = torch.randn(2, 7, 6)
    wanted = run(mlp, x)[2:]
    got = run(fused, x)[2:]
    assert sorted(name for name, _ in seen) == sorted(name for name, _ in mlp.named_parameters())
    close(got, wanted)
    close([dict(seen)[name] for name, _ in mlp.named_parameters()], wanted)


def test_dropout_falls_alike_in_both_passes():
    torch.manual_seed(0)
    mlp = MLP(dropout=0.5)
    x = torch.randn(2, 7, 6, requires_grad=True)

    def seeded(call):
        torch.manual_seed(1)
        return call()

    def by_hand(x: Tensor) -> Tensor:
        return torch.cat([mlp(piece) for piece in x.view(1, 14, 6).split(5, 1)], 1).view(2, 7, 5)

    wanted_y = seeded(lambda: by_hand(x))
    wanted = torch.autograd.grad(wanted_y.square().sum(), [x, *mlp.parameters()])
    fused = tile(mlp, 3)
    y = seeded(lambda: fused(x))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    y.square().sum().backward()
    assert torch.equal(torch.get_rng_state(), state)
    close([y, x.grad, *(p.grad for p in fused.parameters())], [wanted_y, *wanted])


def test_autocast(mlp):
    x = torch.randn(2, 7, 6, requires_grad=True)

    def cast(module: nn.Module) -> list[Tensor | None]:
        leaf = x.detach().clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = module(leaf)
        y.backward(torch.ones_like(y))
        return [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]

    close(cast(tile(mlp, 3)), cast(mlp), tolerance=2e-2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(mlp, use_reentrant):
    x, fused = torch.randn(2, 7, 6, requires_grad=True), tile(mlp, 3)
    checkpoint(fused, x, use_reentrant=use_reentrant).sum().backward()
    got, x.grad = x.grad, None
    mlp(x).sum().backward()
    close([got, *(p.grad for p in fused.parameters())], [x.grad, *(p.grad for p in mlp.parameters())])


def test_over_a_fused_layer(mlp):
    class TiledGated(TiledMLP, GatedMLP):
        pass

    x = torch.randn(2, 7, 6, requires_grad=True)
    fused = copy.deepcopy(mlp)
    children = ("gate_proj", "up_proj", "down_proj")
    swap(fused, TiledGated, fused_tiles=Tiles(3), fused_gate=Gate(), fused_children=children)
    close(run(fused, x), run(mlp, x))
    assert not fused.rows  # the original's forward is not what ran
    unswap(fused)
    assert type(fused) is MLP


def test_it_keeps_x_and_nothing_else(mlp):
    """Activations of a tile are gone when the next one begins, in both passes."""
    alive: list[weakref.ref] = []

    def layer(x: Tensor) -> Tensor:
        assert not any(ref() is not None for ref in alive)
        inner = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        alive.append(weakref.ref(inner))
        return mlp.down_proj(inner)

    kept = []
    x = torch.randn(2, 7, 6, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = tiled(layer, x, 3, mlp.parameters())
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]
    y.sum().backward()
    assert len(alive) == 6


def test_compiles_without_a_break(mlp):
    x, fused = torch.randn(2, 7, 6, requires_grad=True), tile(mlp, 3)
    fused.rows = mlp.rows = None
    plain = type(mlp).forward
    try:
        type(mlp).forward = lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        torch.compile(fused, fullgraph=True, backend="aot_eager")(x).sum().backward()
        got, x.grad = x.grad, None
        mlp(x).sum().backward()
    finally:
        type(mlp).forward = plain
    close([got, *(p.grad for p in fused.parameters())], [x.grad, *(p.grad for p in mlp.parameters())])


def test_errors(mlp):
    x = torch.randn(2, 7, 6)
    for tiles in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=rf"tiled: tiles is {tiles}; it must be a whole number"):
            tiled(mlp, x, tiles, mlp.parameters())
    with pytest.raises(ValueError, match=r"x must be \[..., tokens, width\]; got \(6,\)"):
        tiled(mlp, x[0, 0], 2, mlp.parameters())
    with pytest.raises(ValueError, match=r"made \(1, 6\) of \(1, 5, 6\); rows must stay"):
        tiled(lambda x: x.sum(-2), x, 3, mlp.parameters())


def test_gradients_without_backward(mlp):
    x, fused = torch.randn(2, 7, 6, requires_grad=True), tile(mlp, 3)
    inputs = [[x, *model.parameters()] for model in (fused, mlp)]
    close(*(torch.autograd.grad(model(x).sum(), given) for model, given in zip((fused, mlp), inputs, strict=True)))


def test_parameters_of_the_first_tiles_alone(mlp):
    x = torch.randn(2, 7, 6)

    def of_the_first(x: Tensor) -> Tensor:
        return mlp(x) if x.shape[-2] == 5 else x[..., :5] * mlp.down_proj.bias

    found = torch.autograd.grad(tiled(of_the_first, x, 3, mlp.parameters()).sum(), list(mlp.parameters()))
    pieces = [of_the_first(rows) for rows in x.view(14, 6).split(5)]
    close(found, torch.autograd.grad(torch.cat(pieces).sum(), list(mlp.parameters())))


def test_a_layer_that_is_used_twice_has_one_gradient(mlp):
    """Whoever waits for gradients, as ZeRO does, is told once of each backward."""
    x, fused = torch.randn(2, 7, 6), tile(mlp, 3)
    told: list[Tensor] = []
    for p in fused.parameters():
        p.register_post_accumulate_grad_hook(lambda p: told.append(p.grad.clone()))
    (fused(x).sum() + fused(2 * x).sum()).backward()
    (mlp(x).sum() + mlp(2 * x).sum()).backward()
    assert len(told) == len(list(fused.parameters()))
    close([p.grad for p in fused.parameters()], [p.grad for p in mlp.parameters()])
    assert all(any(torch.equal(p.grad, seen) for seen in told) for p in fused.parameters())


def test_a_second_backward_is_another_one(mlp):
    x, fused = torch.randn(2, 7, 6, requires_grad=True), tile(mlp, 3)
    y = fused(x).sum()
    y.backward(retain_graph=True)
    once = [p.grad.clone() for p in fused.parameters()]
    y.backward()
    close([p.grad for p in fused.parameters()], [2 * g for g in once])


def test_weights_that_are_computed_at_each_call_are_computed_once(mlp):
    """spectral_norm goes one step on with each; in tiles it would go many, and others in backward."""
    torch.nn.utils.parametrizations.spectral_norm(mlp.down_proj)
    x = torch.randn(2, 7, 6, requires_grad=True)
    fused = tile(mlp, 3)
    close(run(fused, x, micro_batches=2), run(mlp, x, micro_batches=2))
    close(list(fused.buffers()), list(mlp.buffers()))
    assert fused.rows == mlp.rows == [7, 7]


def test_a_tile_has_so_many_tokens_at_least(mlp):
    cut = copy.deepcopy(mlp)
    swap(cut, TiledMLP, fused_tiles=Tiles(4, least_tokens=5))
    tiles = {1: 1, 9: 1, 10: 2, 19: 3, 21: 4, 90: 4, 0: 1}
    for tokens, n in tiles.items():
        x = torch.randn(1, tokens, 6, requires_grad=True)
        cut.rows.clear()
        found, wanted = run(cut, x), run(mlp, x)
        close(found, wanted)
        # whole, it is what it is without this: one run, to the last bit
        assert len(cut.rows) == (1 if n == 1 else 2 * n)
        assert n > 1 or all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert str(cut.fused_tiles) == "at most 4 tiles of at least 5 tokens" and str(Tiles(4)) == "4 tiles"
