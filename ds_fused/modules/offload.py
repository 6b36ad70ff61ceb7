"""Inputs of checkpointed layers wait in the host's memory, from a layer's forward to its repetition.

    y = checkpoint(layer, x)                 # holds x [..., T, H] until the layer's backward, and so does each layer

A stream of its own copies x to pinned memory while the layer computes, and brings it back while the layer behind is
repeated: on the device are two inputs at a time instead of one for each layer. What comes back is x to the last bit.

T H elements a sequence cross the link to the host once in forward and once in backward, hidden where a layer computes
for longer than that takes. DeepSpeed (``cpu_checkpointing``, ALST: arXiv 2506.13996) and Unsloth do the same with
checkpointing of their own.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Lane:
    """A stream beside that which computes, for copies between a device and its host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        # a CPU has but one stream, which is none
        self._stream = self._module.Stream() if device.type == "cpu" else self._module.Stream(device)

    def copy(self, into: Tensor, source: Tensor) -> Any:
        """Copy, behind all that was asked of the device so far; the event that stands for the copy's end."""
        self._stream.wait_stream(self._module.current_stream(self.device))
        with self._module.stream(self._stream):
            into.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, event: Any) -> None:
        """Have what is asked of the device from here on wait for it; the host does not."""
        self._module.current_stream(self.device).wait_event(event)

    def hold(self, x: Tensor) -> None:
        """Have the memory of x stay its own until the copies are through, though nobody may have it any more."""
        if isinstance(self._stream, torch.Stream):
            x.record_stream(self._stream)


class Waiting:
    """An input, and its copy in the host's memory; ``before``: that of the layer which ran before."""

    def __init__(self, x: Tensor, lane: Lane, before: Waiting | None) -> None:
        self._lane = lane
        self._before = None if before is None else weakref.ref(before)
        # while it is on the device: itself, without what autograd knows of it
        self._x: Tensor | None = x.detach()
        self._version = x._version
        self._host = _on_host(x)
        self._moved = lane.copy(self._host, self._x)

    def let_go(self) -> None:
        """Its memory on the device is free for what is computed from here on."""
        if self._x is not None:
            self._lane.wait(self._moved)
            self._unchanged()

    def fetch(self) -> None:
        """Have it on the device, or on the way there."""
        if self._x is None:
            self._x = torch.empty_like(self._host, device=self._lane.device)
            self._moved = self._lane.copy(self._x, self._host)
            self._version = self._x._version

    def take(self) -> Tensor:
        """It, for what is computed from here on. The one before, which is asked for next, is sent for."""
        self.fetch()
        self._lane.wait(self._moved)
        before = self._before and self._before()
        if before is not None:
            before.fetch()
        return self._unchanged()

    def _unchanged(self) -> Tensor:
        """It, handed over."""
        x, self._x = self._x, None
        if x._version != self._version:
            raise RuntimeError(
                f"recompute.offload: the input {tuple(x.shape)} of a checkpointed layer was changed in place after the "
                "layer had begun; its repetition needs it as it was"
            )
        return x

    def __del__(self) -> None:
        # of a forward without a backward
        if getattr(self, "_x", None) is not None:
            self._lane.hold(self._x)


class Offload:
    """The inputs of one stack of layers. The last layer's is still on the device when backward begins with it."""

    def __init__(self) -> None:
        self._lanes: dict[torch.device, Lane] = {}
        self._newest: weakref.ref[Waiting] | None = None

    def __reduce__(self) -> tuple:
        # a copy of a model has streams of its own
        return Offload, ()

    def around(self, x: Tensor) -> saved_tensors_hooks:
        """For the checkpoint of a layer over x: what it saves of x is on the host."""
        newest = self._newest and self._newest()
        if newest is not None:
            newest.let_go()
        # autograd may keep the function for as long as what it returned
        return saved_tensors_hooks(functools.partial(self._send, weakref.ref(x)), _take)

    def _send(self, wanted: weakref.ref[Tensor], x: Tensor) -> Tensor | Waiting:
        if x is not wanted():
            return x
        lane = self._lanes.get(x.device)
        if lane is None:
            lane = self._lanes[x.device] = Lane(x.device)
        waiting = Waiting(x, lane, self._newest and self._newest())
        self._newest = weakref.ref(waiting)
        return waiting


def _take(packed: Tensor | Waiting) -> Tensor:
    return packed.take() if isinstance(packed, Waiting) else packed


def _on_host(x: Tensor) -> Tensor:
    """Memory for it, which its device reads and writes without the host's help."""
    try:
        # PyTorch keeps pinned memory for the next who asks, and waits for copies that still use it
        return torch.empty_like(x, device="cpu", pin_memory=x.device.type != "cpu")
    except RuntimeError as error:
        raise RuntimeError(
            f"recompute.offload: no {x.nbytes / 2**20:.4g} MiB more of the host's memory for the input "
            f"{tuple(x.shape)} of a checkpointed layer: {error}"
        ) from error
