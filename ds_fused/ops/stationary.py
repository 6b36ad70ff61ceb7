"""linear_cross_entropy over ranks that each hold some rows of the weight: the tokens travel, the weight stays.

Each rank multiplies the tokens of all ranks with its own vocabulary rows, block of tokens after block:

    x [W * T, H]    from all ranks                           (all-gather)
    z [W * T, n]  = x @ rows.T, its softmax pass over n columns
    lse, loss       from the W parts of each token           (all-gather of 3 numbers a token; merged by every rank;
                                                              4 where the argmax is asked for)
    dz              over z, in place
    dx            = sum over ranks of dz @ rows              (reduce-scatter, in fp32)
    dw           += dz.T @ x                                 fp32, of these rows alone: nothing to reduce

A product takes all multiprocessors of a GPU; a collective that is under way when it starts delays it by all its time,
and one that is ready meanwhile waits for its end. The softmax passes leave room. So that is where collectives run: dx
of the block before beside the first pass, x of the next block beside the second.

Logits exist for one block, and each is computed once (6 MHV FLOPs), if gradients are made in the forward. They are
linear in the upstream gradient, but dw only in one that all tokens share, up to what the forward knows (1 / count for
a mean). That is so for any loss that is a mean or a sum, and the backward asks all ranks whether it was. Where not
(weights of tokens or of ranks), it makes the gradients again with the right ones, 12 MHV, and from then on in the
backward alone, 8 MHV; the result is the same.

Saved for backward: x, labels and lse of all tokens (16 bytes each), dx, and dw in fp32 [n, H].

Sizes: M tokens of this rank, W ranks, T tokens of a rank in a block, H hidden, V vocabulary, n rows of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_fused.ops._loss import LossOptions, cross_entropy_bwd_torch, cross_entropy_fwd_torch
from ds_fused.ops._merge import merge, merge_torch
from ds_fused.ops._tiles import product, side, tile, tile_elements, wide
from ds_fused.ops._triton import runs_kernels
from ds_fused.ops.cross_entropy import cross_entropy_bwd, cross_entropy_fwd

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


def block_bytes(n_vocab: int, hidden: int, ranks: int, itemsize: int) -> int:
    """What a token of each rank takes of a block: its logits, two of its x, two of its dx in fp32."""
    return n_vocab * itemsize + ranks * hidden * (2 * itemsize + 2 * 4)


def block_tokens(most: int, n_vocab: int, hidden: int, ranks: int, itemsize: int, chunk_bytes: int) -> int:
    """T: so many that a block takes about `chunk_bytes`."""
    return side(max(most, 1), chunk_bytes // block_bytes(n_vocab, hidden, ranks, itemsize), ranks)


class _Tokens:
    """The tokens of all ranks, block after block; the first is on its way at once."""

    def __init__(self, shard: VocabShard, x: Tensor, most: int, block: int) -> None:
        self.shard, self.x, self.most, self.block = shard, x, most, block
        self.places = [slice(start, min(start + block, most)) for start in range(0, most, block)]
        self._coming: Flight | None = None
        self.start(0)

    def start(self, i: int) -> None:
        """Have block i on its way, if there is one."""
        if i < len(self.places):
            place = self.places[i]
            # zeros, since what nobody wrote may be NaN, and 0 * NaN would go into dw
            self._coming = self.shard.gather(padded(self.x[place], place.stop - place.start, 0.0))

    def land(self) -> Tensor:
        """x [W * T, H] of the block that was started last."""
        coming, self._coming = self._coming, None
        return coming.land().view(-1, self.x.shape[1])


class _Labels:
    """The labels of all ranks [W, most], on their way until they are asked for, and what follows from them."""

    def __init__(
        self, shard: VocabShard, mine: Tensor, most: int, options: LossOptions, guess: str | None, dtype: torch.dtype
    ) -> None:
        self._flight = shard.gather(padded(mine, most, options.ignore_index))
        self._ignored, self._guess, self._dtype = options.ignore_index, guess, dtype

    @cached_property
    def all(self) -> Tensor:
        return self._flight.land()

    @cached_property
    def counts(self) -> Tensor:
        """[W]: tokens that count."""
        return (self.all != self._ignored).sum(1)

    @cached_property
    def weights(self) -> Tensor:
        """[W]: what a loss of each rank's tokens weighs, up to one factor for all, and at most `FP16_HEADROOM`."""
        counts = self.counts.clamp_min(1).to(torch.promote_types(self._dtype, torch.float32))
        weights = counts.min() / counts if self._guess == "mean" else torch.ones_like(counts)
        return weights * FP16_HEADROOM if self._dtype == torch.float16 else weights

    def upstream(self) -> Tensor:
        """[W, most]"""
        return self.weights[:, None].expand(-1, self.all.shape[1])


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
        self._ready: tuple[slice, Tensor] | None = None
        self._leaving: tuple[slice, Flight] | None = None
        self._begun = False

    def add(self, place: slice, dz: Tensor, x: Tensor) -> None:
        if self.dx is not None:
            part = torch.empty_like(x, dtype=wide(x))
            self.rows.back(part, dz)
            self._ready = place, part.view(self.shard.ranks, -1, x.shape[1])
        if self.dw is not None:
            product(self.dw.rows, dz.t(), x, add=self._begun)
        if self.dbias is not None:
            self.dbias[self.rows.ids] += dz.sum(0, dtype=self.dbias.dtype)
        self._begun = True

    def send(self) -> None:
        """Start the reduce-scatter of the block that was added last, and take in what the one before has brought."""
        if self._ready is not None:
            (place, parts), self._ready = self._ready, None
            self._land()
            self._leaving = (place, self.shard.reduce_scatter(parts))

    def finish(self) -> None:
        self.send()
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
    gradients are made in the forward; None makes none there. `more`: lse [2, M] and right [M] as well, which costs a
    fourth number a token.
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
        more: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        most = shard.most(x.shape[0])
        block = block_tokens(most, *shard.shape, shard.ranks, x.element_size(), chunk_bytes)
        tokens = _Tokens(shard, x, most, block)
        everyones = _Labels(shard, labels, most, options, guess, x.dtype)
        loss = x.new_empty(x.shape[0], dtype=wide(x))
        lse = x.new_empty(2, shard.ranks, most, dtype=wide(x))
        right = torch.empty_like(loss) if more else None
        rows = _Rows(shard, x, bias)
        made = None
        if guess is not None:
            made = _Gradients(shard, rows, x, bias, ctx.needs_input_grad[:3])
        _Walk(tokens, rows, options, lambda: everyones.all, lse, everyones.upstream, made)(loss, right)
        ctx.save_for_backward(x, bias, everyones.all, lse, everyones.counts, everyones.weights)
        ctx.shard, ctx.options, ctx.block, ctx.made = shard, options, block, made
        if not more:
            return loss
        # a copy: whoever keeps it should not keep the lse of all ranks
        mine = lse[:, shard.rank, : x.shape[0]].clone()
        ctx.mark_non_differentiable(mine, right)
        return loss, mine, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
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
            tokens = _Tokens(shard, x, labels.shape[1], ctx.block)
            _Walk(tokens, rows, ctx.options, lambda: labels, lse, lambda: upstream, made)()
        if made.dw is not None:
            made.dw.give(factor)
        return (
            None if made.dx is None else made.dx.mul_(factor),
            None,
            None if made.dbias is None else made.dbias.mul_(factor).to(bias.dtype),
            None, None, None, None, None, None,
        )  # fmt: skip


class _Walk:
    """One pass over the tokens of all ranks."""

    def __init__(
        self,
        tokens: _Tokens,
        rows: _Rows,
        options: LossOptions,
        labels: Callable[[], Tensor],  # [W, most]
        lse: Tensor,  # [2, W, most], written in a forward, read in a backward
        upstream: Callable[[], Tensor],  # [W, most]
        gradients: _Gradients | None,
    ) -> None:
        self.tokens, self.rows, self.options, self.lse = tokens, rows, options, lse
        # asked for when the first logits are under way, which don't need them
        self.labels, self.upstream = labels, upstream
        self.gradients = gradients
        self.shard = tokens.shard
        self.kernels = runs_kernels(tokens.x)
        self.columns = {"n_vocab": self.shard.shape[0], "first_id": self.shard.first_id}

    def __call__(self, loss: Tensor | None = None, right: Tensor | None = None) -> None:
        """``loss`` [M]: where given, it and lse are written, else lse is read. Gradients if they are wanted.

        ``right`` [M]: written where given.
        """
        tokens, gradients = self.tokens, self.gradients
        most = self.shard.ranks * min(tokens.block, tokens.most)
        room = tokens.x.new_empty(tile_elements(most, self.shard.n_rows))
        for i, place in enumerate(tokens.places):
            x = tokens.land()
            z = tile(room, x.shape[0], self.shard.n_rows)
            self.rows.logits(z, x)
            if gradients is not None:
                gradients.send()
            labels = self.labels()[:, place].reshape(-1)
            coming = None if loss is None else self.shard.gather(self._numbers(z, labels, right is not None))
            # behind those numbers, which are waited for sooner
            tokens.start(i + 1)
            if coming is not None:
                self._merge(coming.land(), place, labels, loss, right)
            if gradients is not None:
                # dz in place: nobody else has the logits
                self._softmax_bwd(place, z, labels)
                gradients.add(place, z, x)
        if gradients is not None:
            gradients.finish()

    def _numbers(self, z: Tensor, labels: Tensor, wants_right: bool) -> Tensor:
        """[3 or 4, W * T]: what this rank's columns say of each token."""
        softmax = cross_entropy_fwd if self.kernels else cross_entropy_fwd_torch
        part = self.lse.new_empty(4 if wants_right else 3, z.shape[0])
        right = part[3] if wants_right else None
        softmax(z, labels, part[0], part[1:3], self.options, **self.columns, is_first=True, is_last=False, right=right)
        return part

    def _merge(self, parts: Tensor, place: slice, labels: Tensor, loss: Tensor, right: Tensor | None) -> None:
        n = labels.shape[0]
        block_loss, block_lse = self.lse.new_empty(n), self.lse.new_empty(2, n)
        block_right = None if right is None else self.lse.new_empty(n)
        (merge if self.kernels else merge_torch)(parts, labels, block_loss, block_lse, self.options, block_right)
        for whole, block in ((loss, block_loss), (right, block_right)):
            if whole is not None:
                mine = whole[place]
                mine.copy_(block.view(self.shard.ranks, -1)[self.shard.rank, : mine.shape[0]])
        self.lse[:, :, place] = block_lse.view(2, self.shard.ranks, -1)

    def _softmax_bwd(self, place: slice, z: Tensor, labels: Tensor) -> None:
        softmax = cross_entropy_bwd if self.kernels else cross_entropy_bwd_torch
        upstream, lse = self.upstream()[:, place].reshape(-1), self.lse[:, :, place].reshape(2, -1)
        softmax(upstream, z, labels, lse, z, self.options, **self.columns)


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
