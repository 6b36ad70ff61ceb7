"""The parts of a sum that W ranks have sent, added up where the sum belongs.

Sizes: W ranks, N elements of the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._tiles import wide
from ds_fused.ops._triton import cdiv, runs_kernels

BLOCK = 2048  # not yet measured


# another number of ranks is no other kernel
@triton.jit(do_not_specialize=["n_parts"])
def _sum_parts_kernel(
    parts_ptr,  # [W, N]
    out_ptr,  # [N]
    n,
    n_parts,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < n
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(n_parts):
        total += tl.load(parts_ptr + places, mask=mask, other=0.0).to(tl.float32)
        parts_ptr += n
    if ADDS:
        total += tl.load(out_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total, mask=mask)


def sum_parts(parts: Tensor, out: Tensor, *, adds: bool) -> None:
    """``out = parts.sum(0)``, or ``out +=`` that: parts [W, N] and out [N] contiguous, summed in fp32, rounded once."""
    if not runs_kernels(parts):
        total = parts.sum(0, dtype=wide(parts))
        out.copy_(out + total if adds else total)
        return
    n = out.numel()
    if n:
        launch(_sum_parts_kernel, (cdiv(n, BLOCK),), parts, out, n, len(parts), ADDS=adds, BLOCK=BLOCK)
