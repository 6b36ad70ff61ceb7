"""Of the forms in which a head's weight may come, the one for its losses: as asked for, or in mode "auto" the best.

"auto" goes by memory and time as modelled (figures.py), the same on every rank. It chooses at the first loss, when the
number of tokens is known, and stays with that. Rates are measured when the engine is made; free memory at the choice.
What was chosen and what was asked for is told with its figures alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from ds_fused.engine.zero3.figures import Figures, HeadCosts, Rates, candidates, chosen, turning_point
from ds_fused.engine.zero3.rates import measured

if TYPE_CHECKING:
    from ds_fused.engine.zero3.slabs import ZeroSlabs
    from ds_fused.engine.zero3.stationary import ZeroShard

AUTO, GATHER = "auto", "gather"


class Choice:
    """One head's weight in all forms, until one is chosen."""

    def __init__(
        self,
        mode: str,
        slabs: ZeroSlabs,
        shard: ZeroShard,
        options: Mapping[str, object],  # of linear_cross_entropy, all of them
        reuse: int,
        tell: Callable[[str], None],
    ) -> None:
        """``reuse``: elements, DeepSpeed's stage3_max_reuse_distance. ``tell``: is given a line at the first loss."""
        self._mode = None if mode == AUTO else mode
        self._slabs, self._shard = slabs, shard
        self._tell: Callable[[str], None] | None = tell
        # gradients of a whole weight are made in the forward, see ops/vocab/linear_cross_entropy.py
        in_forward = bool(options["grad_in_forward"]) and slabs.dtype != torch.float16
        self._options = (options["chunk_mb"] * 2**20, options["keep_mb"] * 2**20, in_forward)
        self._head = HeadCosts(
            shard.shards,
            tuple(slabs.span(k).stop - slabs.span(k).start for k in range(len(slabs))),
            slabs.dtype.itemsize,
            trains=slabs.requires_grad,
            offloaded=shard.is_offloaded,
            copied=slabs.is_copied,
            tokens_copied=shard.carrier is not None,
            reuse=reuse,
        )
        # by collectives even where copy engines move the slabs: windows stay
        mine, least = measured(slabs.by_collectives(), shard), shard.hosts.least
        # the slowest of each: of a call the longest
        self._rates = Rates(least(mine.flops), least(mine.memory), least(mine.wire), -least(-mine.call))

    def __str__(self) -> str:
        if self._mode is None:
            tokens = turning_point(self._ways, self._rates)
            above = chosen(self._ways(tokens + 1), float("inf"), self._rates).mode
            return f'mode "auto": stationary up to {tokens} tokens a rank, {above} above, if memory allows'
        forms = {"stream": self._slabs, "stationary": self._shard, GATHER: "its weight is gathered whole"}
        return str(forms[self._mode])

    @property
    def is_sharded(self) -> bool:
        """Whether the weight is never whole, as far as is known."""
        return self._mode != GATHER

    @property
    def param(self) -> nn.Parameter:
        return self._slabs.param

    @property
    def is_whole(self) -> bool:
        """Whether the weight is here and no gradient is wanted, so that nothing has to travel."""
        return self._slabs.whole is not None

    @property
    def window_bytes(self) -> int:
        return self._slabs.window_bytes + self._shard.window_bytes

    def close(self) -> None:
        self._slabs.close()
        self._shard.close()

    def of(self, n_tokens: int, inside: bool) -> ZeroSlabs | ZeroShard | None:
        """The form for a loss over so many tokens of this rank; None: the head's own call has it whole.

        ``inside``: a forward of the model is running, in which hooks gather what a call needs.
        """
        if self._tell is not None:
            tell, self._tell = self._tell, None
            tell(self._chosen(n_tokens, inside))
        return {"stream": self._slabs, "stationary": self._shard, GATHER: None}[self._mode]

    def _chosen(self, n_tokens: int, inside: bool) -> str:
        """A line about the mode, which from then on is known."""
        if self._mode is not None:
            # ranks are not asked: what they exchange in the modes that are asked for is known without
            (way,) = (way for way in self._ways(n_tokens) if way.mode == self._mode)
            return f'mode "{self._mode}" at {n_tokens} tokens of this rank: {way.line(self._rates)}'
        most, free = self._shard.most(n_tokens), self._shard.hosts.least(free_bytes())
        ways = [way for way in self._ways(most) if inside or way.mode != GATHER]
        way = chosen(ways, free, self._rates)
        self._mode = way.mode
        others = ", ".join(other.line(self._rates) for other in ways if other is not way)
        return f'mode "auto" at {most} tokens a rank: {way.line(self._rates)} rather than {others}'

    def _ways(self, n_tokens: int) -> list[Figures]:
        return candidates(self._head, n_tokens, *self._options)


def free_bytes() -> float:
    """Memory of the device that nobody uses, what the allocator has in store included; no limit on a CPU."""
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        return float("inf")
    in_store = accelerator.memory_reserved() - accelerator.memory_allocated()
    return float(accelerator.available_memory() + in_store)
