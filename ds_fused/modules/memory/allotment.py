"""How much of each layer's forward is kept for its repetition: as much for all, or as memory allows.

The room for what is kept, in a forward over T tokens:

    room = share * (memory this process can have) - held at its start - rise(T)

``rise`` is how far memory rose above what was held at the start, while a forward over T tokens and its backward kept
nothing on the device, up to the repetition of the first layer: the last moment at which something kept could be in the
way. The first forwards are measured so, and later one that is much longer than those (``rise.py``); each has the device
forget its peak of memory. So a longer batch keeps less, and where nothing has room everything is computed again, as
without this. What a layer would keep is counted in what is measured, byte by byte.

Attention comes first, then products, each from the last layer to the first: backward frees the last layer's first,
while gradients add up.

Inputs of layers and attention may wait on the host (``offload.py``), where attention takes no room. Inputs on the
device are part of the rise, so each of the two has a rise of its own. Where the choice is ours, a forward has them on
the device if attention and products of all layers have room beside them. The first forwards are measured so; where
what they needed, in proportion, leaves too little room, a forward sends them to the host, and the first one to do so is
measured again. What that needed and all inputs is the most that one on the device can need. So a host that is not
needed is not touched, and a batch too long for the device is not tried there.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ds_fused.modules.memory.intercept import ATTENTION, MATMUL
from ds_fused.modules.memory.kept import LEVELS, Learnt, Recording, needed_bytes
from ds_fused.modules.memory.rise import Rise

# the first pass makes what stays (workspaces, gradients, states of an optimizer); ZeRO-3 fetches ahead from the second
MEASURED = 3
# of the memory: the rest is for what lies between the allocator's blocks; not yet measured
SHARE = 0.9
# less of it each time that the allocator ran out of memory, or had to give back what it had in store
STEP = 0.05


class Allotment(Protocol):
    # whether inputs and attention of the forward that runs, or ran last, wait on the host, if layers can send them
    on_host: bool

    def recording(self, place: int, learnt: Learnt, x: Tensor) -> Recording:
        """For a forward of the layer at that place, over x [..., H]."""


_SAID = {
    "full": "nothing kept, and what nobody reads is not computed again",
    "attention": "attention kept",
    "matmuls": "attention and products kept",
}
_ON_HOST = "; inputs and attention on the host"


class Fixed:
    """As much for all layers."""

    on_host = True

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

    ``tell``: is given a line when it is first decided what is kept, with inputs here or on the host, and when that
    changes for a reason.
    ``on_host``: whether inputs and attention wait on the host; None: where not everything has room on the device.
    """

    def __init__(
        self, layers: int, keep_bytes: int | None, tell: Callable[[str], None], *, on_host: bool | None = False
    ) -> None:
        self._keep_bytes, self._tell = keep_bytes, tell
        self.on_host, self._chooses = bool(on_host), on_host is None
        self._line = f"kept as memory allows, which the first steps measure{self._where()}"
        if self._chooses:
            self._line += f"{_ON_HOST} where not all has room"
        # of which side something was told
        self._told: set[bool] = set()
        self._is_off = False
        self._to_measure = MEASURED if keep_bytes is None else 1
        self._memory: Memory | None = None
        self._share, self._troubles = SHARE, 0
        # by whether inputs and attention wait on the host
        self._rises = {False: Rise(), True: Rise()}
        # bytes for each token, by layer
        self._attention, self._matmuls = [0.0] * layers, [0.0] * layers
        self._levels = ["full"] * layers
        # of the forward that runs, or ran last
        self._last = layers
        self._first: int | None = None
        self._tokens = self._inputs = self._held = 0
        self._measures = False
        self._counted: dict[int, tuple[Learnt, list[tuple[str, int]]]] = {}
        # how many began since one was measured
        self._since = 0
        # of forwards whose backward is still to come
        self._pending: weakref.WeakSet[Recording] = weakref.WeakSet()

    def __str__(self) -> str:
        return self._line

    def recording(self, place: int, learnt: Learnt, x: Tensor) -> Recording:
        if place <= self._last:
            self._begin(place, x)
        self._last = place
        ended = functools.partial(self._ended, place) if self._measures else None
        made = Recording(learnt, LEVELS[self._levels[place]], counts=self._measures, ended=ended)
        if self._measures:
            self._counted[place] = learnt, made.sizes
        self._pending.add(made)
        return made

    def _begin(self, place: int, x: Tensor) -> None:
        """Of a forward through the layers."""
        self._first, self._tokens, self._inputs = place, x.shape[:-1].numel(), len(self._levels) * x.nbytes
        self._counted.clear()
        if self._is_off:
            return
        if self._memory is None and self._keep_bytes is None:
            self._memory = memory_of(x.device)
        if self._pending:
            # one forward more leaves its inputs, for which nobody looked for room
            self.on_host |= self._chooses
            self._switch_off("a forward began before the backward of another, and room was measured for one")
        elif self._memory is None and self._keep_bytes is None:
            self._switch_off(f"nothing is known of the memory of {x.device.type}; say recompute.keep_mb")
        else:
            self._plan()

    def _plan(self) -> None:
        """The side and the levels of the forward that begins, and whether it is measured."""
        if self._memory is not None:
            self._held = self._memory.held()
            self._look_for_troubles()
        attention, matmuls = ([size * self._tokens for size in sizes] for sizes in (self._attention, self._matmuls))
        if self._chooses and not self._to_measure:
            self.on_host = sum(attention) + sum(matmuls) > self._room(on_host=False)
        self._measures = self._to_measure > 0 or (
            self._keep_bytes is None and not self._rises[self.on_host].covers(self._tokens)
        )
        if self._measures:
            self._since = 0
            # attention that takes no room is no part of what is measured
            self._levels = allot(0, attention, matmuls, attention_waits=self.on_host)
            if self._memory is not None:
                self._memory.forget_peak()
            return
        self._since += 1
        room = max(0.0, self._room(self.on_host))
        self._levels = allot(room, attention, matmuls, attention_waits=self.on_host)
        self._line = self._said(room, attention, matmuls)
        if self.on_host not in self._told:
            self._told.add(self.on_host)
            self._tell(self._line)

    def _ended(self, place: int) -> None:
        """A repetition of that layer; the last one of a backward is the first layer's."""
        # a rank may have an empty batch
        if place != self._first or not self._measures or not self._tokens:
            return
        # once for each forward, also where a graph has two backwards
        self._to_measure, self._first = max(0, self._to_measure - 1), None
        for i, (learnt, sizes) in self._counted.items():
            self._attention[i], self._matmuls[i] = (
                needed_bytes(sizes, learnt, kind) / self._tokens for kind in (ATTENTION, MATMUL)
            )
        # what the first forward makes and keeps is no rise of the others
        if self._memory is not None and self._to_measure < MEASURED - 1:
            self._rises[self.on_host].measured(self._tokens, self._memory.peak() - self._held)

    def _look_for_troubles(self) -> None:
        """Of the forward before, but not of one that was measured or is the first behind it: there the allocator gives
        back what it had in store for others."""
        troubles = self._memory.troubles()
        if troubles > self._troubles and self._since > 1:
            self._share = max(0.0, self._share - STEP)
            self._tell(f"the device ran short of memory; {self._share:.2f} of it is planned with from here on")
        self._troubles = troubles

    def _room(self, on_host: bool) -> float:
        if self._keep_bytes is not None:
            return self._keep_bytes
        rise = self._rises[on_host].of(self._tokens)
        if not on_host and self._rises[True].covers(self._tokens):
            # in proportion to a short one's it may be far too much
            rise = min(rise, self._rises[True].of(self._tokens) + self._inputs)
        return self._share * self._memory.available() - self._held - rise

    def _said(self, room: float, attention: Sequence[float], matmuls: Sequence[float]) -> str:
        of_attention = [size for size, level in zip(attention, self._levels, strict=True) if level != "full"]
        of_matmuls = [size for size, level in zip(matmuls, self._levels, strict=True) if level == "matmuls"]
        counts = f"attention of {_nonzero(of_attention)} and products of {_nonzero(of_matmuls)}"
        kept = sum(of_matmuls) + (0 if self.on_host else sum(of_attention))
        return (
            f"at {self._tokens} tokens {counts} of {len(self._levels)} layers kept, "
            f"{kept / 2**20:.4g} MiB where {room / 2**20:.4g} have room{self._where()}"
        )

    def _where(self) -> str:
        return _ON_HOST if self.on_host else ""

    def _switch_off(self, reason: str) -> None:
        self._is_off, self._measures = True, False
        self._levels = ["full"] * len(self._levels)
        self._line = f"nothing kept: {reason}{self._where()}"
        self._tell(self._line)


def _nonzero(sizes: Sequence[float]) -> int:
    return sum(size > 0 for size in sizes)
