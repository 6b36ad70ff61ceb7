"""Memory that all ranks of a communicator have registered, by NCCL's own functions.

PyTorch's symmetric memory registers the same in `rendezvous`, for kernels that read it across ranks too. What it makes
for those it ends when the process does, of communicators that are gone by then: a segmentation fault now and then
(2.11; benchmarks/notes.md). Nor does it take a registration back.

Source: NCCL's user guide, "Window registration".
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

# at the same place on every rank: NCCL_WIN_COLL_SYMMETRIC
SYMMETRIC = 1


@cache
def library() -> ctypes.CDLL | None:
    """What PyTorch has loaded; None where that has no windows."""
    with suppress(OSError):
        loaded = ctypes.CDLL("libnccl.so.2", mode=os.RTLD_NOLOAD)
        if hasattr(loaded, "ncclCommWindowRegister"):
            pointer = ctypes.c_void_p
            size, window = ctypes.c_size_t, ctypes.POINTER(pointer)
            loaded.ncclCommWindowRegister.argtypes = [pointer, pointer, size, window, ctypes.c_int]
            loaded.ncclCommWindowDeregister.argtypes = [pointer, pointer]
            loaded.ncclGetErrorString.restype = ctypes.c_char_p
            return loaded
    return None


def communicator(group: ProcessGroup, device: torch.device) -> int:
    """Of a group that has done a collective."""
    return group._get_backend(device)._comm_ptr()


def register(comm: int, memory: Tensor) -> int | None:
    """A window. Every rank of the communicator comes with as much; None: NCCL has no use for windows here."""
    window = ctypes.c_void_p()
    _check(library().ncclCommWindowRegister(comm, memory.data_ptr(), memory.nbytes, window, SYMMETRIC))
    return window.value


def deregister(comm: int, window: int | None) -> None:
    """Every rank does, in the same order."""
    if window is not None:
        _check(library().ncclCommWindowDeregister(comm, window))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"ds_fused: NCCL: {library().ncclGetErrorString(status).decode()}")
