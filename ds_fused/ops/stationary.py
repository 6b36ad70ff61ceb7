"""linear_cross_entropy over ranks that each hold some rows of the weight: the tokens travel, the weight stays.

Each rank multiplies the tokens of all ranks with its own vocabulary rows, block of tokens after block:

    x [W * T, H]    from all ranks (all-gather)              the next block is on its way meanwhile
    z [W * T, n]  = x @ rows.T, its softmax pass over n columns
    lse, loss       from the W parts of each token           (all-gather of 3 numbers a token; merged by every rank)
    dz              over z, in place
    dx            = sum over ranks of dz @ rows              (reduce-scatter, in fp32, while dw is computed)
    dw           += dz.T @ x                                 fp32, of these rows alone: nothing to reduce

So logits exist for one block, and each is computed once (6 MHV FLOPs), if gradients are made in the forward. They are
linear in the upstream gradient, but dw only in one that all tokens share, up to what the forward knows (1 / count for
a mean). That is so for any loss that is a mean or a sum, and the backward asks all ranks whether it was. Where not
(weights of tokens or of ranks), it makes the gradients again with the right ones, 12 MHV, and from then on in the
backward alone, 8 MHV; the result is the same.

Saved for backward: x, labels and lse of all tokens (16 bytes each), dx, and dw in fp32 [n, H].

Sizes: M tokens of this rank, W ranks, T tokens of a rank in a block, H hidden, V vocabulary, n rows of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_fused.ops._loss import LossOptions, cross_entropy_bwd_torch, cross_entropy_fwd_torch
from ds_fused.ops._tiles import product, side, tile, tile_elements, wide
from ds_fused.ops._triton import cdiv, on_device, runs_kernels
from ds_fused.ops.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

MERGE_BLOCK = 256
# dz lies in [-1, 1]: times this, the small ones of a large vocabulary stay clear of fp16's least number (6e-8)
FP16_HEADROOM = 256.0
# ratios of fp32 numbers that stand for the same one
SAME = 1e-6


class Flight(Protocol):
    """A collective under way."""

    def land(self) -> Tensor:
        """Its result; what is computed from now on waits for it."""
        ...


class ShardGradient(Protocol):
    """The gradient of a shard's rows on its way home."""

    rows: Tensor  # [n, H] for the op to write

    def give(self, factor: float) -> None:
        """``factor * rows``, summed over all tokens of all ranks, is complete."""
        ...


class VocabShard(ABC):
    """A weight [V, H] of which each rank holds neighbouring rows; every rank calls the same methods in the same order.

    The number and order of collectives depend on V, H, W and the largest M alone.
    """

    shape: tuple[int, int]  # V, H
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    ranks: int  # W
    rank: int
    first_id: int  # this rank has the vocabulary ids [first_id, first_id + n)
    n_rows: int  # n
    # whether gradients are made in the forward: until a backward has found that it was for nothing
    guesses: bool = True

    @abstractmethod
    def rows(self) -> tuple[Tensor, ...]:
        """This rank's rows in order, in one piece or more [n_i, H]. May be a collective."""

    @abstractmethod
    def most(self, n: int) -> int:
        """The largest n of all ranks. The host waits for the other hosts, no GPU does."""

    @abstractmethod
    def gather(self, mine: Tensor) -> Flight:
        """[...] of each rank, alike in shape -> [W, ...]"""

    @abstractmethod
    def reduce_scatter(self, parts: Tensor) -> Flight:
        """[W, ...] -> [...]: the sum over ranks of the part that is this one's"""

    @abstractmethod
    def gradient(self, dtype: torch.dtype = torch.float32) -> ShardGradient:
        """Room for a gradient."""


@triton.jit
def _merge_kernel(
    parts_ptr,  # [W, 3, N]: picked, peak, rest of each rank's columns
    labels_ptr, loss_ptr,  # [N]
    lse_ptr,  # [2, N]
    lse_stride, n_tokens, n_parts, ignore_index, z_loss,
    BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < n_tokens
    ignored = tl.load(labels_ptr + token, mask=mask, other=0) == ignore_index
    picked = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    peak = tl.full([BLOCK], -1e38, tl.float32)
    part_ptr = parts_ptr + token
    for _ in range(n_parts):
        picked += tl.load(part_ptr, mask=mask, other=0.0)
        part_peak = tl.load(part_ptr + n_tokens, mask=mask, other=0.0)
        part_rest = tl.load(part_ptr + 2 * n_tokens, mask=mask, other=0.0)
        most = tl.maximum(peak, part_peak)
        total = total * tl.exp(peak - most) + tl.exp(part_rest) * tl.exp(part_peak - most)
        peak = most
        part_ptr += 3 * n_tokens
    rest = tl.log(total)
    lse = peak + rest
    loss = (peak - picked) + rest + z_loss * lse * lse
    tl.store(loss_ptr + token, tl.where(ignored, 0.0, loss), mask=mask)
    tl.store(lse_ptr + token, tl.where(ignored, 0.0, peak), mask=mask)
    tl.store(lse_ptr + lse_stride + token, tl.where(ignored, 0.0, rest), mask=mask)


def merge(parts: Tensor, labels: Tensor, loss: Tensor, lse: Tensor, options: LossOptions) -> None:
    """Loss [N] and lse [2, N] of tokens from what the ranks' columns gave: [W, 3, N], contiguous."""
    n_parts, _, n_tokens = parts.shape
    with on_device(parts):
        _merge_kernel[(cdiv(n_tokens, MERGE_BLOCK),)](
            parts, labels, loss, lse, lse.stride(0), n_tokens, n_parts, options.ignore_index, float(options.z_loss),
            BLOCK=MERGE_BLOCK,
        )  # fmt: skip


def merge_torch(parts: Tensor, labels: Tensor, loss: Tensor, lse: Tensor, options: LossOptions) -> None:
    """merge without a kernel."""
    picked, peaks, rests = parts.unbind(1)
    peak = peaks.amax(0)
    rest = (rests.exp() * (peaks - peak).exp()).sum(0).log()
    whole, ignored = peak + rest, labels == options.ignore_index
    loss.copy_(((peak - picked.sum(0)) + rest + options.z_loss * whole * whole).masked_fill(ignored, 0.0))
    lse[0].copy_(peak.masked_fill(ignored, 0.0))
    lse[1].copy_(rest.masked_fill(ignored, 0.0))


def block_bytes(n_vocab: int, hidden: int, ranks: int, itemsize: int) -> int:
    """What a token of each rank takes of a block: its logits, two of its x, two of its dx in fp32."""
    return n_vocab * itemsize + ranks * hidden * (2 * itemsize + 2 * 4)


def block_tokens(most: int, n_vocab: int, hidden: int, ranks: int, itemsize: int, chunk_bytes: int) -> int:
    """T: so many that a block takes about `chunk_bytes`."""
    return side(max(most, 1), chunk_bytes // block_bytes(n_vocab, hidden, ranks, itemsize), ranks)


class _Tokens:
    """The tokens of all ranks, block after block."""

    def __init__(self, shard: VocabShard, x: Tensor, labels: Tensor, block: int) -> None:
        self.shard, self.x, self.labels, self.block = shard, x, labels, block
        self.most = labels.shape[1]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(place among each rank's tokens, x [W * T, H], labels [W * T])"""
        places = [slice(start, min(start + self.block, self.most)) for start in range(0, self.most, self.block)]
        coming = self._start(places[0]) if places else None
        for i, place in enumerate(places):
            x = coming.land().view(-1, self.x.shape[1])
            coming = self._start(places[i + 1]) if i + 1 < len(places) else None
            yield place, x, self.labels[:, place].reshape(-1)

    def _start(self, place: slice) -> Flight:
        # zeros, since what nobody wrote may be NaN, and 0 * NaN would go into dw
        return self.shard.gather(padded(self.x[place], place.stop - place.start, 0.0))


def padded(mine: Tensor, n: int, value: float) -> Tensor:
    """[m, ...] to n >= m along the first dimension; itself where it has that."""
    if mine.shape[0] == n:
        return mine.contiguous()
    out = mine.new_full((n, *mine.shape[1:]), value)
    out[: mine.shape[0]] = mine
    return out


class _Rows:
    """This rank's rows as the products want them, and its part of the bias."""

    def __init__(self, shard: VocabShard, x: Tensor, bias: Tensor | None) -> None:
        ends = 0
        self.pieces: list[tuple[slice, Tensor]] = []
        for piece in shard.rows():
            # under autocast the weight has its own dtype
            self.pieces.append((slice(ends, ends + piece.shape[0]), piece.to(x.dtype)))
            ends += piece.shape[0]
        self.ids = slice(shard.first_id, shard.first_id + ends)
        self.bias = None if bias is None else bias[self.ids].to(x.dtype)

    def logits(self, z: Tensor, x: Tensor) -> None:
        for columns, rows in self.pieces:
            if self.bias is None:
                torch.mm(x, rows.t(), out=z[:, columns])
            else:
                torch.addmm(self.bias[columns], x, rows.t(), out=z[:, columns])

    def back(self, dx: Tensor, dz: Tensor) -> None:
        for columns, rows in self.pieces:
            product(dx, dz[:, columns], rows, add=columns.start > 0)


class _Gradients:
    """What the blocks add up to: dx of this rank's tokens; dw and dbias of its rows."""

    def __init__(self, shard: VocabShard, rows: _Rows, x: Tensor, bias: Tensor | None, wants: tuple[bool, ...]) -> None:
        self.shard, self.rows = shard, rows
        self.dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants[0] else None
        self.dw = shard.gradient() if wants[1] else None
        # zeros for the rows of other ranks: the mean over ranks, as of any parameter, puts the parts together
        self.dbias = torch.zeros_like(bias, dtype=wide(x)) if wants[2] else None
        self._leaving: tuple[slice, Flight] | None = None
        self._begun = False

    def add(self, place: slice, dz: Tensor, x: Tensor) -> None:
        if self.dx is not None:
            part = torch.empty_like(x, dtype=wide(x))
            self.rows.back(part, dz)
            self._land()
            self._leaving = (place, self.shard.reduce_scatter(part.view(self.shard.ranks, -1, x.shape[1])))
        if self.dw is not None:
            product(self.dw.rows, dz.t(), x, add=self._begun)
        if self.dbias is not None:
            self.dbias[self.rows.ids] += dz.sum(0, dtype=self.dbias.dtype)
        self._begun = True

    def finish(self) -> None:
        self._land()
        if self.dw is not None and not self._begun:
            self.dw.rows.zero_()

    def _land(self) -> None:
        if self._leaving is not None:
            (place, flight), self._leaving = self._leaving, None
            mine, dx = flight.land(), self.dx[place]
            dx.copy_(mine[: dx.shape[0]])


class StationaryFunction(torch.autograd.Function):
    """x [M, H], this rank's rows of a weight and labels [M] to one loss a token [M], fp32.

    `anchor` is empty and requires grad if the weight does. `guess`: the reduction on top, "mean" or "sum", with which
    gradients are made in the forward; None makes none there.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        anchor: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shard: VocabShard,
        options: LossOptions,
        chunk_bytes: int,
        guess: str | None,
    ) -> Tensor:
        most = shard.most(x.shape[0])
        everyones = shard.gather(padded(labels, most, options.ignore_index)).land()
        block = block_tokens(most, *shard.shape, shard.ranks, x.element_size(), chunk_bytes)
        tokens = _Tokens(shard, x, everyones, block)
        counts = (everyones != options.ignore_index).sum(1)
        weights = _weights(counts, guess, x)
        loss = x.new_empty(x.shape[0], dtype=wide(x))
        lse = x.new_empty(2, shard.ranks, most, dtype=wide(x))
        rows = _Rows(shard, x, bias)
        made = None
        if guess is not None:
            made = _Gradients(shard, rows, x, bias, ctx.needs_input_grad[:3])
        _walk(tokens, rows, options, lse, loss=loss, upstream=weights[:, None].expand(-1, most), gradients=made)
        ctx.save_for_backward(x, bias, everyones, lse, counts, weights)
        ctx.shard, ctx.options, ctx.block, ctx.made = shard, options, block, made
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, labels, lse, counts, weights = ctx.saved_tensors
        shard, (made, ctx.made) = ctx.shard, (ctx.made, None)
        factor = None if made is None else _common_factor(shard, dloss, weights, counts)
        if factor is None:
            # the next loss is weighted like this one
            shard.guesses = made is None and shard.guesses
            made = None  # frees its memory
            rows = _Rows(shard, x, bias)
            made, factor = _Gradients(shard, rows, x, bias, ctx.needs_input_grad[:3]), 1.0
            upstream = shard.gather(padded(dloss, labels.shape[1], 0.0)).land()
            _walk(_Tokens(shard, x, labels, ctx.block), rows, ctx.options, lse, upstream=upstream, gradients=made)
        if made.dw is not None:
            made.dw.give(factor)
        return (
            None if made.dx is None else made.dx.mul_(factor),
            None,
            None if made.dbias is None else made.dbias.mul_(factor).to(bias.dtype),
            None, None, None, None, None,
        )  # fmt: skip


def _walk(
    tokens: _Tokens,
    rows: _Rows,
    options: LossOptions,
    lse: Tensor,  # [2, W, most]
    *,
    upstream: Tensor,  # [W, most]
    gradients: _Gradients | None,
    loss: Tensor | None = None,  # [M]; where given, it and lse are written, else lse is read
) -> None:
    shard, x = tokens.shard, tokens.x
    kernels = runs_kernels(x)
    softmax_fwd, softmax_bwd = (
        (cross_entropy_fwd, cross_entropy_bwd) if kernels else (cross_entropy_fwd_torch, cross_entropy_bwd_torch)
    )
    slab = {"n_vocab": shard.shape[0], "first_id": shard.first_id}
    room = x.new_empty(tile_elements(shard.ranks * min(tokens.block, tokens.most), shard.n_rows))
    for place, block, labels in tokens:
        n = block.shape[0]
        z = tile(room, n, shard.n_rows)
        rows.logits(z, block)
        if loss is None:
            block_lse = lse[:, :, place].reshape(2, n)
        else:
            part = lse.new_empty(3, n)
            softmax_fwd(z, labels, part[0], part[1:], options, **slab, is_first=True, is_last=False)
            everyones = shard.gather(part).land()
            block_loss, block_lse = lse.new_empty(n), lse.new_empty(2, n)
            (merge if kernels else merge_torch)(everyones, labels, block_loss, block_lse, options)
            mine = loss[place]
            mine.copy_(block_loss.view(shard.ranks, -1)[shard.rank, : mine.shape[0]])
            lse[:, :, place] = block_lse.view(2, shard.ranks, -1)
        if gradients is not None:
            dz = z  # in place: nobody else has it
            softmax_bwd(upstream[:, place].reshape(n), z, labels, block_lse, dz, options, **slab)
            gradients.add(place, dz, block)
    if gradients is not None:
        gradients.finish()


def _weights(counts: Tensor, guess: str | None, x: Tensor) -> Tensor:
    """[W]: what a loss of each rank's tokens weighs, up to one factor for all, and at most `FP16_HEADROOM`."""
    counts = counts.clamp_min(1).to(wide(x))
    weights = counts.min() / counts if guess == "mean" else torch.ones_like(counts)
    return weights * FP16_HEADROOM if x.dtype == torch.float16 else weights


def _common_factor(shard: VocabShard, dloss: Tensor, weights: Tensor, counts: Tensor) -> float | None:
    """The number that upstream gradients are of the weights the forward took, the same for all tokens of all ranks.

    None, on every rank, if there is none. The host waits for the GPU here, once.
    """
    # a sum's backward expands one number: other strides mean numbers that may differ
    if dloss.numel() == 0:
        ratio = dloss.new_zeros(())
    elif dloss.stride(0) == 0 or dloss.numel() == 1:
        ratio = dloss[0] / weights[shard.rank]
    else:
        ratio = dloss.new_full((), float("nan"))
    told = torch.stack([ratio, (counts[shard.rank] > 0).to(ratio.dtype)])
    # ranks all of whose tokens are ignored have zeros, whatever their number is
    ratios = [ratio for ratio, counts in shard.gather(told).land().tolist() if counts]
    if not ratios:
        return 0.0
    first = ratios[0]
    same = all(ratio == first or abs(ratio - first) <= SAME * abs(first) for ratio in ratios)
    return first if same else None
