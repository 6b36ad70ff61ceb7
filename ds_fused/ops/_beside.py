"""Copies and sums that run beside a matrix product.

cuBLAS's products for Hopper hold each multiprocessor with one program, which ends when the product does. It has 12
warps and 64512 of the 65536 registers, so that one warp with 32 registers a thread still finds room. A kernel of a few
such programs begins at once and takes nothing from the product that could be measured; one of larger programs, as
PyTorch's copies are and NCCL's collectives, waits for the product's end.

Measured on an H200 beside products of 8192 x 4096 x 16896, for a copy of 69 MB (benchmarks/notes.md): 0.13 to 0.37 ms,
where PyTorch's begins 1.4 ms later, and alone takes 0.05.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops import _meet
from ds_fused.ops._launch import launch
from ds_fused.ops._triton import cdiv, multiprocessors, runs_kernels

# two programs a multiprocessor begin at once, four do not
PROGRAMS_PER_MULTIPROCESSOR = 2
REGISTERS = 32
# elements of 16 bits a turn: as many as fit these registers
BLOCK = 1024


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    n_whole = (n // BLOCK) * BLOCK
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n_whole, tl.num_programs(0) * BLOCK):
        tl.store(out_ptr + start + cols, tl.load(x_ptr + start + cols))
    if first == 0:
        mask = n_whole + cols < n
        tl.store(out_ptr + n_whole + cols, tl.load(x_ptr + n_whole + cols, mask=mask), mask=mask)


def in_room(x: Tensor, n: int, block: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid and options of a launch whose programs take turns at n elements, ``block`` at a time."""
    programs = min(cdiv(n, block), PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(x))
    registers = {"maxnreg": REGISTERS} if x.device.type in _meet.DEVICES else {}
    return (programs,), {"BLOCK": block, "num_warps": 1, **registers}


def copy_beside(x: Tensor, out: Tensor) -> None:
    """``out.copy_(x)`` of contiguous tensors of one dtype."""
    if not runs_kernels(x, out):
        # one that is offloaded to the CPU comes by a copy engine
        out.copy_(x, non_blocking=True)
    elif x.numel():
        grid, options = in_room(x, x.numel(), BLOCK)
        launch(_copy_kernel, grid, x, out, x.numel(), **options)
