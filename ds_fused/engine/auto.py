"""Mode "auto" of a head: stream or stationary, by memory and time as modelled, the same on every rank.

Chosen at the first loss, when the number of tokens is known, and kept from there. Rates are measured when the engine is
made; free memory at the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deepspeed.accelerator import get_accelerator

from ds_fused.engine.figures import Figures, Rates, chosen, measured, of_stationary, of_stream

if TYPE_CHECKING:
    from ds_fused.engine.stationary import ZeroShard
    from ds_fused.engine.zero_slabs import ZeroSlabs

MOST_TOKENS = 2**24


class Auto:
    """One head's weight in both forms, until one is chosen."""

    def __init__(
        self, slabs: ZeroSlabs, shard: ZeroShard, chunk_mb: int, keep_mb: int, tell: Callable[[str], None]
    ) -> None:
        """``tell``: is given a line about the choice when it is made."""
        self._slabs, self._shard = slabs, shard
        self._chunk, self._keep = chunk_mb * 2**20, keep_mb * 2**20
        self._tell = tell
        mine = measured(slabs)
        self._rates = Rates(shard.hosts.least(mine.flops), shard.hosts.least(mine.wire))
        self._chosen: ZeroSlabs | ZeroShard | None = None

    def __str__(self) -> str:
        return f'mode "auto": stationary up to {self.turning_point()} tokens a rank, stream above, if memory allows'

    def of(self, n_tokens: int) -> ZeroSlabs | ZeroShard:
        """The form for a loss over so many tokens of this rank."""
        if self._chosen is None:
            most, free = self._shard.most(n_tokens), self._shard.hosts.least(free_bytes())
            ways = self.ways(most)
            way = chosen(ways, free)
            self._chosen = self._slabs if way.mode == "stream" else self._shard
            others = ", ".join(str(other) for other in ways if other is not way)
            self._tell(f'mode "auto" at {most} tokens a rank: {way} rather than {others}')
        return self._chosen

    def ways(self, most: int) -> list[Figures]:
        return [
            of_stream(self._slabs, most, self._chunk, self._keep, self._rates),
            of_stationary(self._shard, most, self._chunk, self._rates),
        ]

    def turning_point(self) -> int:
        """The largest number of tokens a rank for which stationary is chosen where memory is no matter."""
        low, high = 0, MOST_TOKENS
        while low < high:
            middle = (low + high + 1) // 2
            if chosen(self.ways(middle), float("inf")).mode == "stationary":
                low = middle
            else:
                high = middle - 1
        return low


def free_bytes() -> float:
    """Memory of the device that nobody uses, what the allocator has in store included; no limit on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return float("inf")
    in_store = accelerator.memory_reserved() - accelerator.memory_allocated()
    return float(accelerator.available_memory() + in_store)
