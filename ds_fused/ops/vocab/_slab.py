"""A slab of a head's weight as the softmax pass sees it, and the room of its logits.

Sizes: V vocabulary, n rows of a slab.
"""

from __future__ import annotations

from torch import Tensor

from ds_fused.ops.common._tiles import Tiling, of_chunk, tile_elements
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab.slabs import WeightSlabs

# no place of a row
IGNORED = -100


def room_of(x: Tensor, tiles: Tiling) -> Tensor:
    return x.new_empty(tile_elements(tiles.tokens, tiles.rows))


def labels_in_order(labels: Tensor, options: LossOptions, slabs: WeightSlabs) -> tuple[Tensor, LossOptions]:
    """Labels as places, and the options that go with them."""
    if slabs.places is None:
        return labels, options
    ignored = labels == options.ignore_index
    places = slabs.places[labels.masked_fill(ignored, 0)].masked_fill_(ignored, IGNORED)
    return places, options._replace(ignore_index=IGNORED)


class Slab:
    """A slab as the softmax pass sees it. Bias and class weights are in the order of places."""

    def __init__(
        self,
        slabs: WeightSlabs,
        k: int,
        rows: Tensor,  # as they were gathered
        x: Tensor,
        bias: Tensor | None,
        class_weight: Tensor | None,
    ):
        self.span = slabs.span(k)
        self.rows = rows.to(x.dtype)  # under autocast the weight has its own
        self.bias = None if bias is None else bias[self.span].to(x.dtype)
        self.class_weight = of_chunk(class_weight, self.span)
        self.place = {"n_vocab": slabs.shape[0], "first_id": self.span.start}
