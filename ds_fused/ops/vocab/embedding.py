"""Embedding: ``y = weight[ids]``; the gradient of a row is the sum over its tokens, in one order, rounded once.

The backward sorts the ids (stable), and one program per run of equal ids adds up that run's rows of dy in fp32: no
atomics, so the same input gives the same bits, and nothing is counted on the host. A run is cut where the sorted tokens
reach a multiple of CHUNK, so that one frequent word keeps many programs busy; the parts of a run that was cut are added
up, in order, by a second small launch. Each program also writes the zeros of a few words that no token has: zeros wait
for nothing, and a run is mostly waiting.

Saved for backward: the ids. Traffic: forward one row read and one written per token; backward dy read once, dweight
written once, the sort of N ids, and per CHUNK tokens at most two fp32 rows.

Sizes: N tokens (every dimension of ids, flattened), V vocabulary rows, H columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._ids import ASSERTING, flat_ids, looks_itself
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_whole
from ds_fused.ops.common._triton import cdiv, check_dtypes, power_of_2, row_stride, rows_of, runs_kernels, warps_for

# columns of a program forward, and backward; of a thread
COLS_FWD, BLOCK_COLS, PER_THREAD = 1024, 2048, 8
# sorted tokens after which a run is cut: a frequent word is a chain of so many trips to memory, which others end before
CHUNK = 128
# rows of dy that are on their way together, of a run behind its first token: most words come once, and then the first
# row goes alone
ROWS = 4
# words of a program, whose zeros it writes where they have no tokens
WORDS = 4
# On an H100, us of a backward of 16384 x 4096 of 128256 words, its sort among them: 483 with CHUNK = 256. With that and
# WORDS = 8 521, then ROWS = 2 557 or BLOCK_COLS = 1024 544, with CHUNK = 128 519; all as above 475
# words that fewer bits tell apart are sorted sooner: 57 us for 92 there
INT32_WORDS = 2**31


def embedding_reference(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    return F.embedding(ids, weight, padding_idx)


@triton.jit
def _embedding_fwd_kernel(
    ids_ptr,  # [N]
    weight_ptr,  # [V, H]
    y_ptr,  # [N, H]
    weight_stride,  # elements from one row to the next; y has no gaps
    n_vocab,
    n_cols,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    row = tl.load(ids_ptr + token)
    legal = (row >= 0) & (row < n_vocab)
    tl.device_assert(legal, "embedding: an id lies outside the vocabulary")
    # a load from nowhere would be an error that says less
    row = tl.where(legal, row, 0)
    y = tl.load(weight_ptr + row * weight_stride + cols, mask=mask, other=0.0)
    tl.store(y_ptr + token * n_cols + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def _embedding_bwd_kernel(
    dy_ptr,  # [N, H]
    ids_ptr,  # [N], sorted, of either width
    tokens_ptr,  # [N]: where each was before the sort
    used_ptr,  # [V]: whether a word has tokens
    dweight_ptr,  # [V, H]
    heads_ptr,  # [chunks, H] fp32: a chunk's part of the run that goes on behind it, and began in it
    tails_ptr,  # [chunks, H] fp32: a chunk's part of the run that began before it
    dy_stride,  # elements from one row to the next; the others have no gaps
    n_tokens,
    n_vocab,
    n_cols,
    padding_idx,
    WORDS: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    words = first * WORDS + tl.arange(0, WORDS)[:, None]
    idle = (tl.load(used_ptr + words, mask=words < n_vocab, other=1) == 0) | (words == padding_idx)
    zeros = tl.zeros((WORDS, BLOCK), dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + words * n_cols + cols[None, :], zeros, mask=idle & mask[None, :])
    if first >= n_tokens:
        return
    row = tl.load(ids_ptr + first).to(tl.int64)
    before = tl.load(ids_ptr + first - 1, mask=first > 0, other=-1)
    begins = before != row
    chunk = first // CHUNK
    if (begins | (first % CHUNK == 0)) & (row != padding_idx):
        end = tl.minimum((chunk + 1) * CHUNK, n_tokens)
        token = tl.load(tokens_ptr + first)
        dweight = tl.load(dy_ptr + token * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        at = first + 1
        inside = ((at < end) & (tl.load(ids_ptr + at, mask=at < end, other=-1) == row)).to(tl.int32)
        while inside > 0:
            places = at + tl.arange(0, ROWS)[:, None]
            same = (places < end) & (tl.load(ids_ptr + places, mask=places < end, other=-1) == row)
            tokens = tl.load(tokens_ptr + places, mask=same, other=0)
            dy = tl.load(dy_ptr + tokens * dy_stride + cols[None, :], mask=same & mask[None, :], other=0.0)
            dweight += tl.sum(dy.to(tl.float32), axis=0)
            at += ROWS
            # 1 where all of these rows belonged to the run
            inside = tl.min(same.to(tl.int32))
        goes_on = tl.load(ids_ptr + end, mask=end < n_tokens, other=-1) == row
        if begins:
            if goes_on:
                tl.store(heads_ptr + chunk * n_cols + cols, dweight, mask=mask)
            else:
                tl.store(dweight_ptr + row * n_cols + cols, dweight, mask=mask)
        else:
            tl.store(tails_ptr + chunk * n_cols + cols, dweight, mask=mask)


@triton.jit(do_not_specialize=["n_tokens"])
def _embedding_join_kernel(
    ids_ptr,  # [N], sorted, of either width
    dweight_ptr,  # [V, H]
    heads_ptr,  # [chunks, H] fp32
    tails_ptr,  # [chunks, H] fp32
    n_tokens,
    n_cols,
    padding_idx,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The run that begins in this chunk and goes on behind it, if there is one: the sum of its parts."""
    chunk = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    end = (chunk + 1) * CHUNK
    row = tl.load(ids_ptr + end - 1, mask=end < n_tokens, other=-1).to(tl.int64)
    goes_on = tl.load(ids_ptr + end, mask=end < n_tokens, other=-2) == row
    before = tl.load(ids_ptr + chunk * CHUNK - 1, mask=chunk > 0, other=-1)
    if goes_on & (before != row) & (row != padding_idx):
        total = tl.load(heads_ptr + chunk * n_cols + cols, mask=mask, other=0.0)
        at = chunk + 1
        inside = 1
        while inside > 0:
            total += tl.load(tails_ptr + at * n_cols + cols, mask=mask, other=0.0)
            at += 1
            inside = (tl.load(ids_ptr + at * CHUNK, mask=at * CHUNK < n_tokens, other=-1) == row).to(tl.int32)
        tl.store(dweight_ptr + row * n_cols + cols, total, mask=mask)


def _block(n_cols: int, most: int) -> tuple[int, int]:
    """Columns of a program, programs of a row."""
    block = min(most, power_of_2(n_cols))
    return block, cdiv(n_cols, block)


def embedding_fwd(ids: Tensor, weight: Tensor) -> Tensor:
    """[N] int64, [V, H] -> [N, H]."""
    n, h = ids.shape[0], weight.shape[1]
    y = torch.empty((n, h), dtype=weight.dtype, device=weight.device)
    if n == 0 or h == 0:
        return y
    block, blocks = _block(h, COLS_FWD)
    launch(
        _embedding_fwd_kernel, (n, blocks),
        ids, weight, y, row_stride(weight), weight.shape[0], h,
        BLOCK=block, num_warps=warps_for(block, PER_THREAD), **(ASSERTING if looks_itself(ids) else {}),
    )  # fmt: skip
    return y


def embedding_bwd(dy: Tensor, ids: Tensor, n_vocab: int, padding_idx: int | None, dtype: torch.dtype) -> Tensor:
    """[N, H], [N] int64 -> dweight [V, H] in that dtype."""
    n, h = dy.shape
    if n == 0 or h == 0:
        return torch.zeros((n_vocab, h), dtype=dtype, device=dy.device)
    dweight = torch.empty((n_vocab, h), dtype=dtype, device=dy.device)
    used = torch.zeros(n_vocab, dtype=torch.uint8, device=dy.device).index_fill_(0, ids, 1)
    # equal words keep their order, so that each sum has one
    ids, tokens = torch.sort(ids.int() if n_vocab <= INT32_WORDS else ids, stable=True)
    chunks = cdiv(n, CHUNK)
    heads, tails = torch.empty((2, chunks, h), dtype=torch.float32, device=dy.device).unbind()
    # no id is -1
    padding = -1 if padding_idx is None else padding_idx
    block, blocks = _block(h, BLOCK_COLS)
    constants = {"CHUNK": CHUNK, "BLOCK": block, "num_warps": warps_for(block, PER_THREAD)}
    launch(
        _embedding_bwd_kernel, (max(n, cdiv(n_vocab, WORDS)), blocks),
        dy, ids, tokens, used, dweight, heads, tails, row_stride(dy), n, n_vocab, h, padding,
        WORDS=WORDS, ROWS=ROWS, **constants,
    )  # fmt: skip
    if chunks > 1:
        launch(_embedding_join_kernel, (chunks, blocks), ids, dweight, heads, tails, n, h, padding, **constants)
    return dweight


class EmbeddingFunction(torch.autograd.Function):
    """Autograd around the launchers; sees ids [N] and weight [V, H]."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.n_vocab, ctx.dtype, ctx.padding_idx = weight.shape[0], weight.dtype, padding_idx
        return embedding_fwd(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[None, Tensor, None]:
        (ids,) = ctx.saved_tensors
        return None, embedding_bwd(rows_of(dy), ids, ctx.n_vocab, ctx.padding_idx, ctx.dtype), None


def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """``F.embedding(ids, weight, padding_idx)``: ids [...] (int64, int32) in [0, V), weight [V, H] -> [..., H].

    An id outside the vocabulary is an error: here on a CPU, on the device else. The row padding_idx gets no gradient.
    """
    if weight.ndim != 2:
        raise ValueError(f"embedding: weight {tuple(weight.shape)} must be [vocabulary, columns]")
    n_vocab, hidden = weight.shape
    if padding_idx is not None:
        check_whole("embedding", padding_idx=padding_idx)
        if not -n_vocab <= padding_idx < n_vocab:
            raise ValueError(f"embedding: padding_idx is {padding_idx}; weight has {n_vocab} rows")
        padding_idx %= n_vocab
    flat = flat_ids("embedding", ids, n_vocab, looked_at=looks_itself(ids))
    if not runs_kernels(weight, ids):
        return embedding_reference(ids, weight, padding_idx)
    check_dtypes("embedding", weight=weight)
    return EmbeddingFunction.apply(flat, rows_of(weight), padding_idx).view(*ids.shape, hidden)
