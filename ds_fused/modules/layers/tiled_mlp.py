"""A layer that treats every token alone, run tile by tile: its activations exist for one tile at a time.

    y = cat([function(tile) for tile in x.chunk(tiles)])

Forward keeps x and nothing else. Backward computes a tile again, takes its gradients, and goes on to the next, so that
the peak is one tile's activations, x, y and their gradients. Costs one more forward. The idea is that of DeepSpeed's
ALST (arXiv 2506.13996), where parameters collect their gradients tile by tile; here each gets one gradient:

- what the tiles give is summed in fp32 (4 bytes a parameter while a backward lasts), and rounded once;
- autograd gets the sum, as of an untiled layer, and adds what other uses of the layer give: whoever waits for gradients
  (ZeRO's buckets, a hook) sees one for each backward, with the parameter in place (ZeRO-3 has it gathered);
- all ranks run the same number of tiles, however many tokens they have: a layer whose weights are gathered must;
- the gradient of a linear layer's weight is added to its sum by the product that makes it (``summed.py``), and where a
  tile's result is that of a last linear layer, from the second tile on it is not computed: nobody reads it, but where
  somebody has hung hooks on layers within.

A gated MLP of plain linear layers, which goes by its parameters alone, has another way back where dx has fewer elements
than those gradients: slices of its inner width, which see all tokens, so that dx is what is summed (``sliced_mlp.py``).
A slice takes no more memory than as many tiles would whose gradients were added up in 16 bits. Layers that somebody has
hooked, wrapped or sharded are called, tile by tile, and so is everything under autocast.

Under gradient checkpointing the repetition of the whole layer would compute the result a second time, and backward the
tiles a third. Where the result is the last thing that the repetition comes to, ``recompute`` (``kept.py``) has it left
out: the tiles run twice, and hooks of modules within the function as often.

Under ZeRO-3 a tiled layer should be a leaf module (``deepspeed.utils.set_z3_leaf_modules``): its weights are then
gathered once each way, as an untiled layer's, and there may be slices. Otherwise each tile asks for them, and DeepSpeed
keeps them in between only when it has seen the order of layers; the sum reaches a parameter inside the last tile's own
backward then, the only place where it is there, and a layer that is used twice before a backward is not supported.

Random numbers and autocast are in a recomputed tile what they were before.

Tiles save memory where they are long: their sums take 4 bytes a parameter, however few tokens there are. So `Tiles` may
say for how many tokens one is worth while; a layer over fewer than two such runs as without this. That may be so on one
rank and not on another, where the layer is a leaf module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.layers.linear import own_weight
from ds_fused.modules.layers.mlp import GatedMLP, PackedMLP, is_patched
from ds_fused.modules.layers.sliced_mlp import Projections, sliced_gradients
from ds_fused.modules.layers.summed import SummedLinears
from ds_fused.modules.memory.kept import Empty, postponable
from ds_fused.modules.swap import hooks_of_all, is_observed
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._say import say_once

Layer = Callable[[Tensor], Tensor]


class Tiles(NamedTuple):
    """How a layer is cut."""

    most: int
    least_tokens: int = 1  # there are so many for each of them; of 1, there are always `most`

    def __str__(self) -> str:
        if self.least_tokens == 1:
            return f"{self.most} tiles"
        return f"at most {self.most} tiles of at least {self.least_tokens} tokens"

    def of(self, tokens: int) -> int:
        """For so many tokens of this rank."""
        return max(1, min(self.most, tokens // self.least_tokens)) if self.least_tokens > 1 else self.most


def check_tiles(who: str, tiles: object) -> None:
    if type(tiles) is not int or tiles < 1:
        raise ValueError(f"{who}: tiles is {tiles!r}; it must be a whole number, at least 1")


def tiled(
    function: Layer,
    x: Tensor,
    tiles: int,
    parameters: Iterable[nn.Parameter],
    projections: Projections | None = None,
) -> Tensor:
    """``function(x)`` for x [..., T, H], in ``tiles`` calls with about as many rows [..., 1, n, H] each.

    ``function`` must treat every row alone and return [..., 1, n, D]. ``parameters`` are those that it uses. Those that
    ZeRO-3 shards, and not as a leaf module's, get their gradients by ``.backward()``, as under reentrant checkpointing,
    not by ``torch.autograd.grad``. A tensor hook on a parameter sees the parts of a gradient too. In a compiled graph
    it is a checkpoint around each tile. ``projections``: the layers of which ``function`` is a gated MLP, if it is one.
    """
    check_tiles("tiled", tiles)
    if x.ndim < 2:
        raise ValueError(f"tiled: x must be [..., tokens, width]; got {tuple(x.shape)}")
    if torch.compiler.is_compiling():
        pieces = [
            checkpoint(function, tile, use_reentrant=False) if torch.is_grad_enabled() else function(tile)
            for tile in _tiles(x, tiles)
        ]
        return torch.cat(pieces, -2).reshape(*x.shape[:-1], -1)
    trained = [p for p in parameters if p.requires_grad]
    if not torch.is_grad_enabled() or not (trained or x.requires_grad):
        return _forward(function, x, tiles)
    stay = all(_stays(p) for p in trained)
    # of parameters that don't, autograd knows nothing: something has to lead back even if x needs no gradient
    known = trained if stay else [x.new_empty(0).requires_grad_()]

    def make(empty: Empty | None) -> Tensor:
        return TiledFunction.apply(x, function, tiles, trained, stay, projections, empty, *known)

    def value() -> Tensor:
        with _Surroundings(x).autocast():
            return _forward(function, x, tiles)

    return postponable(make, value)


def _is_watched(function: Layer) -> bool:
    """Whether hooks of others see what the layers within return."""
    layer = getattr(function, "__self__", function)
    layers = layer.modules() if isinstance(layer, nn.Module) else ()
    return bool(hooks_of_all("_forward_hooks")) or any(is_observed(each, "_forward_hooks") for each in layers)


def _stays(p: nn.Parameter) -> bool:
    """Whether it is in place from the layer's backward to its own: not where ZeRO-3 gathers it for each tile."""
    return not hasattr(p, "ds_id") or p.ds_persist or hasattr(p, "ds_z3_leaf_module")


def _tiles(x: Tensor, tiles: int) -> list[Tensor]:
    """Views of x's rows, [..., 1, n, H]; exactly that many, of which the last ones may be empty."""
    rows = x.reshape(*[1] * (x.ndim - 2), -1, x.shape[-1])
    n = rows.shape[-2]
    size = -(-n // tiles)
    return list(rows.split([max(0, min(size, n - i * size)) for i in range(tiles)], -2))


def _forward(function: Layer, x: Tensor, tiles: int) -> Tensor:
    y, end = None, 0
    for tile in _tiles(x, tiles):
        piece = function(tile)
        if piece.shape[:-1] != tile.shape[:-1]:
            raise ValueError(f"tiled: the function made {tuple(piece.shape)} of {tuple(tile.shape)}; rows must stay")
        if y is None:
            y = piece.new_empty(*x.shape[:-1], piece.shape[-1])
            rows = y.view(*tile.shape[:-2], -1, piece.shape[-1])
        start, end = end, end + tile.shape[-2]
        rows[..., start:end, :] = piece
    return y


class TiledFunction(torch.autograd.Function):
    """Keeps x; see the file's text."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        function: Layer,
        tiles: int,
        trained: list[nn.Parameter],
        stay: bool,  # they follow, and autograd gets their gradients
        projections: Projections | None,
        empty: Empty | None,  # makes the result where it is not to be computed
        *_: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.function, ctx.tiles, ctx.trained, ctx.stay = function, tiles, trained, stay
        ctx.projections, ctx.then = projections, _Surroundings(x)
        if empty is not None:
            return empty()
        with ctx.then.autocast():
            return _forward(function, x, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.stay and not torch.autograd._is_checkpoint_valid():
            raise RuntimeError(
                "tiled: parameters that ZeRO-3 gathers for each tile get their gradients by .backward() without "
                "inputs=, not by torch.autograd.grad"
            )
        (x,) = ctx.saved_tensors
        wants_dx = ctx.needs_input_grad[0]
        linears = None if ctx.projections is None or ctx.then.enabled or not ctx.stay else ctx.projections.linears()
        if linears is not None and linears.suit(x, dy, wants_dx):
            with ctx.then.autocast():
                dx, gradients = sliced_gradients(linears, x.detach(), dy, ctx.tiles, wants_dx)
            return dx, *[None] * 6, *(gradients.get(p) for p in ctx.trained)
        tiles, dys = _tiles(x.detach(), ctx.tiles), _tiles(dy, ctx.tiles)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if wants_dx else None
        dxs = _tiles(dx, ctx.tiles) if wants_dx else None
        sums: list[Tensor | None] = [None] * len(ctx.trained)
        summed = SummedLinears(ctx.trained, sums, all_read=_is_watched(ctx.function))
        with ctx.then.random_numbers():
            for i, tile in enumerate(tiles):
                is_last = i == ctx.tiles - 1
                tile = tile.detach().requires_grad_(wants_dx)
                summed.adds = not is_last
                with torch.enable_grad(), ctx.then.autocast(), summed:
                    y = ctx.function(tile)
                summed.returned(y)
                if is_last and not ctx.stay:
                    _deliver(y, dys[i], ctx.trained, sums)
                    dtile = tile.grad
                else:
                    dtile = _collect(y, dys[i], tile if wants_dx else None, ctx.trained, sums, is_last)
                if wants_dx:
                    dxs[i].copy_(dtile)
        return dx, *[None] * 6, *(sums if ctx.stay else [None])


def _collect(
    y: Tensor,
    dy: Tensor,
    tile: Tensor | None,
    trained: list[nn.Parameter],
    sums: list[Tensor | None],
    is_last: bool,
) -> Tensor | None:
    """One tile's gradients: those of parameters are added to the sums, the tile's is returned.

    None for a parameter: it has none, or the product that made it has added it to its sum. The last tile's sums are
    rounded.
    """
    inputs = trained if tile is None else [tile, *trained]
    gradients = list(torch.autograd.grad(y, inputs, dy, allow_unused=True))
    dtile = None if tile is None else gradients.pop(0)
    for i in range(len(gradients)):
        # let go of where it is added: all of them are as large as the layer
        gradient, gradients[i] = gradients[i], None
        if is_last:
            sums[i] = _rounded(sums[i], gradient)
        elif gradient is None:
            continue
        elif sums[i] is None:
            # a copy: two parameters may have been handed one tensor
            wide = torch.promote_types(gradient.dtype, torch.float32)
            sums[i] = gradient.to(wide, copy=True)
        else:
            sums[i] += gradient
    return dtile


def _rounded(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        # autograd rounds it
        return total if gradient is None else gradient
    # in one pass: a sum is four bytes a parameter, and that is what adding takes its time for
    return torch.add(total, gradient, out=torch.empty_like(gradient))


def _deliver(y: Tensor, dy: Tensor, trained: list[nn.Parameter], sums: list[Tensor | None]) -> None:
    """The last tile's backward, in which every parameter's gradient becomes that of all tiles."""

    def adding(i: int) -> Callable[[Tensor], Tensor]:
        def add(gradient: Tensor) -> Tensor:
            total, sums[i] = sums[i], None
            return _rounded(total, gradient)

        return add

    handles = [p.register_hook(adding(i)) for i, p in enumerate(trained) if sums[i] is not None]
    try:
        torch.autograd.backward(y, dy)
    finally:
        for handle in handles:
            handle.remove()
    lost = [tuple(p.shape) for p, left in zip(trained, sums, strict=True) if left is not None]
    if lost:
        raise RuntimeError(f"tiled: parameters {lost} were used in some tiles and not in the last one")


class _Surroundings:
    """What was around a forward and has to be around its repetition: autocast and the states of random generators."""

    def __init__(self, x: Tensor) -> None:
        # a warm-up's tensors lie on meta, which has neither autocast nor random numbers of its own
        self.kind = "cpu" if x.is_meta else x.device.type
        self.enabled = torch.is_autocast_enabled(self.kind)
        self.dtype = torch.get_autocast_dtype(self.kind)
        self.cpu_state = torch.get_rng_state()
        self.device = None if self.kind == "cpu" else x.device
        self.device_state = None
        if self.device is not None:
            self.device_state = torch.get_device_module(self.kind).get_rng_state(self.device)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        # without its cache: a weight that was cast while no gradients were recorded would get none later
        return torch.autocast(self.kind, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

    @contextlib.contextmanager
    def random_numbers(self) -> Iterator[None]:
        devices = [] if self.device is None else [self.device]
        with torch.random.fork_rng(devices, device_type="cuda" if self.device is None else self.kind):
            torch.set_rng_state(self.cpu_state)
            if self.device is not None:
                torch.get_device_module(self.kind).set_rng_state(self.device_state, self.device)
            yield


class TiledMLP:
    """The original forward, or that of a mix-in between, tile by tile."""

    fused_tiles: Tiles

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())  # hidden_states to some, x to others
        tiles = self.fused_tiles.of(x.shape[:-1].numel())
        if tiles == 1 < self.fused_tiles.most or self._is_given_more() or self._computes_weights():
            return super().forward(*args, **named)
        # not by name: under ZeRO-3 a look-up of a parameter gathers it
        return tiled(super().forward, x, tiles, self.parameters(), self._projections())

    def _is_given_more(self) -> bool:
        """Whether hooks hand its layers what belongs to all tokens, as PEFT does for aLoRA and mixed adapters."""
        if torch.compiler.is_compiling() or not any(m._forward_pre_hooks_with_kwargs for m in self.modules()):
            return False
        say_once("ds_fused: hooks hand the layers of an MLP more than its tokens, so that it is not cut into tiles")
        return True

    def _computes_weights(self) -> bool:
        """Whether a weight is made for each call of its layer, and may be another for each tile, as spectral_norm's."""
        if not any(isinstance(m, nn.Linear) and own_weight(m) is None for m in self.modules()):
            return False
        if not torch.compiler.is_compiling():
            say_once(
                "ds_fused: weights of an MLP are computed at each call (parametrized or pruned), so that it is not cut "
                "into tiles"
            )
        return True

    def _projections(self) -> Projections | None:
        """Where the forward is known to be theirs."""
        return None


class TiledGatedMLP(TiledMLP, GatedMLP):
    """``GatedMLP``, tile by tile."""

    def _projections(self) -> Projections | None:
        if is_patched(self):
            return None
        return Projections(self.fused_gate, *(getattr(self, name) for name in self.fused_children))


class TiledPackedMLP(TiledMLP, PackedMLP):
    """``PackedMLP``, tile by tile."""

    def _projections(self) -> Projections | None:
        if is_patched(self):
            return None
        gate_up, down = (getattr(self, name) for name in self.fused_children)
        return Projections(self.fused_gate, gate_up, None, down)


# mix-in -> the same, tile by tile
TILED_MIXINS: Mapping[type, type] = {GatedMLP: TiledGatedMLP, PackedMLP: TiledPackedMLP}
