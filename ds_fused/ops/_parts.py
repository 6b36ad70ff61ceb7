"""The parts of a sum that W ranks have sent, added up where the sum belongs.

Sizes: W ranks, N elements of the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._beside import in_room
from ds_fused.ops._launch import launch
from ds_fused.ops._tiles import wide
from ds_fused.ops._triton import cdiv, runs_kernels

# elements a turn: where they have a GPU to themselves (on an H200 within 4 % of best for one, two and four parts), and
# beside a product
BLOCK, BESIDE_BLOCK = 2048, 256


# another number of ranks is no other kernel
@triton.jit(do_not_specialize=["n_parts"])
def _sum_parts_kernel(
    parts_ptr,  # [W, N]
    out_ptr,  # [N]
    parts_stride,
    n,
    n_parts,
    factor,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        places = start + tl.arange(0, BLOCK)
        mask = places < n
        total = tl.zeros((BLOCK,), tl.float32)
        part_ptr = parts_ptr
        for _ in range(n_parts):
            total += tl.load(part_ptr + places, mask=mask, other=0.0).to(tl.float32)
            part_ptr += parts_stride
        total *= factor
        if ADDS:
            total += tl.load(out_ptr + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + places, total, mask=mask)


def sum_parts(parts: Tensor, out: Tensor, *, adds: bool, factor: float = 1.0, beside: bool = False) -> None:
    """``out = factor * parts.sum(0)``, or ``out +=`` that: in fp32, rounded once. Each part of [W, N] is contiguous.

    ``beside``: by programs that find room beside a matrix product (_beside.py).
    """
    n = out.numel()
    if not runs_kernels(parts):
        total = parts.sum(0, dtype=wide(parts)) * factor
        out.copy_(out + total if adds else total)
    elif n:
        grid, options = in_room(parts, n, BESIDE_BLOCK) if beside else ((cdiv(n, BLOCK),), {"BLOCK": BLOCK})
        launch(_sum_parts_kernel, grid, parts, out, parts.stride(0), n, len(parts), float(factor), ADDS=adds, **options)
