"""Gathers and exchanges between the GPUs of one host by their copy engines: what is computed meanwhile loses nothing.

A collective is a kernel by default, and a matrix product shares the multiprocessors out among its programs before it
starts; so each of the two waits for the other's. NCCL's zero-CTA policy (2.28 and later) has copy engines move the data
and the driver's memory operations say when. It does so for all-gather and all-to-all, where what is read and what is
written both lie in windows: memory that every rank has registered, at the same place. Elsewhere it takes a kernel,
without a word; nothing but time depends on it.

Measured on four H100, eight slabs of 132 MiB beside their products (benchmarks/notes.md): a forward 13.9 to 15.1 ms for
15.7 to 16.1, a backward 28.0 for 30.8; without any communication 13.2 and 27.5.

Source: NCCL's user guide, "CTA policy flags" and "Window registration".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor
from torch import distributed as dist

from ds_fused.engine.zero3 import nccl

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# with which NCCL registers no windows, and says nothing
WITHOUT_WINDOWS = {"NCCL_P2P_DISABLE": "1", "NCCL_CUMEM_ENABLE": "0", "NCCL_WIN_ENABLE": "0"}
# Communicators whose owners are gone, with the memory of their windows. Ranks collect their garbage at times of their
# own, and a communicator ends on all of them together: where the next one is made, if no rank uses it any longer
_left: list[ProcessGroup] = []


def boot_id() -> str | None:
    """Of the running kernel, so the same in all containers of a host; None where there is no such file."""
    return BOOT_ID.read_text().strip() if BOOT_ID.exists() else None


class Passed(NamedTuple):
    """A point of the stream beside the current one."""

    event: torch.cuda.Event | None  # a CPU has none

    def wait(self) -> None:
        if self.event is not None:
            torch.cuda.current_stream().wait_event(self.event)


class CopyEngines:
    """All ranks of the job, on one host. Every rank makes it and calls its methods in the same order, but for `leave`.

    It owns a communicator, which either of `end` and `leave` lets go of, and a stream for sums of what has come.
    """

    def __init__(self) -> None:
        _end_left()
        self._device = torch.device(get_accelerator().current_device_name())
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._group: ProcessGroup | None = self._made_group()
        self._windows: list[int | None] = []
        # the first collective makes the communicator, which windows are registered with
        dist.all_reduce(torch.zeros(1, device=self._device), group=self._group)

    def _made_group(self) -> ProcessGroup:
        options = dist.ProcessGroupNCCL.Options()
        options.config.cta_policy = dist.ProcessGroupNCCL.NCCL_CTA_POLICY_ZERO
        options._timeout = timeout = _timeout(self._device)
        return dist.new_group(backend="nccl", timeout=timeout, pg_options=options)

    def end(self) -> None:
        """Windows are memory like any other from here on; nothing happens the second time."""
        group, self._group = self._group, None
        if group is not None:
            # what is on its way in windows lands first
            get_accelerator().synchronize()
            if _is_there(group):
                for window in self._windows:
                    nccl.deregister(nccl.communicator(group, self._device), window)
                dist.destroy_process_group(group)

    def leave(self) -> None:
        """The same, as this rank can do it alone: the communicator ends later."""
        group, self._group = self._group, None
        if group is not None:
            _left.append(group)

    def window(self, n_elements: int, dtype: torch.dtype) -> Tensor:
        """Memory of its own; PyTorch's allocator does not count it."""
        from torch.distributed import _symmetric_memory as symmetric_memory

        # what PyTorch's allocator keeps in store is nobody else's, and in a step it may be all that is left
        get_accelerator().empty_cache()
        window = symmetric_memory.empty(n_elements, dtype=dtype, device=self._device)
        self._windows.append(nccl.register(nccl.communicator(self._group, self._device), window))
        return window

    @contextmanager
    def beside(self) -> Iterator[None]:
        """What is called within comes after all that the current stream has, and beside all that it is given later.

        So is what was called so before. A CPU does one after the other.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The current stream waits for all that has been called beside it."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def passed(self) -> Passed:
        """What has been called beside the current stream so far, to be waited for later."""
        return Passed(None if self._stream is None else self._stream.record_event())

    def gather(self, everyones: Tensor) -> Work:
        """Start to fill a window [W, ...], or its first part, where this rank's part lies in its place already."""
        mine = everyones.view(dist.get_world_size(), -1)[dist.get_rank()]
        return dist.all_gather_into_tensor(everyones.view(-1), mine, group=self._group, async_op=True)

    def exchange(self, received: Tensor, parts: Tensor) -> Work:
        """Start to send each rank its part of a window [W, ...] and to receive its parts of theirs, in another one."""
        return dist.all_to_all_single(received, parts, group=self._group, async_op=True)


def why_no_engines(group: ProcessGroup) -> str | None:
    """Why this rank can't let copy engines move the weights of that group; None when it can. All its ranks ask."""
    ranks = dist.get_world_size(group)
    mine = get_accelerator().current_device()
    told: list = [None] * ranks
    # first of all: a rank that has a reason of its own leaves no other one waiting
    dist.all_gather_object(told, (boot_id(), mine), group=group)
    hosts, gpus = zip(*told, strict=True)
    if get_accelerator().device_name() != "cuda" or torch.version.hip is not None:
        return "they are NCCL's, for NVIDIA's GPUs"
    if not hasattr(getattr(dist, "ProcessGroupNCCL", None), "NCCL_CTA_POLICY_ZERO"):
        return f"PyTorch {torch.__version__} has no zero-CTA policy of NCCL (2.28 and later)"
    if not hasattr(dist.ProcessGroupNCCL, "_comm_ptr") or nccl.library() is None:
        return f"PyTorch {torch.__version__} does not say where its NCCL and its communicators are"
    if ranks == 1:
        return "there is one rank"
    if ranks != dist.get_world_size():
        return f"the weights lie on {ranks} of {dist.get_world_size()} ranks"
    if None in hosts or len(set(hosts)) > 1:
        return "the ranks are on several hosts"
    for name, value in WITHOUT_WINDOWS.items():
        if os.environ.get(name) == value:
            return f"{name}={value} leaves NCCL no windows"
    for gpu in sorted({*gpus} - {mine}):
        # there NCCL registers no windows, and PyTorch reads those that it did not get; a rank may see its own GPU alone
        if gpu < torch.cuda.device_count() and not torch.cuda.can_device_access_peer(mine, gpu):
            return f"GPU {mine} has no access to the memory of GPU {gpu}"
    from torch.distributed import _symmetric_memory as symmetric_memory

    try:
        symmetric_memory.set_backend("NCCL")
    except RuntimeError as error:
        # somebody else has memory by another one
        return f"symmetric memory is not NCCL's: {str(error).splitlines()[0]}"
    return None


def _is_there(group: ProcessGroup) -> bool:
    # all groups end with the one of the whole job
    return dist.is_initialized() and group in dist.distributed_c10d._world.pg_map


def _end_left() -> None:
    """End what all ranks have left, in one order."""
    mine = {group.group_name: group for group in _left if _is_there(group)}
    everyones: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, list(mine))
    for name in everyones[0]:
        if all(name in names for names in everyones):
            dist.destroy_process_group(mine.pop(name))
    _left[:] = mine.values()


def _timeout(device: torch.device) -> timedelta:
    """That of the job's own collectives."""
    return dist.group.WORLD._get_backend(device).options._timeout
