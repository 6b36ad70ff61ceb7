"""``F.embedding(ids, weight)`` of a weight that comes in slabs: neither the table nor its gradient is ever whole.

Per slab the forward picks the rows that these tokens ask for; the backward sums the gradients of a row's tokens, in the
order that PyTorch's own embedding has, into a slab that goes back to its owner.

Saved for backward: the ids. Traffic beside the slabs: forward reads and writes y once a slab, backward reads dy once a
slab. Plain PyTorch: the work is all memory and communication, and there is nothing to fuse.

Sizes: N tokens (every leading dimension of ids, flattened), V vocabulary rows, H columns, n rows of a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._ids import flat_ids
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.losses._loss import columns
from ds_fused.ops.vocab.slabs import WeightSlabs


class SlabEmbeddingFunction(torch.autograd.Function):
    """ids [N] and an empty anchor, which requires grad where the weight does, to rows [N, H]."""

    @staticmethod
    def forward(ctx, ids: Tensor, anchor: Tensor, slabs: WeightSlabs, padding_idx: int | None) -> Tensor:
        y = torch.zeros(ids.shape[0], slabs.shape[1], dtype=slabs.dtype, device=ids.device)
        slabs.prefetch(0)
        places = ids if slabs.places is None else slabs.places[ids]
        for k in range(len(slabs)):
            rows = slabs.gather(k)
            if k + 1 < len(slabs):
                slabs.prefetch(k + 1)
            # every token picks some row: to count those that are here would make the host wait
            column, here = columns(places, slabs.span(k).start, rows.shape[0])
            y = torch.where(here[:, None], rows[column], y)
        # as places a padding token has none
        ctx.save_for_backward(places if padding_idx is None else places.masked_fill(ids == padding_idx, -1))
        ctx.slabs = slabs
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, None, None, None]:
        (places,) = ctx.saved_tensors
        slabs = ctx.slabs
        for k in reversed(range(len(slabs))):
            dw = slabs.gradient(k)
            rows = dw.shape[0]
            column, here = columns(places, slabs.span(k).start, rows)
            # tokens of other slabs go to one row more, which PyTorch leaves out
            column = torch.where(here, column, rows)
            whole = torch.ops.aten.embedding_dense_backward(dy, column, rows + 1, rows, False)[:rows]
            torch.mul(whole, slabs.share, out=dw)
            slabs.scatter(k, dw)
        slabs.finish()
        return None, None, None, None


def slab_embedding(ids: Tensor, slabs: WeightSlabs, padding_idx: int | None = None) -> Tensor:
    """``F.embedding(ids, weight, padding_idx)``: ids [...] (int64, int32) in [0, V) -> [..., H] in the weight's dtype.

    An id outside the vocabulary is an error: here on a CPU, on the device else.
    """
    n_vocab, hidden = slabs.shape
    flat = flat_ids("slab_embedding", ids, n_vocab)
    anchor = torch.empty(0, dtype=slabs.dtype, device=ids.device, requires_grad=slabs.requires_grad)
    y = SlabEmbeddingFunction.apply(flat, anchor, slabs, padding_idx)
    return y.view(*ids.shape, hidden)
