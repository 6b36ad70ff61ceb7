"""Inputs of checkpointed layers wait in the host's memory, from a layer's forward to its repetition.

    y = checkpoint(layer, x)                 # holds x [..., T, H] until the layer's backward, and so does each layer

A stream of its own copies x to pinned memory while the layer computes, and brings it back while the layer behind is
repeated: on the device are two inputs at a time instead of one for each layer. What comes back is x to the last bit.
What is kept of attention (``kept.py``) waits with it. One forward may send all of its layers' inputs and the next none.

T H elements a sequence cross the link to the host once in forward and once in backward, and as many of attention; this
is hidden where a layer computes for longer than it takes. DeepSpeed (``cpu_checkpointing``, ALST: arXiv 2506.13996) and
Unsloth do so with a layer's input, under checkpointing of their own.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map_only

from ds_fused.modules.memory.host_memory import available_bytes

# bytes; to copy less costs more than it frees. Not yet measured
SMALL = 2**16
# bytes: PyTorch rounds pinned memory up to a power of two, so what is copied whole could take twice what it is
PIECE = 2**26
# bytes of the host's memory that are left to others
LEFT = 2**30


class Lane:
    """A stream beside that which computes, for copies between a device and its host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        # a CPU has but one stream, which is none
        self._stream = self._module.Stream() if device.type == "cpu" else self._module.Stream(device)
        # bytes on the host, now and at most
        self._there = self._most = 0

    def room(self, x: Tensor) -> list[Tensor]:
        """Memory of the host for the pieces of x, which the device reads and writes without the host's help."""
        there = self._there + x.nbytes
        # what was pinned once PyTorch keeps for the next who asks, and waits for copies that still use it
        left = available_bytes() if there > self._most else None
        if left is not None and left < x.nbytes + LEFT:
            raise _refusal(x, f"{left / 2**20:.4g} are left, of which {LEFT / 2**20:.4g} are for others")
        try:
            found = [torch.empty(len(piece), dtype=x.dtype, pin_memory=x.device.type != "cpu") for piece in _pieces(x)]
        except RuntimeError as error:
            raise _refusal(x, str(error)) from error
        self._there, self._most = there, max(there, self._most)
        return found

    def free(self, nbytes: int) -> None:
        self._there -= nbytes

    def copy(self, into: Sequence[Tensor], sources: Sequence[Tensor]) -> Any:
        """Copy, behind all that was asked of the device so far; the event that stands for the copies' end."""
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            for target, source in zip(into, sources, strict=True):
                target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Have what is asked of the device from here on wait for it; the host does not."""
        self._module.current_stream(self.device).wait_event(event)

    def hold(self, x: Tensor) -> None:
        """Have the memory of x stay its own until the copies are through, though nobody may have it any more."""
        if isinstance(self._stream, torch.Stream):
            x.record_stream(self._stream)


class OnHost:
    """A tensor and its copy in the host's memory.

    ``unchanged``: tensors of the same memory, each with its version, by which it is known that nobody wrote there.
    """

    def __init__(self, x: Tensor, group: Group, unchanged: Sequence[tuple[Tensor, int]]) -> None:
        self._group, self._lane = group, group.lane(x.device)
        # while it is on the device: itself, without what autograd knows of it
        self._x: Tensor | None = _dense(x.detach())
        self._watched, self._is_spoilt = unchanged, False
        self._was_taken = False
        self._shape, self._strides = self._x.shape, self._x.stride()
        self._host = self._lane.room(self._x)
        self._moved = self._lane.copy(self._host, _pieces(self._x))
        group.members.append(weakref.ref(self))

    @property
    def is_spoilt(self) -> bool:
        """Whether somebody wrote into it before it was let go."""
        return self._is_spoilt or any(x._version != version for x, version in self._watched)

    def let_go(self) -> None:
        """Its memory on the device is free for what is computed from here on."""
        if self._x is not None:
            self._lane.wait(self._moved)
            self._is_spoilt, self._watched, self._x = self.is_spoilt, (), None

    def fetch(self) -> None:
        """Have it on the device, or on the way there, if nobody has had it yet."""
        if self._x is None and not self._was_taken:
            dtype = self._host[0].dtype
            self._x = torch.empty_strided(self._shape, self._strides, dtype=dtype, device=self._lane.device)
            self._moved = self._lane.copy(_pieces(self._x), self._host)

    def take(self) -> Tensor:
        """It, for what is computed from here on. What else its layer left is sent for, and what the one before did."""
        # a second time: in another backward over the same graph
        self._was_taken = False
        self._group.fetch()
        self._lane.wait(self._moved)
        x = self._x
        self._is_spoilt, self._watched, self._x, self._was_taken = self.is_spoilt, (), None, True
        return x

    def __del__(self) -> None:
        if "_host" not in vars(self):
            # there was no room
            return
        self._lane.free(sum(piece.nbytes for piece in self._host))
        if self._x is not None:
            # of a forward without a backward
            self._lane.hold(self._x)


class Group:
    """What one layer left on the host; ``before``: the layer that ran before it, and is repeated after it."""

    def __init__(self, lanes: dict[torch.device, Lane], before: Group | None) -> None:
        self._lanes = lanes
        self._before = None if before is None else weakref.ref(before)
        self.members: list[weakref.ref[OnHost]] = []

    def lane(self, device: torch.device) -> Lane:
        if device not in self._lanes:
            self._lanes[device] = Lane(device)
        return self._lanes[device]

    def saving(self, x: Tensor) -> saved_tensors_hooks:
        """For the checkpoint of the layer, over x: what it saves of x is on the host."""
        # autograd may keep the function for as long as what it returned
        return saved_tensors_hooks(functools.partial(self._send, weakref.ref(x)), _take)

    def _send(self, wanted: weakref.ref[Tensor], x: Tensor) -> Tensor | OnHost:
        return OnHost(x, self, [(x.detach(), x._version)]) if x is wanted() else x

    def sent(self, value: Any, unchanged: Sequence[tuple[Tensor, int]]) -> Any:
        """A tensor, or all in a tuple or list, as what ``taken`` makes it of again."""

        def send(x: Tensor) -> Tensor | OnHost:
            return OnHost(x, self, unchanged) if x.nbytes >= SMALL else x.detach()

        return tree_map_only(Tensor, send, value)

    def let_go(self) -> None:
        self._each(OnHost.let_go)

    def fetch(self) -> None:
        self._each(OnHost.fetch)
        before = self._before and self._before()
        if before is not None:
            before._each(OnHost.fetch)

    def _each(self, do: Callable[[OnHost], None]) -> None:
        for ref in self.members:
            member = ref()
            if member is not None:
                do(member)


class Offload:
    """Of one stack of layers. What the last one left is still on the device when backward begins with it."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane] = {}
        self._newest: weakref.ref[Group] | None = None

    def __reduce__(self) -> tuple:
        # a copy of a model has streams of its own
        return Offload, ()

    def begin(self) -> Group:
        """Of a layer's forward."""
        newest = self._newest and self._newest()
        if newest is not None:
            newest.let_go()
        group = Group(self._lanes, newest)
        self._newest = weakref.ref(group)
        return group


def those_on_host(value: Any) -> Iterable[OnHost]:
    return (x for x in tree_leaves(value) if isinstance(x, OnHost))


def taken(value: Any) -> Any:
    return tree_map_only(OnHost, OnHost.take, value)


def _take(packed: Tensor | OnHost) -> Tensor:
    if not isinstance(packed, OnHost):
        return packed
    x = packed.take()
    if packed.is_spoilt:
        raise RuntimeError(
            f"recompute.offload: the input {tuple(x.shape)} of a checkpointed layer was changed in place after the "
            "layer had begun; its repetition needs it as it was"
        )
    return x


def _refusal(x: Tensor, why: str) -> RuntimeError:
    return RuntimeError(
        f"recompute.offload: no {x.nbytes / 2**20:.4g} MiB more of the host's memory for {tuple(x.shape)} of a "
        f"checkpointed layer: {why}"
    )


def _dense(x: Tensor) -> Tensor:
    """x, or a copy of it where its memory has gaps or overlaps; its strides stay where they can."""
    return x if torch.empty_like(x, device="meta").stride() == x.stride() else x.contiguous()


def _pieces(x: Tensor) -> Sequence[Tensor]:
    """The memory of a dense x, piece by piece."""
    return x.as_strided((x.numel(),), (1,)).split(max(1, PIECE // x.element_size()))
