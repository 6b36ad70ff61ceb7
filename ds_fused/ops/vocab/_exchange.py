"""What ranks that hold rows of a head tell each other of their tokens: hidden states, labels, class weights.

Sizes: M tokens of this rank, at most `most` of any, W ranks, T tokens of a rank in a block, H hidden, n rows of this
rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common._tiles import first_half
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab.vocab_shard import Flight, VocabShard, padded

# dz lies in [-1, 1]: times this, the small ones of a large vocabulary stay clear of fp16's least number (6e-8)
FP16_HEADROOM = 256.0


class Tokens:
    """The tokens of all ranks, block after block; the first is on its way at once."""

    def __init__(self, shard: VocabShard, x: Tensor, most: int, block: int) -> None:
        self.shard, self.x, self.most, self.block = shard, x, most, block
        self.places = [slice(start, min(start + block, most)) for start in range(0, most, block)]
        self._coming: Flight | None = None
        self.start(0)

    def start(self, i: int) -> None:
        """Have block i on its way, if there is one."""
        if i < len(self.places):
            self._coming = self.shard.gather(self.mine(self.places[i]))

    def land(self) -> Tensor:
        """x [W * T, H] of the block that was started last."""
        coming, self._coming = self._coming, None
        return coming.land().view(-1, self.x.shape[1])

    def halves(self, i: int) -> list[tuple[slice, slice, slice]]:
        """Of block i: whose tokens, which of each one's, and which of the block's, where ranks follow one another."""
        place, middle = self.places[i], self.shard.ranks // 2
        n = place.stop - place.start
        cuts = ((0, middle), (middle, self.shard.ranks))
        return [(slice(a, b), place, slice(a * n, b * n)) for a, b in cuts if a < b]

    def mine(self, place: slice) -> Tensor:
        # zeros, since what nobody wrote may be NaN, and 0 * NaN would go into dw
        return padded(self.x[place], place.stop - place.start, 0.0)


class CarriedTokens(Tokens):
    """Tokens that a carrier moves, half after half of a block; the next one takes the place of the one before."""

    def start(self, i: int) -> None:
        if i < len(self.places):
            carrier, place, ranks, columns = self.shard.carrier, self.places[i], self.shard.ranks, self.x.shape[1]
            room = carrier.room(ranks * (place.stop - place.start), self.x)
            flights = [
                carrier.bring(self.mine(half), room[rows].view(ranks, -1, columns)) for _, half, rows in self.halves(i)
            ]
            self._coming = Halves(room, flights)

    def halves(self, i: int) -> list[tuple[slice, slice, slice]]:
        place, ranks = self.places[i], self.shard.ranks
        n = place.stop - place.start
        cuts = [0, first_half(n, self.x.shape[1], ranks), n]
        return [
            (slice(0, ranks), slice(place.start + a, place.start + b), slice(ranks * a, ranks * b))
            for a, b in pairwise(cuts)
            if a < b
        ]


class Halves(NamedTuple):
    """Of the tokens of a block, on their way."""

    x: Tensor  # [W * T, H]
    flights: list[Flight]

    def land(self) -> Tensor:
        for flight in self.flights:
            flight.land()
        return self.x


class Labels:
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
        """[1, W, most]"""
        return self.weights[None, :, None].expand(-1, -1, self.all.shape[1])


def of_block(everyones: Tensor, place: slice) -> Tensor:
    """[..., W, most] -> [..., W * T], contiguous: kernels read it so, and a view of one token a rank would not be."""
    return everyones[..., place].contiguous().flatten(-2)


@dataclass(frozen=True)
class ClassWeights:
    """What the softmax passes need of class weights. A token has those of its own rank; ranks may have others each."""

    of_columns: Tensor | None = None  # [W, n]: each rank's weights of this one's rows
    of_tokens: Tensor | None = None  # [2, W, most]: see weights_of_tokens

    @classmethod
    def exchanged(cls, shard: VocabShard, mine: Tensor, of_mine: Tensor, most: int) -> ClassWeights:
        """Each rank brings [V], and [2, M] of its tokens."""
        flights = shard.gather(mine), shard.gather(padded(of_mine.t(), most, 0.0))
        of_all, of_tokens = (flight.land() for flight in flights)
        # a copy: the weights of other rows need not live until the backward
        of_columns = of_all[:, shard.first_id : shard.first_id + shard.n_rows].clone()
        return cls(of_columns, of_tokens.permute(2, 0, 1).contiguous())

    def of_tokens_in(self, ranks: slice, place: slice) -> Tensor | None:
        """[2, N] of those ranks' tokens of a block."""
        return None if self.of_tokens is None else of_block(self.of_tokens[:, ranks], place)

    def passes(self, ranks: slice, place: slice) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """How those ranks' tokens of a block go through a softmax pass: at once, or, with weights, rank by rank."""
        token_weights, step = self.of_tokens_in(ranks, place), place.stop - place.start
        if token_weights is None:
            yield slice(None), {}
            return
        for i, weight in enumerate(self.of_columns[ranks]):
            tokens = slice(i * step, (i + 1) * step)
            yield tokens, {"weight": weight, "token_weights": token_weights[:, tokens]}


@dataclass(frozen=True)
class Found:
    """What a forward finds of the tokens, and a backward reads."""

    lse: Tensor  # [2, W, most]
    entropy: Tensor | None  # [W, most]
    # of this rank's; only in a forward
    loss: Tensor | None = None  # [M]
    right: Tensor | None = None  # [M]
