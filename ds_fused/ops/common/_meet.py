"""Programs of one launch that meet: each leaves in memory what it measured, waits for its team, reads what all left.

So what is too large for one program is read once: each program of its team keeps a part of it in registers until it
writes. Without meeting, one launch measures, and another one reads again and writes.

Who waits must not hold the place of one that it waits for. Teams are made of programs in the order in which they begin:
of those that run some are of teams that are complete, and wait for nobody who has yet to begin, and the others are of
one team, whose next member begins as soon as a place is free. So a device that has room for one team is enough, and
where such launches are under way on several streams, for one of each. That it has, `can_meet` sees to, for devices of
CUDA; on others, and in the interpreter, where a program begins when the one before it has ended, none meet. To number
programs as they begin is Merrill and Garland's idea ("Single-pass Parallel Prefix Scan with Decoupled Look-back",
2016).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from ds_fused.ops.common._triton import multiprocessors

# numbers from one team's count of arrivals to the next one's, in bytes 128: programs that wait ask all the time, and
# would keep those of other teams waiting at the same line of L2. On an H200, ms of softmax's backward of 8192x128256:
# 1.49, with counts side by side 1.58. Device code has it written out
COUNTS_APART = 32

MEASURES_ALONE = {"MEASURES": True, "WRITES": False}


@triton.jit
def team_and_member(arrivals_ptr, size, MEASURES: tl.constexpr, WRITES: tl.constexpr):
    """This program's team of `size` programs, and which of them it is."""
    if MEASURES and WRITES:
        number = tl.atomic_add(arrivals_ptr, 1, sem="relaxed").to(tl.int64)
    else:
        number = tl.program_id(0).to(tl.int64)
        if WRITES:
            # from the end, whose values were read last
            number = tl.num_programs(0) - 1 - number
    return number // size, (number % size).to(tl.int32)


@triton.jit
def meet(arrivals_ptr, team, size):
    """Until all programs of the team are here. What each has stored before, the others see afterwards."""
    arrivals_ptr += 32 * (1 + team)
    tl.debug_barrier()  # all threads have stored
    tl.atomic_add(arrivals_ptr, 1, sem="release")
    while tl.atomic_add(arrivals_ptr, 0, sem="acquire") < size:
        pass


# where programs of a launch run side by side: a GPU's tensors, too, may be the interpreter's
DEVICES = ("cuda",) if torch.version.hip is None and isinstance(meet, JITFunction) else ()


def can_meet(x: Tensor, size: int) -> bool:
    """Whether teams of so many programs may meet on x's device."""
    # a multiprocessor has a place for one program at least; half of them may be taken by others that wait: those of one
    # more such launch of the largest teams (of seven more where a row of 128k columns has 16 parts), or NCCL's
    return x.device.type in DEVICES and 2 * size <= multiprocessors(x)


def passes(x: Tensor, size: int) -> tuple[dict[str, bool], ...]:
    """The launches of a kernel whose teams have so many programs: what each of them does."""
    if can_meet(x, size):
        return ({"MEASURES": True, "WRITES": True},)
    return MEASURES_ALONE, {"MEASURES": False, "WRITES": True}


def at_most(x: Tensor, registers: int) -> dict[str, int]:
    """Of a launch: how many registers a thread may have. An option of NVIDIA's GPUs, which graphs don't know."""
    return {"maxnreg": registers} if x.device.type in DEVICES and not torch.compiler.is_compiling() else {}


def limited(x: Tensor, steps: tuple[dict[str, bool], ...], registers: int | None) -> dict[str, int]:
    """Of a launch in which 16-bit programs wait for each other: a thread has so many registers at most, so that more of
    them are there to wait.
    """
    if registers is None or x.itemsize > 2 or not steps[0]["WRITES"]:
        return {}
    return at_most(x, registers)


def arrivals(x: Tensor, teams: int, steps: tuple[dict[str, bool], ...]) -> Tensor | None:
    """What the programs of one launch meet by: nobody has come yet. None for launches in which none meet."""
    if not steps[0]["WRITES"]:
        return None
    return torch.zeros(COUNTS_APART * (1 + teams), dtype=torch.int32, device=x.device)
