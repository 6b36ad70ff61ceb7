"""A slab of a head's weight as the softmax pass sees it, and the room of its logits.

Sizes: V vocabulary, n rows of a slab.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ds_fused.ops._loss import LossOptions
from ds_fused.ops._tiles import Tiling, tile_elements
from ds_fused.ops.slabs import WeightSlabs, columns_of


def room_of(x: Tensor, tiles: Tiling) -> Tensor:
    return x.new_empty(tile_elements(tiles.tokens, tiles.rows))


def _of_slab(whole: Tensor, ids: Tensor | int, n: int) -> Tensor:
    """The entries of a [V] vector that belong to a slab; a view where the ids just count up."""
    return whole[ids : ids + n] if isinstance(ids, int) else whole[ids]


class Slab:
    """A slab as the softmax pass sees it: where its columns are in the vocabulary, and each token's label."""

    def __init__(
        self,
        slabs: WeightSlabs,
        k: int,
        rows: Tensor,  # as they were gathered
        x: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        options: LossOptions,
        class_weight: Tensor | None,
    ):
        self.ids = slabs.places(k)[1]
        n_vocab = slabs.shape[0]
        self.rows = rows.to(x.dtype)  # under autocast the weight has its own
        self.bias = None if bias is None else _of_slab(bias, self.ids, rows.shape[0]).to(x.dtype)
        self.class_weight = None if class_weight is None else _of_slab(class_weight, self.ids, rows.shape[0])
        self.labels, self.options = labels, options
        self.place = {"n_vocab": n_vocab, "first_id": self.ids if isinstance(self.ids, int) else 0}
        if not isinstance(self.ids, int):
            # labels become columns once here, so that the kernels never look up an id: -1 elsewhere, -2 ignored
            here = columns_of(labels.long(), self.ids, rows.shape[0], n_vocab)
            self.labels = torch.where(labels == options.ignore_index, -2, here)
            self.options = replace(options, ignore_index=-2)
