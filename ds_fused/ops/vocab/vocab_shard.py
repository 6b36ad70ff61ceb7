"""A weight [V, H] of which each rank holds some rows: what the ops need to send tokens and results round.

The engine implements it for ZeRO-3. Sizes: W ranks, M tokens of this rank, H hidden, V vocabulary, n rows of this rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Flight(Protocol):
    """A collective under way."""

    def land(self) -> Tensor:
        """Its result; what is computed from now on waits for it."""
        ...


class Homeward(NamedTuple):
    """A reduce-scatter under way, whose result belongs into `out`; padding behind that is left out."""

    flight: Flight
    out: Tensor

    def land(self) -> Tensor:
        return self.out.copy_(self.flight.land()[: len(self.out)])


class Carrier(Protocol):
    """Moves tokens and their gradients while products are computed, which a collective's kernel could not.

    All ranks call the same methods in the same order. There is room for the tokens of one block, and for what a half of
    it sends home.
    """

    def room(self, n: int, like: Tensor) -> Tensor:
        """[n, H] for tokens of all ranks; those of the block before are no longer needed."""
        ...

    def bring(self, mine: Tensor, everyones: Tensor) -> Flight:
        """`gather` of tokens [T, H] into their place [W, T, H] in that room."""
        ...

    def parts(self, n: int, like: Tensor) -> Tensor:
        """Room [n, H] for what is to be sent home, in fp32; what was sent before is there."""
        ...

    def send_home(self, parts: Tensor, out: Tensor) -> Flight:
        """`reduce_scatter` of parts [W, T, H], to out [T' <= T, H]."""
        ...


class ShardGradient(Protocol):
    """The gradient of a shard's rows on its way home."""

    rows: Tensor  # [n, H] for the op to write

    def give(self, factor: float) -> None:
        """``factor * rows``, summed over all tokens of all ranks, is complete."""
        ...


class VocabShard(ABC):
    """A weight [V, H] of which each rank holds neighbouring rows; every rank calls the same methods in the same order.

    The number and order of collectives depend on V, H, W, the largest M and what is asked for, not on labels or values.
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
    # what moves tokens beside products, where there is such a thing
    carrier: Carrier | None = None

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


def padded(mine: Tensor, n: int, value: float) -> Tensor:
    """[m, ...] to n >= m along the first dimension; itself where it has that."""
    if mine.shape[0] == n:
        return mine.contiguous()
    out = mine.new_full((n, *mine.shape[1:]), value)
    out[: mine.shape[0]] = mine
    return out
