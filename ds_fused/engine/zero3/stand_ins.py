"""A head's weight as a rank under ZeRO-3 has it, without ranks and without memory: what a warm-up shows to the op.

Shapes, dtypes and what is called are as in `ZeroSlabs` and `ZeroShard`; everything is on the meta device.

Sizes: V vocabulary rows, H columns, W ranks.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.engine.zero3.shards import Shards
from ds_fused.ops.common._parts import sum_parts
from ds_fused.ops.common._tiles import wide
from ds_fused.ops.vocab.slabs import WeightSlabs
from ds_fused.ops.vocab.vocab_shard import VocabShard


def ways_of(
    weight: Tensor, ranks: int, mode: str, slab_bytes: int, copied: bool = False
) -> list[WeightSlabs | VocabShard]:
    """What a head [V, H] may be in that mode, "auto" being either; nothing where it is gathered whole.

    ``copied``: slabs and tokens are moved by copy engines, where there are any.
    """
    shards = Shards(*weight.shape, ranks)
    if shards.why_uncut() is not None:
        return []
    ways: list[WeightSlabs | VocabShard] = []
    if mode in ("auto", "stream"):
        ways.append(Slabs(weight, shards, slab_bytes, copied))
    if mode in ("auto", "stationary"):
        # ids of the first begin with 0, and those of some others with a number that 16 does not divide
        ways += [Shard(weight, shards, rank, copied) for rank in sorted({0, min(1, ranks - 1), ranks - 1})]
    return ways


class Landed(NamedTuple):
    """A collective that has been."""

    result: Tensor

    def land(self) -> Tensor:
        return self.result


class Slabs:
    """Mode "stream"."""

    def __init__(self, weight: Tensor, shards: Shards, slab_bytes: int, copied: bool) -> None:
        self.weight, self._copied, self._ranks = weight, copied, shards.ranks
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.requires_grad, self.share = weight.requires_grad, 1 / shards.ranks
        self.ids = self.places = weight.new_empty(len(weight), dtype=torch.int64)
        self._spans = shards.spans(shards.cuts(shards.hidden * weight.element_size(), slab_bytes))
        self.slab_rows = max(span.stop - span.start for span in self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def span(self, k: int) -> slice:
        return self._spans[k]

    def prefetch(self, k: int) -> None:
        """Nothing comes."""

    def gather(self, k: int) -> Tensor:
        return torch.empty_like(self.weight[self.span(k)])

    def holds(self, rows: Tensor) -> bool:
        return True

    def gradient(self, k: int) -> Tensor:
        return self.gather(k)

    def scatter(self, k: int, dw: Tensor) -> None:
        """Nothing leaves; what comes is added up."""
        arrived(dw.new_empty(self._ranks if self._copied else 1, dw.numel() // self._ranks), beside=self._copied)

    def finish(self) -> None:
        """Nothing was written."""


class Shard(VocabShard):
    """Mode "stationary"."""

    # whether an upstream gradient confirms what a forward has guessed can't be read
    guesses = False

    def __init__(self, weight: Tensor, shards: Shards, rank: int, copied: bool) -> None:
        self.weight, self.carrier = weight, Carrier(shards.ranks) if copied else None
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.requires_grad = weight.requires_grad
        self.ranks, self.rank = shards.ranks, rank
        self.first_id, after = shards.first_rows[rank : rank + 2]
        self.n_rows = after - self.first_id

    def rows(self) -> tuple[Tensor, ...]:
        return (self.weight.new_empty(self.n_rows, self.shape[1]),)

    def most(self, n: int) -> int:
        return n

    def gather(self, mine: Tensor) -> Landed:
        return Landed(mine.new_empty(self.ranks, *mine.shape))

    def reduce_scatter(self, parts: Tensor) -> Landed:
        return Landed(parts.new_empty(parts.shape[1:]))

    def gradient(self, dtype: torch.dtype = torch.float32) -> Gradient:
        return Gradient(self.weight.new_empty(self.n_rows, self.shape[1], dtype=dtype), self.dtype)


class Carrier:
    """Copy engines, for tokens."""

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def room(self, n: int, like: Tensor) -> Tensor:
        return like.new_empty(n, like.shape[1])

    def bring(self, mine: Tensor, everyones: Tensor) -> Landed:
        return Landed(everyones)

    def parts(self, n: int, like: Tensor) -> Tensor:
        return like.new_empty(n, like.shape[1], dtype=wide(like))

    def send_home(self, parts: Tensor, out: Tensor) -> Landed:
        sum_parts(parts.view(self._ranks, -1)[:, : out.numel()], out.view(-1), adds=False, beside=True)
        return Landed(out)


class Gradient(NamedTuple):
    rows: Tensor
    dtype: torch.dtype  # the weight's

    def give(self, factor: float) -> None:
        """Nobody wants it, but it goes where gradients are kept."""
        arrived(self.rows.view(1, -1), self.dtype)


def arrived(parts: Tensor, dtype: torch.dtype | None = None, beside: bool = False) -> None:
    """Parts [W, N] of a gradient, in either dtype that it may be kept in, the weight's or fp32."""
    for kept, adds in product(dict.fromkeys((dtype or parts.dtype, torch.float32)), (False, True)):
        sum_parts(parts, parts.new_empty(parts.shape[1], dtype=kept), adds=adds, beside=beside)
