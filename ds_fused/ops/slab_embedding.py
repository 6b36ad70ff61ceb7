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

from ds_fused.ops._ids import flat_ids
from ds_fused.ops._once import once_differentiable
from ds_fused.ops.slabs import WeightSlabs, columns_of


class SlabEmbeddingFunction(torch.autograd.Function):
    """ids [N] and an empty anchor, which requires grad where the weight does, to rows [N, H]."""

    @staticmethod
    def forward(ctx, ids: Tensor, anchor: Tensor, slabs: WeightSlabs, padding_idx: int | None) -> Tensor:
        y = torch.zeros(ids.shape[0], slabs.shape[1], dtype=slabs.dtype, device=ids.device)
        slabs.prefetch(0)
        for k in range(len(slabs)):
            rows, (_, where) = slabs.gather(k), slabs.places(k)
            if k + 1 < len(slabs):
                slabs.prefetch(k + 1)
            column = columns_of(ids, where, rows.shape[0], slabs.shape[0])
            here = (column >= 0)[:, None]
            # every token picks some row: to count those that are here would make the host wait
            y = torch.where(here, rows[column.clamp_min(0)], y)
        ctx.save_for_backward(ids)
        ctx.slabs, ctx.padding_idx = slabs, padding_idx
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, None, None, None]:
        (ids,) = ctx.saved_tensors
        slabs = ctx.slabs
        for k in reversed(range(len(slabs))):
            rows, where = slabs.places(k)
            column = columns_of(ids, where, rows, slabs.shape[0])
            if ctx.padding_idx is not None:
                column = column.masked_fill(ids == ctx.padding_idx, -1)
            # tokens of other slabs go to one row more, which PyTorch leaves out
            column = torch.where(column < 0, rows, column)
            dw = slabs.gradient(k)
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
