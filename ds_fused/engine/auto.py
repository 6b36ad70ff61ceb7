"""Mode "auto" of a head: stream or stationary, by memory and time as modelled, the same on every rank.

Chosen at the first loss, when the number of tokens is known, and kept from there. Rates are measured when the engine is
made; free memory at the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from deepspeed.accelerator import get_accelerator

from ds_fused.engine.figures import Head, Rates, candidates, chosen, measured, turning_point

if TYPE_CHECKING:
    from ds_fused.engine.stationary import ZeroShard
    from ds_fused.engine.zero_slabs import ZeroSlabs


class Auto:
    """One head's weight in both forms, until one is chosen."""

    def __init__(
        self, slabs: ZeroSlabs, shard: ZeroShard, chunk_mb: int, keep_mb: int, tell: Callable[[str], None]
    ) -> None:
        """``tell``: is given a line about the choice when it is made."""
        self._slabs, self._shard = slabs, shard
        self._chunk, self._keep = chunk_mb * 2**20, keep_mb * 2**20
        self._tell = tell
        self._head = Head(
            shard.shards,
            slabs.slab_rows,
            len(slabs),
            slabs.dtype.itemsize,
            trains=slabs.requires_grad,
            offloaded=shard.is_offloaded,
            copied=slabs.is_copied,
        )
        # by collectives even where copy engines move the slabs: stationary's are, and windows stay
        mine, least = measured(slabs.by_collectives(), shard), shard.hosts.least
        # the slowest of each: of a call the longest
        self._rates = Rates(least(mine.flops), least(mine.memory), least(mine.wire), -least(-mine.call))
        self._chosen: ZeroSlabs | ZeroShard | None = None

    def __str__(self) -> str:
        tokens = turning_point(self._head, self._chunk, self._keep, self._rates)
        return f'mode "auto": stationary up to {tokens} tokens a rank, stream above, if memory allows'

    @property
    def window_bytes(self) -> int:
        return self._slabs.window_bytes

    def close(self) -> None:
        self._slabs.close()

    def of(self, n_tokens: int) -> ZeroSlabs | ZeroShard:
        """The form for a loss over so many tokens of this rank."""
        if self._chosen is None:
            most, free = self._shard.most(n_tokens), self._shard.hosts.least(free_bytes())
            both = candidates(self._head, most, self._chunk, self._keep)
            way = chosen(both, free, self._rates)
            self._chosen = self._slabs if way.mode == "stream" else self._shard
            others = ", ".join(other.line(self._rates) for other in both if other is not way)
            self._tell(f'mode "auto" at {most} tokens a rank: {way.line(self._rates)} rather than {others}')
        return self._chosen


def free_bytes() -> float:
    """Memory of the device that nobody uses, what the allocator has in store included; no limit on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return float("inf")
    in_store = accelerator.memory_reserved() - accelerator.memory_allocated()
    return float(accelerator.available_memory() + in_store)
