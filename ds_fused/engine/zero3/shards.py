"""Where the rows of a weight lie when ZeRO-3 has split it: arithmetic only.

ZeRO-3 gives rank r the flat range ``[r * P, (r + 1) * P)`` of a weight [V, H], P = ceil(V * H / W), without regard to
rows; the last shard may end in padding, which is memory that nobody wrote. In terms of rows:

    rank 0   | whole rows ........ | tail |
    rank 1                         | head | whole rows ........ | tail |
    rank 2                                                      | head | whole rows .... |

Every rank has whole rows, of which as many count as the poorest has (`common`). A *plain slab* is the same range of
those of every rank, so one all-gather of equal parts brings it, straight out of the shards.
What is left over (rows split between two ranks, and a whole row more on some) is the *seam*: at most 2W - 1 rows, one
more slab, and the first one.

Sizes: V vocabulary rows, H columns, W ranks, P elements of a shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ds_fused.ops.common._tiles import WAVE, in_products, side

# the first plain slab is so many times smaller than the others: its gather and its reduce-scatter, which nothing hides,
# take 0.2 for 0.96 ms of a timeline of four H100, at 128 MiB a slab
FIRST = 4
# Rows whose products are whole waves at tokens and columns in multiples of 512. Twice as many take 36.4 to 37.1 ms of
# products over 8192 x 4096 x 128256 where slabs of 15616 rows take 37.7 to 38.3 (benchmarks/notes.md)
WAVE_ROWS = WAVE // 512
# of what fits, so much is enough: more slabs ask for more collectives
WAVES_AT_LEAST = 7 / 8


@dataclass(frozen=True)
class Shards:
    """A weight [V, H] over W ranks. Everything here is the same on every rank."""

    n_vocab: int
    hidden: int
    ranks: int

    def why_uncut(self) -> str | None:
        """Why such a weight can't be cut into slabs: a row lies on more than two ranks, or a rank has no whole one."""
        if self.size < self.hidden or self.ranks > self.hidden or self.common == 0:
            return f"a weight of {self.n_vocab} x {self.hidden} is too small to be cut over {self.ranks} ranks"
        return None

    @cached_property
    def size(self) -> int:
        """P."""
        return -(-self.n_vocab * self.hidden // self.ranks)

    @cached_property
    def first_rows(self) -> list[int]:
        """Of each rank: the first row that begins in its shard; and V behind the last."""
        return [min(-(-rank * self.size // self.hidden), self.n_vocab) for rank in range(self.ranks)] + [self.n_vocab]

    @cached_property
    def common(self) -> int:
        """How many whole rows every rank has."""
        n_elements = self.n_vocab * self.hidden
        ends = [min((rank + 1) * self.size, n_elements) // self.hidden for rank in range(self.ranks)]
        return min(max(0, end - first) for first, end in zip(self.first_rows, ends, strict=False))

    def cuts(self, row_bytes: int, slab_bytes: int) -> list[slice]:
        """Each plain slab's part of the common rows, at most slab_bytes of all ranks together.

        Even ones, or of whole waves, where nearly as many rows make them. Where there are several, the first is smaller
        still: nothing is computed yet while it comes, and nothing more when it is the last to go.
        """
        most = max(1, slab_bytes // (self.ranks * row_bytes))
        even = side(self.common, most, self.ranks, least=1)
        if even >= self.common:
            return [slice(0, self.common)]
        wave = in_products(WAVE_ROWS, self.ranks)
        in_waves = most // wave * wave
        if in_waves >= WAVES_AT_LEAST * most:
            return self._cuts_in_waves(wave, in_waves)
        first = side(even, -(-even // FIRST), self.ranks, least=1)
        rows = side(self.common - first, most, self.ranks, least=1)
        starts = [0, *range(first, self.common, rows)]
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], self.common], strict=True)]

    def _cuts_in_waves(self, wave: int, rows: int) -> list[slice]:
        """Of so many rows each, but the first ones: the rest that is no wave, in two where it is more than half of a
        slab, and the waves that are no whole slab.
        """
        first = self.common % wave or wave
        starts = [0, first, *range(self.common % rows or rows, self.common, rows)]
        if 2 * first > rows:
            starts.append(side(first, -(-first // 2), self.ranks, least=1))
        starts = sorted(set(starts))
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], self.common], strict=True)]

    def spans(self, cuts: list[slice]) -> list[slice]:
        """Of each slab the places of its rows: the seam, if there is one, and the plain slabs."""
        sizes = [self.ranks * (cut.stop - cut.start) for cut in cuts]
        ends = list(accumulate([self.seam_rows, *sizes] if self.seam_rows else sizes))
        return [slice(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    def ids(self, cuts: list[slice]) -> Tensor:
        """[V]: the vocabulary id at each place."""
        firsts = torch.tensor(self.first_rows[:-1])[:, None]
        return torch.cat([self._seam_ids(), *((firsts + torch.arange(c.start, c.stop)).flatten() for c in cuts)])

    def start(self, rank: int) -> int:
        """Elements of a rank's shard before its first whole row."""
        return self.first_rows[rank] * self.hidden - rank * self.size

    def head(self, rank: int) -> slice:
        """In a rank's shard: the end of a row that begins on the rank before. Less than H elements."""
        return slice(0, self.start(rank))

    def tail(self, rank: int) -> slice:
        """In a rank's shard: what comes behind its common rows, without padding. Less than 2H elements."""
        begin = self.start(rank) + self.common * self.hidden
        end = min(self.size, self.n_vocab * self.hidden - rank * self.size)
        return slice(begin, end)

    def beyond(self, rank: int) -> int:
        """How many elements of a rank's last row lie on the next one."""
        return max(0, self.first_rows[rank + 1] * self.hidden - (rank + 1) * self.size)

    @property
    def splits_rows(self) -> bool:
        """Whether any row lies on two ranks."""
        return any(self.start(rank) for rank in range(self.ranks))

    def _seam_ids(self) -> Tensor:
        """The vocabulary ids of the rows that are no rank's common ones."""
        ends = [first + self.common for first in self.first_rows[:-1]]
        return torch.cat([torch.arange(end, after) for end, after in zip(ends, self.first_rows[1:], strict=True)])

    @property
    def seam_rows(self) -> int:
        return self.n_vocab - self.ranks * self.common
