"""The parts of a sum that W ranks have sent, added up where the sum belongs.

Beside a matrix product, too. cuBLAS's products for Hopper hold each multiprocessor with one program, which ends when
the product does; of its registers it leaves 1024, which are enough for one warp of 32 a thread. A kernel of a few such
programs that follows a copy engine's work begins at once, in the middle of a product, and takes nothing from it that
could be measured; one of larger programs, as PyTorch's and NCCL's are, waits for the product's end, and so does one
that follows another kernel (benchmarks/notes.md).

Sizes: W ranks, N elements of the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._meet import at_most
from ds_fused.ops.common._tiles import wide
from ds_fused.ops.common._triton import cdiv, multiprocessors, runs_kernels

# elements a turn: where they have a GPU to themselves (on an H200 within 4 % of best for one, two and four parts), and
# beside a product
BLOCK, BESIDE_BLOCK = 2048, 256
# there two programs a multiprocessor begin at once, four do not
BESIDE_PROGRAMS, BESIDE_REGISTERS = 2, 32


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

    ``beside``: by programs that find room beside a matrix product, if a copy engine's work is what they wait for.
    """
    n = out.numel()
    if not runs_kernels(parts):
        total = parts.sum(0, dtype=wide(parts)) * factor
        out.copy_(out + total if adds else total)
    elif n:
        grid, options = _in_room(parts, n) if beside else ((cdiv(n, BLOCK),), {"BLOCK": BLOCK})
        numbers = parts.stride(0), n, len(parts), float(factor)
        launch(_sum_parts_kernel, grid, parts, out, *numbers, ADDS=adds, **options)


def _in_room(parts: Tensor, n: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of a launch that finds room beside a product."""
    programs = min(cdiv(n, BESIDE_BLOCK), BESIDE_PROGRAMS * multiprocessors(parts))
    return (programs,), {"BLOCK": BESIDE_BLOCK, "num_warps": 1, **at_most(parts, BESIDE_REGISTERS)}
