"""How much of each layer's forward is kept for its repetition: as much for all, or as memory allows.

The room for what is kept, in a forward over T tokens:

    room = share * (memory this process can have) - held at its start - rise(T)

``rise`` is how far memory rose above what was held at the start, while a forward over T tokens and its backward kept
nothing, up to the repetition of the first layer: the last moment at which something kept could be in the way. The first
forwards are measured so, and later one that is much longer than those; each has the device forget its peak of memory.
Between two lengths the rise lies on the line between theirs or below it, as it is the largest of some that grow evenly;
beyond the longest it is taken to be in proportion. So a longer batch keeps less, and where nothing has room everything
is computed again, as without this. What a layer would keep is counted in what is measured, byte by byte.

Attention comes first, then products, each from the last layer to the first: backward frees the last layer's first,
while gradients add up.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_fused.modules.exchange import ATTENTION, MATMUL
from ds_fused.modules.kept import LEVELS, Learnt, Recording, needed_bytes

# the first pass makes what stays (workspaces, gradients, states of an optimizer); ZeRO-3 fetches ahead from the second
MEASURED = 3
# a forward that is so many times as long as all that were measured is measured itself
LONGER = 1.2
# of the memory: the rest is for what lies between the allocator's blocks; not yet measured
SHARE = 0.9
# less of it each time that the allocator ran out of memory, or had to give back what it had in store
STEP = 0.05


class Allotment(Protocol):
    def recording(self, place: int, learnt: Learnt, x: Tensor) -> Recording:
        """For a forward of the layer at that place, over x [..., H]."""


_SAID = {
    "full": "nothing kept, and what nobody reads is not computed again",
    "attention": "attention kept",
    "matmuls": "attention and products kept",
}


class Fixed:
    """As much for all layers."""

    def __init__(self, level: str) -> None:
        self._level = level

    def __str__(self) -> str:
        return _SAID[self._level]

    def recording(self, place: int, learnt: Learnt, x: Tensor) -> Recording:
        return Recording(learnt, LEVELS[self._level])


def allot(
    room: float, attention: Sequence[float], matmuls: Sequence[float], *, attention_waits: bool = False
) -> list[str]:
    """The level of each layer: what fits into that many bytes, given the bytes of each layer; 0: nothing is known.

    ``attention_waits``: elsewhere, so it takes no room.
    """
    levels = ["full"] * len(attention)
    taking = [0.0] * len(attention) if attention_waits else attention
    for level, sizes, before in (("attention", taking, "full"), ("matmuls", matmuls, "attention")):
        for i in reversed(range(len(levels))):
            # a layer without attention has the level all the same
            if levels[i] == before and sizes[i] <= room and attention[i] + matmuls[i] > 0:
                levels[i] = level
                room -= sizes[i]
    return levels


class Memory:
    """What a device tells of its memory, in bytes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)

    def held(self) -> int:
        return self._module.memory_allocated(self._device)

    def peak(self) -> int:
        return self._module.max_memory_allocated(self._device)

    def forget_peak(self) -> None:
        self._module.reset_peak_memory_stats(self._device)

    def available(self) -> int:
        """All that this process could have, what it has included."""
        return self._module.mem_get_info(self._device)[0] + self._module.memory_reserved(self._device)

    def troubles(self) -> int:
        """How often the allocator ran short."""
        stats = self._module.memory_stats(self._device)
        return stats.get("num_ooms", 0) + stats.get("num_alloc_retries", 0)


def memory_of(device: torch.device) -> Memory | None:
    return Memory(device) if hasattr(torch.get_device_module(device), "mem_get_info") else None


class Auto:
    """By what memory allows: ``keep_bytes`` if given, else as the text above says.

    ``tell``: is given a line when it is decided what is kept, and when that changes for a reason.
    ``attention_waits``: on the host.
    """

    def __init__(
        self, layers: int, keep_bytes: int | None, tell: Callable[[str], None], *, attention_waits: bool = False
    ) -> None:
        self._keep_bytes, self._tell, self._attention_waits = keep_bytes, tell, attention_waits
        self._line = "kept as memory allows, which the first steps measure"
        self._is_off = False
        self._to_measure = MEASURED if keep_bytes is None else 1
        self._memory: Memory | None = None
        self._share, self._troubles = SHARE, 0
        # tokens -> bytes
        self._rises: dict[int, int] = {}
        # bytes for each token, by layer
        self._attention, self._matmuls = [0.0] * layers, [0.0] * layers
        self._levels = ["full"] * layers
        # of the forward that runs, or ran last
        self._last = layers
        self._first: int | None = None
        self._tokens = self._held = 0
        self._counted: dict[int, tuple[Learnt, list[tuple[str, int]]]] = {}
        # of forwards whose backward is still to come
        self._pending: weakref.WeakSet[Recording] = weakref.WeakSet()

    def __str__(self) -> str:
        return self._line

    def recording(self, place: int, learnt: Learnt, x: Tensor) -> Recording:
        if place <= self._last:
            self._begin(place, x.shape[:-1].numel(), x.device)
        self._last = place
        measures = self._to_measure > 0 and not self._is_off
        ended = functools.partial(self._ended, place) if measures else None
        made = Recording(learnt, LEVELS[self._levels[place]], counts=measures, ended=ended)
        if measures:
            self._counted[place] = learnt, made.sizes
        self._pending.add(made)
        return made

    def _begin(self, place: int, tokens: int, device: torch.device) -> None:
        """Of a forward through the layers."""
        self._first, self._tokens = place, tokens
        self._counted.clear()
        if self._is_off:
            return
        if self._pending:
            self._switch_off("a forward began before the backward of another, and room was measured for one")
            return
        if self._keep_bytes is None:
            if self._memory is None:
                self._memory = memory_of(device)
            if self._memory is None:
                self._switch_off(f"nothing is known of the memory of {device.type}; say recompute.keep_mb")
                return
            self._held = self._memory.held()
            if not self._to_measure and tokens > LONGER * max(self._rises):
                self._to_measure, self._levels = 1, ["full"] * len(self._levels)
        if self._to_measure:
            if self._memory is not None:
                self._memory.forget_peak()
                self._troubles = self._memory.troubles()
            return
        room = self._room()
        attention, matmuls = ([size * tokens for size in sizes] for sizes in (self._attention, self._matmuls))
        self._levels = allot(room, attention, matmuls, attention_waits=self._attention_waits)
        line = self._said(room, attention, matmuls)
        if self._line != line:
            is_first, self._line = not self._line.startswith("at "), line
            if is_first:
                self._tell(line)

    def _ended(self, place: int) -> None:
        """A repetition of that layer; the last one of a backward is the first layer's."""
        # a rank may have an empty batch
        if place != self._first or not self._to_measure or not self._tokens:
            return
        # once for each forward, also where a graph has two backwards
        self._to_measure, self._first = self._to_measure - 1, None
        for i, (learnt, sizes) in self._counted.items():
            self._attention[i], self._matmuls[i] = (
                needed_bytes(sizes, learnt, kind) / self._tokens for kind in (ATTENTION, MATMUL)
            )
        # what the first forward makes and keeps is no rise of the others
        if self._memory is not None and self._to_measure < MEASURED - 1:
            rise = self._memory.peak() - self._held
            self._rises[self._tokens] = max(rise, self._rises.get(self._tokens, 0))

    def _room(self) -> float:
        if self._keep_bytes is not None:
            return self._keep_bytes
        troubles = self._memory.troubles()
        if troubles > self._troubles:
            self._troubles = troubles
            self._share = max(0.0, self._share - STEP)
            self._tell(f"the device ran short of memory; {self._share:.2f} of it is planned with from here on")
        return self._share * self._memory.available() - self._held - self._rise(self._tokens)

    def _rise(self, tokens: int) -> float:
        longer = min((known for known in self._rises if known >= tokens), default=None)
        shorter = max((known for known in self._rises if known < tokens), default=None)
        if longer is None:
            return self._rises[shorter] * tokens / shorter
        if shorter is None:
            return self._rises[longer]
        share = (tokens - shorter) / (longer - shorter)
        return self._rises[shorter] + share * (self._rises[longer] - self._rises[shorter])

    def _said(self, room: float, attention: Sequence[float], matmuls: Sequence[float]) -> str:
        of_attention = [size for size, level in zip(attention, self._levels, strict=True) if level != "full"]
        of_matmuls = [size for size, level in zip(matmuls, self._levels, strict=True) if level == "matmuls"]
        counts = f"attention of {_nonzero(of_attention)} and products of {_nonzero(of_matmuls)}"
        kept = sum(of_matmuls) + (0 if self._attention_waits else sum(of_attention))
        return (
            f"at {self._tokens} tokens {counts} of {len(self._levels)} layers kept, "
            f"{kept / 2**20:.4g} MiB where {max(0, room) / 2**20:.4g} have room"
        )

    def _switch_off(self, reason: str) -> None:
        self._is_off = True
        self._levels = ["full"] * len(self._levels)
        self._line = f"nothing kept: {reason}"
        self._tell(self._line)


def _nonzero(sizes: Sequence[float]) -> int:
    return sum(size > 0 for size in sizes)
