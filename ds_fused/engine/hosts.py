"""Small numbers between the ranks of a group, from host to host through the job's key-value store.

No GPU waits, and no further process group has to be made, whose network might be another one than the job's.
"""

from __future__ import annotations

from collections import Counter

from torch import distributed as dist

# how many there were of the same ranks, which make them in the same order
_made: Counter[tuple[int, ...]] = Counter()


class Hosts:
    """The ranks of a group; each calls the same methods in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._ranks = tuple(dist.get_process_group_ranks(group))
        self._me = dist.get_rank()
        prefix = f"ds_fused/hosts/{_made[self._ranks]}/{self._ranks}"
        _made[self._ranks] += 1
        self._store = dist.PrefixStore(prefix, dist.distributed_c10d._get_default_store())
        self._round = 0

    def most(self, n: int) -> int:
        """The largest n of all ranks."""
        return int(max(self._everyones(n)))

    def least(self, number: float) -> float:
        """The smallest number of all ranks."""
        return min(self._everyones(number))

    def _everyones(self, number: float) -> list[float]:
        if len(self._ranks) == 1:
            return [number]
        self._store.set(f"{self._round}/{self._me}", repr(number))
        keys = [f"{self._round}/{rank}" for rank in self._ranks]
        try:
            numbers = [float(number) for number in self._read(keys)]
        except RuntimeError as error:
            absent = [rank for rank, key in zip(self._ranks, keys, strict=True) if not self._store.check([key])]
            raise RuntimeError(
                f"ds_fused: ranks {absent or 'that came late'} did not come to the loss or lookup in which rank "
                f"{self._me} waits for them"
            ) from error
        if self._round:
            # whoever has come here has read all of the round before
            self._store.delete_key(f"{self._round - 1}/{self._me}")
        self._round += 1
        return numbers

    def _read(self, keys: list[str]) -> list[bytes]:
        """Values that are there or coming."""
        # in one round trip, where the store can
        if self._store.has_extended_api():
            return self._store.multi_get(keys)
        return [self._store.get(key) for key in keys]
