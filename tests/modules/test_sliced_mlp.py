"""The backward by slices is the layer's: all gradients against fp64, what is held, and when tiles run instead."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.layers import sliced_mlp
from ds_fused.modules.layers.mlp import Gate
from ds_fused.modules.layers.sliced_mlp import slice_width
from ds_fused.modules.layers.tiled_mlp import TiledGatedMLP, TiledPackedMLP, Tiles
from ds_fused.modules.swap import swap
from ds_fused.ops.mlp.glu import glu_reference
from tests.ops.allocations import Peak

D, INNER, TILES = 6, 22, 3
GPT_OSS = {"alpha": 1.702, "limit": 1.0, "offset": 1.0}


class Gated(nn.Module):
    def __init__(self, bias: bool = True, hidden: int = D, inner: int = INNER, **gate: object) -> None:
        super().__init__()
        self.gate = gate
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=bias), nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden - 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(glu_reference(self.gate_proj(x), self.up_proj(x), **self.gate))

    def in_tiles(self, tiles: int = TILES) -> nn.Module:
        made = copy.deepcopy(self)
        children = ("gate_proj", "up_proj", "down_proj")
        swap(made, TiledGatedMLP, fused_tiles=Tiles(tiles), fused_gate=Gate(**self.gate), fused_children=children)
        return made


class Packed(nn.Module):
    def __init__(self, bias: bool = True, hidden: int = D, inner: int = INNER, **gate: object) -> None:
        super().__init__()
        self.gate = gate
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(glu_reference(self.gate_up_proj(x), None, **self.gate))

    def in_tiles(self, tiles: int = TILES) -> nn.Module:
        made, children = copy.deepcopy(self), ("gate_up_proj", "down_proj")
        swap(made, TiledPackedMLP, fused_tiles=Tiles(tiles), fused_gate=Gate(**self.gate), fused_children=children)
        return made


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def slices(monkeypatch) -> list[tuple[int, int]]:
    """Filled with what ran: three slices of 8 columns, of which the last one is short."""
    ran: list[tuple[int, int]] = []
    stock = sliced_mlp._one_slice

    def one_slice(form, heads, down, cols, *tensors) -> None:
        ran.append((cols.start, cols.stop))
        stock(form, heads, down, cols, *tensors)

    monkeypatch.setattr(sliced_mlp, "_one_slice", one_slice)
    monkeypatch.setattr(sliced_mlp, "slice_width", lambda *sizes: 8)
    return ran


ALL = [(0, 8), (8, 16), (16, 22)]


def run(module: nn.Module, x: Tensor, backwards: int = 1) -> list[Tensor | None]:
    """The output, and the gradients of x and of all parameters."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    module.zero_grad()
    for i in range(backwards):
        y = module((1 + i) * x)
        # the same numbers in every dtype
        dy = torch.linspace(-1, 2, y.numel(), device=y.device).bfloat16().view_as(y).to(y.dtype)
        y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def as_accurate(fused: nn.Module, stock: nn.Module, x: Tensor, backwards: int = 1) -> None:
    """Twice PyTorch's own error and four ulps, of every result."""
    wide = copy.deepcopy(stock).double()
    exact = run(wide, x.double().detach().requires_grad_(x.requires_grad), backwards)
    names = ["y", "dx", *(name for name, _ in stock.named_parameters())]
    results = zip(names, run(fused, x, backwards), run(stock, x, backwards), exact, strict=True)
    for name, ours, torchs, truth in results:
        assert (ours is None) == (torchs is None), name
        if ours is not None and ours.numel():
            assert ours.dtype == torchs.dtype and ours.shape == torchs.shape, name
            allowed = 2 * (torchs - truth).abs().max() + 4 * torch.finfo(ours.dtype).eps * truth.abs()
            assert ((ours - truth).abs() <= allowed).all(), name


MLPS = {
    "llama": lambda: Gated(bias=False),
    "biases": Gated,
    "gelu": lambda: Gated(act="gelu_tanh"),
    "clamped": lambda: Gated(**GPT_OSS),
    "halves": Packed,
    "halves without biases": lambda: Packed(bias=False, act="gelu"),
    "interleaved": lambda: Packed(interleaved=True, **GPT_OSS),
}


@pytest.mark.parametrize("name", MLPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backwards", [1, 2])
def test_gradients_are_the_layers(slices, name, dtype, backwards):
    mlp = MLPS[name]().to(dtype)
    x = torch.randn(2, 7, D).to(dtype).requires_grad_()
    as_accurate(mlp.in_tiles(), mlp, x, backwards)
    assert slices == backwards * ALL


@pytest.mark.parametrize("shape", [(1, D), (0, D), (2, 0, D), (2, 3, 2, D)], ids=str)
def test_shapes(slices, shape):
    mlp = Gated()
    as_accurate(mlp.in_tiles(), mlp, torch.randn(shape, requires_grad=True))
    assert slices == ALL


def test_rows_that_do_not_lie_side_by_side(slices):
    mlp = Gated(bias=False)
    fused = mlp.in_tiles()
    x = torch.randn(7, 2, 2 * D)[..., ::2].transpose(0, 1).requires_grad_()
    for module in (fused, mlp):
        # of the gradient of a sum all elements are one
        module(x).sum().backward()
        module(x).transpose(0, 1)[:, :, 1:].sum().backward()
    for p, q in zip(fused.parameters(), mlp.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert slices == 2 * ALL


@pytest.mark.parametrize("frozen", ["x", "gate_proj.weight", "up_proj", "down_proj", "bias", "gate_proj up_proj x"])
def test_what_is_frozen_gets_no_gradient(slices, frozen):
    mlp = Gated()
    for name, p in mlp.named_parameters():
        p.requires_grad_(not any(word in name for word in frozen.split() if word != "x"))
    x = torch.randn(2, 7, D, requires_grad="x" not in frozen.split())
    as_accurate(mlp.in_tiles(), mlp, x)
    assert slices == ALL


def test_one_weight_in_two_places(slices):
    mlp = Gated(bias=False)
    mlp.up_proj.weight = mlp.gate_proj.weight
    as_accurate(mlp.in_tiles(), mlp, torch.randn(2, 7, D, requires_grad=True))
    assert slices == ALL


def test_every_parameter_is_told_once_a_backward(slices):
    mlp = Gated()
    fused, seen = mlp.in_tiles(), []
    for name, p in fused.named_parameters():
        p.register_hook(lambda gradient, name=name: seen.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    run(fused, torch.randn(2, 7, D, requires_grad=True))
    assert sorted(seen) == sorted(2 * [name for name, _ in fused.named_parameters()])


def test_what_is_held_meanwhile(slices, monkeypatch):
    """Gradients, dx, and of one slice three activations or two and the weights behind gate and up; nothing twice."""
    # its kernel makes nothing
    monkeypatch.setattr(sliced_mlp, "glu_again", lambda dh, gate_up, *form: None)
    mlp = Gated(bias=False)
    fused, tokens = mlp.in_tiles(), 14
    x, dy = torch.randn(tokens, D, requires_grad=True), torch.randn(tokens, D - 1)
    y, handed = fused(x), {}
    for p in fused.parameters():
        p.register_hook(lambda gradient, p=p: handed.update({p: gradient.data_ptr()}))
    with Peak(x, dy, *fused.parameters()) as peak:
        y.backward(dy)
    made = sum(p.numel() for p in mlp.parameters()) + x.numel() + max(3 * tokens * 8, 2 * tokens * 8 + 2 * 8 * D)
    assert peak.bytes == 4 * made
    # nobody copied what it was handed
    assert handed == {p: p.grad.data_ptr() for p in fused.parameters()}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Gated, Packed])
def test_on_a_gpu(dtype, kind):
    """More slices than one, their gradients and their memory."""
    hidden, inner, tokens, tiles = 1024, 3584, 4096, 8
    mlp = kind(hidden=hidden, inner=inner, bias=False).cuda().to(dtype)
    fused = mlp.in_tiles(tiles)
    x = torch.randn(1, tokens, hidden, device="cuda", dtype=dtype, requires_grad=True)
    width = slice_width(tokens, hidden, inner, tiles)
    assert width < inner
    as_accurate(fused, mlp, x)
    fused.zero_grad()
    y = fused(x)
    dy = torch.randn_like(y)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y.backward(dy)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    weights = 2 * sum(p.numel() for p in mlp.parameters())
    # dx in fp32 and a slice, or beside dx in 16 bits
    held = 4 * tokens * hidden + max(2 * 3 * tokens * width, 2 * tokens * hidden)
    assert extra <= weights + held + 2**20


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_inside_a_checkpoint(slices, use_reentrant):
    mlp, x = Gated(), torch.randn(2, 7, D, requires_grad=True)
    fused = mlp.in_tiles()
    checkpoint(fused, x, use_reentrant=use_reentrant).sum().backward()
    got, x.grad = x.grad, None
    mlp(x).sum().backward()
    torch.testing.assert_close(got, x.grad)
    for p, q in zip(fused.parameters(), mlp.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert slices == ALL


def test_a_gradient_is_rounded_once(slices):
    """Slices of equal parts of dx, of which the last ones would be lost in a sum of 16 bits."""
    mlp = Gated(bias=False, inner=8 * 512).bfloat16()
    with torch.no_grad():
        for p in mlp.parameters():
            p.copy_(p.abs().mean())
    as_accurate(mlp.in_tiles(), mlp, torch.ones(1, 3, D).bfloat16().requires_grad_())
    assert len(slices) == 512


def hooked(mlp: Gated) -> None:
    mlp.up_proj.register_forward_hook(lambda module, args, y: None)


def hooked_backward(mlp: Gated) -> None:
    mlp.down_proj.register_full_backward_hook(lambda module, dx, dy: None)


def patched(mlp: Gated) -> None:
    mlp.gate_proj.forward = mlp.gate_proj.forward


def adapted(mlp: Gated) -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    mlp.down_proj.__class__ = Adapter


def parametrized(mlp: Gated) -> None:
    nn.utils.parametrizations.weight_norm(mlp.gate_proj)


def frozen(mlp: Gated) -> None:
    mlp.requires_grad_(False)


@pytest.mark.parametrize("how", [hooked, hooked_backward, patched, adapted, parametrized, frozen])
def test_layers_that_are_more_than_their_weights_run_in_tiles(slices, how):
    mlp, x = Gated(), torch.randn(2, 7, D, requires_grad=True)
    fused = mlp.in_tiles()
    how(mlp), how(fused)
    for ours, stock in zip(run(fused, x), run(mlp, x), strict=True):
        torch.testing.assert_close(ours, stock)
    assert not slices


def test_under_autocast_it_runs_in_tiles(slices):
    fused, x = Gated().in_tiles(), torch.randn(2, 7, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(x)
    y.sum().backward()
    assert not slices and x.grad is not None


def test_the_smaller_sums_decide(slices):
    """dx of 7 tokens has 42 elements; of weights there are 374, of which a frozen one has no sum."""
    mlp = Gated(bias=False)
    elements = sum(p.numel() for p in mlp.parameters())
    for tokens, by_slices in ((elements // D, True), (elements // D + 1, False)):
        slices.clear()
        run(mlp.in_tiles(), torch.randn(1, tokens, D, requires_grad=True))
        assert bool(slices) == by_slices
    mlp.down_proj.requires_grad_(False)
    slices.clear()
    run(mlp.in_tiles(), torch.randn(1, elements // D, D, requires_grad=True))
    assert not slices
    run(mlp.in_tiles(), torch.randn(1, elements // D, D))
    assert slices == ALL


def test_a_slice_is_as_wide_as_tiles_in_16_bits_take_memory():
    # Llama-3-8B: whole where there are few tokens, and narrower the longer dx is
    widths = {tokens: slice_width(tokens, 4096, 14336, 8) for tokens in (0, 128, 2048, 8192, 16384, 32768, 40960)}
    assert widths == {0: 14336, 128: 14336, 2048: 10240, 8192: 3072, 16384: 2048, 32768: 1024, 40960: 1024}
    for tokens, width in widths.items():
        for_slices = 2 * 3 * tokens * width + 2 * tokens * 4096
        assert for_slices <= 2 * (4 * tokens * 14336 // 8 + 4096 * 14336)
    assert slice_width(8192, 4096, 14336, 1024) == 1024 and slice_width(9000, 4096, 3000, 64) == 256
