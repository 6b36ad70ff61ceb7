"""Where the time of a step goes on the GPU: what the profiler recorded, cut into parts that add up to the step.

Every moment belongs to one part. Where several streams work at once it is the first of `PARTS` that is among them, so
communication counts where no kernel computes ("exposed"), and idle is what is left. Kernels are known by their names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

Interval = tuple[float, float]

COMMUNICATION, COPY, OPTIMIZER, IDLE = "communication, exposed", "memory copies", "optimizer", "idle"
# part -> what its kernels' names match; a kernel belongs to the first that does
KERNELS: Mapping[str, str] = {
    COMMUNICATION: r"(?i)nccl",
    # but for ours, whose names begin with a line
    "attention": r"^(?!_[a-z]).*(?i:flash|fmha|sdpa|attention)",
    "GEMM": r"(?i)gemm|nvjet|cutlass|gemv|splitk|cublas|xmma",
    # Triton's: ours, Liger's and Inductor's are functions of Python; torch's own have a namespace
    "fused kernels": r"^(?!.*::)(_?liger|_|triton_)\w*$|^\w+_kernel$",
    COPY: r"(?i)^mem(cpy|set)|direct_copy_kernel|CatArrayBatchedCopy|split_with_sizes_copy|float8_copy|bfloat16_copy",
    "other element-wise": r"",
}
# the first that is at work at a moment has it
PARTS = ("GEMM", "attention", "fused kernels", "other element-wise", OPTIMIZER, COPY, COMMUNICATION, IDLE)
# torch.cuda._sleep: nothing in a step launches it, so that it marks where forward, optimizer and nothing begin
MARK = "spin_kernel"
ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Event:
    """One piece of work on the GPU; microseconds."""

    name: str
    begin: float
    end: float


def recorded(trace: Path) -> list[Event]:
    """What ran on the GPU, out of the profiler's Chrome trace."""
    events = json.loads(trace.read_text(errors="replace"))["traceEvents"]
    return [Event(e["name"], e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ON_GPU]


def part_of(name: str) -> str:
    return next(part for part, pattern in KERNELS.items() if re.search(pattern, name))


def split(events: Sequence[Event]) -> dict[str, float]:
    """Milliseconds of each part between the first mark and the last of three; the middle one begins the optimizer."""
    marks = sorted((e for e in events if MARK in e.name), key=lambda e: e.begin)
    if len(marks) != 3:
        raise ValueError(f"timeline: {len(marks)} kernels named {MARK}, but a step is marked by 3")
    begin, optimizer, end = marks[0].end, marks[1].end, marks[2].begin
    of: dict[str, list[Interval]] = {part: [] for part in PARTS}
    for event in events:
        if MARK in event.name:
            continue
        part = part_of(event.name)
        if event.begin >= optimizer and part not in (COMMUNICATION, COPY):
            part = OPTIMIZER
        of[part].append((max(event.begin, begin), min(event.end, end)))
    of[IDLE].append((begin, end))
    taken: list[Interval] = []
    found = {}
    for part in PARTS:
        both = union([*taken, *of[part]])
        found[part] = (length(both) - length(taken)) / 1e3
        taken = both
    return found


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Disjoint, in order; empty ones are left out."""
    merged: list[Interval] = []
    for begin, end in sorted(i for i in intervals if i[0] < i[1]):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
