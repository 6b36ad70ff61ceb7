"""What DeepSpeed's flops profiler counts of a fused layer: the products that the layer's forward stands for.

While the profiler runs, each function of PyTorch that multiplies adds its products to those of the module whose call is
running. A fused forward calls such functions for gradients too, or for products that it makes again, and kernels that
the profiler knows nothing of: none of these is what a forward costs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

PROFILER = "deepspeed.profiling.flops_profiler.profiler"
Count = tuple[str, int]  # what was called, and how many


def counted_as(products: int) -> AbstractContextManager[None]:
    """What runs within it counts as so many multiplications, each with its addition, where a profiler counts."""
    # who has not imported it can't be running it; a compiled graph calls nothing that is counted
    profiler = None if torch.compiler.is_compiling() else sys.modules.get(PROFILER)
    # outside all modules' calls it counts nothing
    if profiler is None or not profiler.module_flop_count:
        return nullcontext()
    return _counted((profiler.module_flop_count[-1], 2 * products), (profiler.module_mac_count[-1], products))


@contextmanager
def _counted(*counts: tuple[list[Count], int]) -> Iterator[None]:
    before = [len(found) for found, _ in counts]
    try:
        yield
    finally:
        for (found, count), length in zip(counts, before, strict=True):
            found[length:] = [("linear", count)]
