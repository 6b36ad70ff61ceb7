"""The backward of a gated MLP that kept nothing but x, computed again slice by slice of its inner width.

    for s in slices of the columns between up and down:
        gate, up, dh = x @ gate_weight[s].T, x @ up_weight[s].T, dy @ down_weight[:, s]
        h, dgate, dup = act(gate) * up and its gradients                            # one pass, over what it reads
        ddown_weight[:, s], dgate_weight[s], dup_weight[s] = dy.T @ h, dgate.T @ x, dup.T @ x
        dx += dgate @ gate_weight[s] + dup @ up_weight[s]                           # one product, in fp32

A slice sees all tokens: its part of the weights' gradients is whole, and is written once, where it belongs. What is
summed is dx, by the product that makes it. Tiles of tokens (tiled_mlp.py) have it the other way round: dx is whole, and
the weights' gradients are summed over tiles. Whichever of the two has fewer elements is the one to sum.

Bytes in 16 bits, beside x, dy and the gradients: 4 M D of dx in fp32, at the end 6 M D, and 6 M n of a slice of n
columns. Traffic beside the products' own: 6 M I of the gate, 8 M D a slice of dx (where there are several), and a copy
of gate's and up's weights.

Sizes: M tokens, D hidden (of dy, E), I columns between up and down, of which a slice has n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_fused.modules.layers.linear import Linear, linear_of
from ds_fused.modules.layers.mlp import Gate
from ds_fused.ops.common._tiles import SIDE_STEP, product, wide
from ds_fused.ops.common._triton import lie_apart, rows_of
from ds_fused.ops.mlp._gates import GLUForm
from ds_fused.ops.mlp.glu import glu_again

# columns. Not measured yet. A weight's gradient of so many rows is 128 tiles of 128 x 256 with 4096 hidden, one wave on
# the 132 multiprocessors of an H100 (of 1792 rows it would be 1.7), and 8192 tokens of 2048 columns of gate are 3.9
SLICE_STEP = 1024


class Projections(NamedTuple):
    """The layers of a gated MLP, which is nothing else than ``down(act(gate(x)) * up(x))``; see ``Gate``."""

    form: Gate
    gate: nn.Module
    up: nn.Module | None  # None: gate makes both
    down: nn.Module

    def linears(self) -> Linears | None:
        """Their parameters, where these are in place and to multiply by them is all that the layers do."""
        gate, down = linear_of(self.gate), linear_of(self.down)
        up = None if self.up is None else linear_of(self.up)
        if gate is None or down is None or (up is None) != (self.up is None):
            return None
        return Linears(self.form, gate, up, down)


class Linears(NamedTuple):
    """The same by their parameters."""

    form: Gate
    gate: Linear
    up: Linear | None
    down: Linear

    def parameters(self) -> list[nn.Parameter]:
        return [p for linear in (self.gate, self.up, self.down) if linear for p in linear if p is not None]

    def suit(self, x: Tensor, dy: Tensor, wants_dx: bool) -> bool:
        """Whether slices take less than tiles of tokens: the sums of dx less than those of all gradients of weights."""
        if any(p.dtype != x.dtype or p.device != x.device for p in (dy, *self.parameters())):
            return False
        return wants_dx * x.numel() < sum(p.numel() for p in self.parameters() if p.requires_grad)


def slice_width(tokens: int, hidden: int, inner: int, tiles: int) -> int:
    """The most columns that keep to the memory of so many tiles of tokens whose gradients are added up in 16 bits.

    These take, of a tile, gate, up, h and dh, the gradient of one weight before it is added, and dx in 16 bits. Slices
    take three such activations, and dx in fp32.
    """
    room = 2 * (4 * tokens * inner // tiles + hidden * inner - tokens * hidden)
    fits = max(SIDE_STEP, room // (2 * 3 * max(tokens, 1)))
    step = SLICE_STEP if fits >= SLICE_STEP else SIDE_STEP
    return min(inner, fits // step * step)


def sliced_gradients(
    linears: Linears, x: Tensor, dy: Tensor, tiles: int, wants_dx: bool
) -> tuple[Tensor | None, dict[nn.Parameter, Tensor]]:
    """x [..., D], dy [..., E] -> dx, and the gradient of each parameter that is trained.

    In the memory of so many tiles of tokens.
    """
    rows, dy = _apart(x), _apart(dy)
    gate, up, down = (None if linear is None else _Layer(linear) for linear in linears[1:])
    inner = down.weight.shape[1]
    width = slice_width(rows.shape[0], rows.shape[1], inner, tiles)
    dx = None
    if wants_dx:
        dx = torch.empty(rows.shape, dtype=x.dtype if width == inner else wide(x), device=x.device)
    for start in range(0, inner, width):
        cols = slice(start, min(start + width, inner))
        _one_slice(linears.form, _layer_rows(linears.form, gate, up, inner, cols), down, cols, rows, dy, dx)
    if down.dbias is not None:
        torch.sum(dy, 0, out=down.dbias)
    gradients: dict[nn.Parameter, Tensor] = {}
    for p, gradient in (pair for layer in (gate, up, down) if layer is not None for pair in layer.gradients()):
        # two layers may share a weight
        gradients[p] = gradients[p].add_(gradient) if p in gradients else gradient
    return None if dx is None else dx.to(x.dtype).view(x.shape), gradients


def _apart(x: Tensor) -> Tensor:
    """[M, D]. An expanded tensor is copied here, once, and not by each product."""
    rows = rows_of(x)
    return rows if lie_apart(rows) else rows.contiguous()


class _Layer:
    """A linear layer, and the gradients that are made of it part by part. None: not wanted."""

    def __init__(self, linear: Linear) -> None:
        self.weight, self.bias = linear
        self.dweight, self.dbias = (
            torch.empty_like(p, memory_format=torch.contiguous_format) if p is not None and p.requires_grad else None
            for p in linear
        )

    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        pairs = ((self.weight, self.dweight), (self.bias, self.dbias))
        return [(p, gradient) for p, gradient in pairs if gradient is not None]


# a layer, and of its rows those that make the columns of a slice
LayerRows = tuple[_Layer, slice]


def _layer_rows(form: Gate, gate: _Layer, up: _Layer | None, inner: int, cols: slice) -> list[LayerRows]:
    """Of gate and of up, in the order in which glu reads them."""
    if up is not None:
        return [(gate, cols), (up, cols)]
    if form.interleaved:
        return [(gate, slice(2 * cols.start, 2 * cols.stop))]
    return [(gate, cols), (gate, slice(inner + cols.start, inner + cols.stop))]


def _one_slice(
    form: Gate, layer_rows: list[LayerRows], down: _Layer, cols: slice, x: Tensor, dy: Tensor, dx: Tensor | None
) -> None:
    n = cols.stop - cols.start
    gate_up = x.new_empty(x.shape[0], 2 * n)
    parts = gate_up.split([rows.stop - rows.start for _, rows in layer_rows], 1)
    for (layer, rows), part in zip(layer_rows, parts, strict=True):
        if layer.bias is None:
            product(part, x, layer.weight[rows].t())
        else:
            torch.addmm(layer.bias[rows], x, layer.weight[rows].t(), out=part)
    dh = x.new_empty(x.shape[0], n)
    product(dh, dy, down.weight[:, cols])
    glu_again(dh, gate_up, GLUForm(form.act, form.alpha, form.limit, form.offset), form.interleaved)
    h = dh
    if down.dweight is not None:
        product(down.dweight[:, cols], dy.t(), h)
    # room for the weights below
    del h, dh
    for (layer, rows), part in zip(layer_rows, parts, strict=True):
        if layer.dweight is not None:
            product(layer.dweight[rows], part.t(), x)
        if layer.dbias is not None:
            torch.sum(part, 0, out=layer.dbias[rows])
    if dx is not None:
        weights = [layer.weight[rows] for layer, rows in layer_rows]
        product(dx, gate_up, weights[0] if len(weights) == 1 else torch.cat(weights), add=cols.start > 0)
