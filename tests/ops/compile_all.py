"""Compiles every kernel of ds_fused.ops for targets that need not be there, and prints what came out as JSON.

    python tests/ops/compile_all.py cuda:80:32:largest cuda:90:32:all hip:gfx942:64:largest

Needs a process of its own, without TRITON_INTERPRET. The ops are called as users call them, on CPU tensors: launches
are compiled, with the real block sizes, and not run: all of them, or of each kernel the one with the largest tiles (see
CHOICES). A kernel that no example (examples/) reaches is reported under "unreached".
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import ds_fused.ops as ops
import ds_fused.ops.common._triton as shared
from ds_fused.ops.common import _meet
from ds_fused.ops.common._warmup import Absent, copies_tiles_on, in_flight_on
from ds_fused.ops.registry import OPS

# of every op, in the file of its name
EXAMPLES = tuple(import_module(f"examples.{op.name}") for op in OPS)


def kernels(target: GPUTarget) -> set[str]:
    """Every kernel of the package by its rule of names: a jitted function that ends in _kernel, in a file that ends in
    _tma or _held for targets that copy tiles."""
    found = set()
    for info in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        if info.name.endswith(("_tma", "_held")) and not copies_tiles_on(target):
            continue
        module = import_module(info.name)
        # a launcher's file has the kernels of other files by their names
        own = (value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__)
        found |= {value.__name__ for value in own if isinstance(value, JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


class Launch(NamedTuple):
    """``kernel[grid](*args, **constants)``"""

    kernel: JITFunction
    grid: object
    args: tuple[object, ...]
    constants: dict[str, object]

    @property
    def size(self) -> tuple[int, ...]:
        """Of what a program holds at once, comparable between launches of one kernel: sides of tiles, how many tiles
        and stages, and of which dtypes; of two that hold as much, the one with the longer side is the larger."""
        counts = [v for k, v in self.constants.items() if type(v) is int and v > 1 and k != "num_warps"]
        element_bytes = sum(x.element_size() for x in self.args if isinstance(x, Tensor))
        return math.prod(counts) * element_bytes, max(counts, default=1)


def launches_of_all() -> list[Launch]:
    """What the examples launch; nothing is compiled."""
    launches = []
    stock_run = JITFunction.run

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **constants: object) -> None:
        launches.append(Launch(self, grid, args, constants))

    JITFunction.run = run
    try:
        for example in EXAMPLES:
            example.compiled()
    finally:
        JITFunction.run = stock_run
    return launches


def largest(launches: list[Launch], by_dtypes: bool = False) -> list[Launch]:
    """Of each kernel one; of those whose programs can't meet, one that measures and one that writes. With `by_dtypes`
    one for all dtypes that its tensors have together."""
    found: dict[tuple[object, ...], Launch] = {}
    for launch in launches:
        key = launch.kernel, launch.constants.get("MEASURES"), launch.constants.get("WRITES")
        if by_dtypes:
            key += tuple(x.dtype for x in launch.args if isinstance(x, Tensor))
        if key not in found or launch.size > found[key].size:
            found[key] = launch
    return list(found.values())


# what a target's name may end in
CHOICES = {"all": list, "largest": largest, "largest_by_dtypes": partial(largest, by_dtypes=True)}


def spilled_bytes(target: GPUTarget, asm: dict[str, str | bytes], said: str) -> int | None:
    """Registers that went to memory, as the assembler (NVIDIA) or the code object's notes (AMD) tell."""
    if target.backend == "hip":
        found = re.search(r"\.private_segment_fixed_size:\s*(\d+)", asm["amdgcn"])
        return int(found.group(1)) if found else None
    if not said:
        # a kernel that lay in Triton's cache
        arch = f"sm_{target.arch}{'a' if target.arch >= 90 else ''}"
        command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={arch}", "-o", os.devnull, "/dev/stdin"]
        said = subprocess.run(command, input=asm["ptx"], capture_output=True, text=True).stderr
    found = re.search(r"(\d+) bytes spill stores", said)
    return int(found.group(1)) if found else None


def sums_apart(asm: dict[str, str | bytes]) -> int | None:
    """Additions that take a thread's own number unrounded to another's, so that their sums differ (NVIDIA)."""
    if "ptx" not in asm:
        return None
    others = re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)[|,]", asm["ptx"])
    return len(re.findall(rf"fma\.rn\.f32\s[^;]*, (?:{'|'.join(others)});", asm["ptx"])) if others else 0


def compile_all(target: GPUTarget, index: int, choose: Callable[[list[Launch]], list[Launch]]) -> dict[str, object]:
    """The examples' launches for one target, those that are chosen."""
    triton.runtime.driver.set_active(Absent(target, index))
    shared.LANES = target.warp_size
    shared._copies_tiles[torch.device("cpu")] = copies_tiles_on(target)
    shared._in_flight[torch.device("cpu")] = in_flight_on(target)
    _meet.can_meet = lambda x, size: target.backend == "cuda"
    # registers are limited as they are on a GPU
    _meet.DEVICES = ("cpu",) if target.backend == "cuda" else ()
    # as on a GPU, where its kernel says that an id is wrong
    import_module("ds_fused.ops.vocab.embedding").looks_itself = lambda ids: True
    compiled: dict[str, dict[str, object]] = {}
    for launch in choose(launches_of_all()):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = launch.kernel.run(*launch.args, grid=launch.grid, warmup=True, **launch.constants)
        if kernel.hash in compiled:
            continue
        binary = kernel.asm["hsaco" if target.backend == "hip" else "cubin"]
        compiled[kernel.hash] = {
            "kernel": launch.kernel.__name__,
            "bytes": len(binary),
            "warps": kernel.metadata.num_warps,
            "shared": kernel.metadata.shared,
            "spilled": spilled_bytes(target, kernel.asm, said.getvalue()),
            "apart": sums_apart(kernel.asm),
            "constants": {k: v for k, v in launch.constants.items() if isinstance(v, (bool, int, float, str))},
        }
    rows = sorted(compiled.values(), key=lambda row: (row["kernel"], str(row["constants"])))
    return {
        "compiled": rows,
        "unreached": sorted(kernels(target) - {row["kernel"] for row in rows}),
    }


def main(names: list[str]) -> None:
    if triton.knobs.runtime.interpret:
        sys.exit(f"{Path(__file__).name}: TRITON_INTERPRET is set, there is nothing to compile")
    os.environ["TRITON_INTERPRET"] = "1"  # after the kernels were made: only so that ops take CPU tensors to them
    # printed as a kernel is compiled: the assembler need not be asked again
    triton.knobs.nvidia.dump_ptxas_log = True
    results = {}
    for index, name in enumerate(names):
        backend, arch, lanes, choice = name.split(":")
        target = GPUTarget(backend, int(arch) if arch.isdigit() else arch, int(lanes))
        results[name] = compile_all(target, index, CHOICES[choice])
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1:])
