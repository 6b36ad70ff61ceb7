"""``F.embedding(ids, weight)`` over ranks that each hold some rows of the weight: the tokens travel, the weight stays.

    ids [W, M]         of all ranks                                        (all-gather)
    rows [W, T, H]   = this rank's for a block of all ranks' tokens, and zeros where another rank has the row
    y [T, H]         = their sum over ranks, exact: one summand has the row  (reduce-scatter)

    dy [W * M, h]      of all ranks, a block of columns                    (all-gather)
    dw[:, h]         = for each of this rank's rows the sum over its tokens, complete, so it is rounded once

A rank takes in (W - 1)MH elements each way; a weight in slabs sends (W - 1)VH / W. So this is the shorter way where
all tokens together are fewer than the words.

Saved for backward: the ids of all ranks. Plain PyTorch: the work is all memory and communication.

Sizes: M tokens of a rank (the most of any), W ranks, T tokens of a rank in a block, V vocabulary, H columns, h columns
in a block, n rows of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._ids import flat_ids
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._tiles import side, wide
from ds_fused.ops.vocab.vocab_shard import Flight, Homeward, VocabShard, padded

NOBODYS = -1


class StationaryEmbeddingFunction(torch.autograd.Function):
    """ids [N] and an empty anchor, which requires grad where the weight does, to rows [N, H]."""

    @staticmethod
    def forward(
        ctx, ids: Tensor, anchor: Tensor, shard: VocabShard, padding_idx: int | None, most: int, block_bytes: int
    ) -> Tensor:
        everyones = shard.gather(padded(ids, most, NOBODYS)).land()
        row, pieces = everyones - shard.first_id, shard.rows()
        y = torch.empty(ids.shape[0], shard.shape[1], dtype=shard.dtype, device=ids.device)
        leaving: Homeward | None = None
        for place in _blocks(most, shard.ranks * shard.shape[1] * shard.dtype.itemsize, block_bytes):
            sent = Homeward(shard.reduce_scatter(_rows_of(row[:, place], pieces)), y[place])
            if leaving is not None:
                leaving.land()
            leaving = sent
        if leaving is not None:
            leaving.land()
        ctx.save_for_backward(everyones)
        ctx.shard, ctx.padding_idx, ctx.block_bytes = shard, padding_idx, block_bytes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        shard, most, n_rows = ctx.shard, ids.shape[1], ctx.shard.n_rows
        row = (ids - shard.first_id).view(-1)
        nobodys = (row < 0) | (row >= n_rows)
        if ctx.padding_idx is not None:
            nobodys |= ids.view(-1) == ctx.padding_idx
        # tokens of other ranks go to one row more, which PyTorch leaves out
        row = row.masked_fill(nobodys, n_rows)
        dw = shard.gradient(_sum_dtype(shard.dtype))
        # of dy of all ranks, or of dw of a rank, by a number that is the same on all
        column_bytes = max(shard.ranks * most, -(-shard.shape[0] // shard.ranks)) * wide(dy).itemsize
        blocks = _blocks(shard.shape[1], column_bytes, block_bytes=ctx.block_bytes)
        coming = _start(shard, dy, blocks[0], most)
        for i, columns in enumerate(blocks):
            # wide: PyTorch rounds such a sum to its dtype on the way, on a CPU at each addition
            part = coming.land().flatten(0, 1).to(wide(dy))
            if i + 1 < len(blocks):
                coming = _start(shard, dy, blocks[i + 1], most)
            dw.rows[:, columns] = torch.ops.aten.embedding_dense_backward(part, row, n_rows + 1, n_rows, False)[:-1]
        dw.give(1.0)
        return None, None, None, None, None, None


def _blocks(size: int, each: int, block_bytes: int) -> list[slice]:
    """[0, size) in even parts of about so many bytes, where one element of it takes ``each``."""
    step = side(max(size, 1), block_bytes // max(each, 1), least=1)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


def _rows_of(row: Tensor, pieces: tuple[Tensor, ...]) -> Tensor:
    """[W, T] -> [W, T, H]: those of a rank's rows, which come in pieces; zeros for what is none of them."""
    first, hidden = 0, pieces[0].shape[1]
    out = pieces[0].new_zeros(*row.shape, hidden)
    for rows in pieces:
        place = row - first
        here = ((place >= 0) & (place < rows.shape[0]))[..., None]
        # to count the tokens that are here would make the host wait
        torch.where(here, rows[place.clamp(0, rows.shape[0] - 1)], out, out=out)
        first += rows.shape[0]
    return out


def _start(shard: VocabShard, dy: Tensor, columns: slice, most: int) -> Flight:
    return shard.gather(padded(dy[:, columns], most, 0.0))


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    # a mean over ranks may fit into fp16 where the sum doesn't
    return torch.float32 if dtype == torch.float16 else dtype


def stationary_embedding(
    ids: Tensor,
    shard: VocabShard,
    padding_idx: int | None = None,
    *,
    block_bytes: int = 128 * 2**20,
    most: int | None = None,
) -> Tensor:
    """``F.embedding(ids, weight, padding_idx)``: ids [...] (int64, int32) in [0, V) -> [..., H] in the weight's dtype.

    An id outside the vocabulary is an error: here on a CPU, on the device else. ``block_bytes``: about what travels at
    a time. ``most``: the largest number of ids of any rank, where it is known. The collectives depend on it, on
    V, H, W and ``block_bytes`` alone.
    """
    n_vocab, hidden = shard.shape
    flat = flat_ids("stationary_embedding", ids, n_vocab)
    most = shard.most(flat.shape[0]) if most is None else most
    anchor = torch.empty(0, dtype=shard.dtype, device=ids.device, requires_grad=shard.requires_grad)
    y = StationaryEmbeddingFunction.apply(flat, anchor, shard, padding_idx, most, block_bytes)
    return y.view(*ids.shape, hidden)
