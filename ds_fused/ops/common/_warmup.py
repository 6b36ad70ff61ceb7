"""Kernels compiled ahead of their first launch: noted on meta tensors, then compiled by processes side by side.

    with noted(target) as launches:
        loss = model(...)  # on meta: nothing is computed
        loss.backward()
    for done in compile_noted(launches, target, processes=8):
        print(done)

What is compiled lands in Triton's cache under the keys that the real launches will have: of a tensor these know the
dtype and whether 16 divides its address (a meta tensor's address is its offset), of a descriptor the dtype and the
tile, of an integer whether it is 1, whether 16 divides it and how wide it is, and the constants.
"""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import re
import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, KernelParam
from triton.tools.tensor_descriptor import TensorDescriptor

from ds_fused.ops.common import _launch, _meet, _triton

META = torch.device("meta")
# of a device that is not here. Grids and scratch depend on it; of what is compiled only whether large teams may meet
MULTIPROCESSORS = 132
# backend -> the class that builds the C function of a kernel, and its module
LAUNCHERS = {
    "cuda": ("triton.backends.nvidia.driver", "CudaLauncher"),
    "hip": ("triton.backends.amd.driver", "HIPLauncher"),
}


class Launch(NamedTuple):
    """``kernel[grid](*args, **constants)``"""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[object, ...]
    constants: Mapping[str, object]


class Done(NamedTuple):
    """One kernel, as one process has compiled it."""

    name: str
    seconds: float
    was_there: bool  # in the cache
    without: str | None  # why its C function could not be built as well


def target_of(name: str) -> GPUTarget:
    """``sm90``, ``gfx942``: the GPU that is compiled for."""
    cuda, hip = re.fullmatch(r"sm_?(\d+)", name), re.fullmatch(r"gfx(\w+)", name)
    if cuda:
        return GPUTarget("cuda", int(cuda[1]), 32)
    if hip:
        # CDNA and GCN have waves of 64, RDNA of 32
        return GPUTarget("hip", name, 64 if hip[1].startswith("9") else 32)
    raise ValueError(f"target is {name!r}; it can be such as sm90 or gfx942")


def copies_tiles_on(target: GPUTarget) -> bool:
    """_triton.copies_tiles, of a GPU that need not be here."""
    return target.backend == "cuda" and target.arch // 10 in _triton.COPIES_TILES


def in_flight_on(target: GPUTarget) -> int:
    """_triton.stages_for's bytes, of a GPU that need not be here."""
    return _triton.in_flight_on(target.arch) if target.backend == "cuda" else _triton.MOST_IN_FLIGHT


def target_here() -> str | None:
    """The name of the current GPU, or None without one."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm{properties.major}{properties.minor}"


@contextlib.contextmanager
def noted(target: GPUTarget) -> Iterator[list[Launch]]:
    """Ops take meta tensors to their kernels, of whose launches one of each sort is noted and none happens.

    Not for a process that launches kernels at the same time.
    """
    launches: dict[tuple[object, ...], Launch] = {}

    def note(kernel: JITFunction, grid: tuple[int, ...], args: tuple[object, ...], constants: dict) -> None:
        sort = (id(kernel), *map(_sort, args, kernel.params), *constants.items())
        launches.setdefault(sort, Launch(kernel, grid, args, constants))

    found: list[Launch] = []
    launches_by = _launch.launch_elsewhere, _launch._current_device
    stock = _triton.KERNEL_DEVICES, _triton.LANES, _meet.DEVICES
    # where there is no driver, as on a login node, to ask for the current device is an error
    _launch.launch_elsewhere, _launch._current_device = note, _launch._nowhere
    _triton.KERNEL_DEVICES, _triton.LANES = ("meta",), target.warp_size
    _meet.DEVICES = ("meta",) if target.backend == "cuda" else ()
    _triton._multiprocessors[META] = MULTIPROCESSORS
    _triton._copies_tiles[META] = copies_tiles_on(target)
    _triton._in_flight[META] = in_flight_on(target)
    try:
        yield found
    finally:
        _launch.launch_elsewhere, _launch._current_device = launches_by
        _triton.KERNEL_DEVICES, _triton.LANES, _meet.DEVICES = stock
        del _triton._multiprocessors[META], _triton._copies_tiles[META], _triton._in_flight[META]
        found += launches.values()


def _sort(arg: object, param: KernelParam) -> object:
    """All that Triton may tell about an argument."""
    if isinstance(arg, Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape
    if type(arg) is int:
        width = -(2**31) <= arg < 2**31
        return width if param.do_not_specialize else (arg == 1, arg % 16 == 0, width)
    return type(arg)


class Absent:
    """A driver for a GPU that need not be here: enough of one to compile for it."""

    def __init__(self, target: GPUTarget, index: int = 0) -> None:
        self.target, self.index = target, index

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.index  # triton keeps compiled kernels per device

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_noted(launches: list[Launch], target: GPUTarget, processes: int) -> Iterator[Done]:
    """Compiles each of them, in any order."""
    if not launches:
        return
    # forked, so that launches need not travel: kernels and meta tensors are there
    with multiprocessing.get_context("fork").Pool(min(processes, len(launches)), _begin, (launches, target)) as pool:
        yield from pool.imap_unordered(_compile, range(len(launches)))


_launches: list[Launch] = []


def _begin(launches: list[Launch], target: GPUTarget) -> None:
    triton.runtime.driver.set_active(Absent(target))
    _launches[:] = launches


def _compile(i: int) -> Done:
    kernel, grid, args, constants = _launches[i]
    began = time.perf_counter()
    hits: list[bool] = []
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: hits.append(cache_hit)
    compiled = kernel.warmup(*args, grid=grid, **constants)
    backend = compiled.metadata.target.backend
    return Done(kernel.__name__, time.perf_counter() - began, all(hits), _without_launcher(compiled, backend))


def _without_launcher(compiled: object, backend: str) -> str | None:
    """Builds the C function too, which asks for the driver's library; why not, where it can't."""
    module, name = LAUNCHERS[backend]
    try:
        getattr(importlib.import_module(module), name)(compiled.src, compiled.metadata)
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    return None
