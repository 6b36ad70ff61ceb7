"""The last step of a deterministic gradient of a parameter: programs' partial sums, added up in a fixed order.

A backward kernel leaves rows of partial sums, for as many as two vectors, and parts of a number; one launch adds them.
A row is one program's. Where several programs share a multiprocessor, and tensors are large, two of them share a row,
which halves the scratch (`sharers`): it begins as zeros, and each adds to it once, by atomics. Which of two is first
does not matter, for 0 + a is a and a + b is b + a, bit for bit; of three it would, so no row has more. So the same
input has the same bits.

Sizes: P rows, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, multiprocessors

# few columns so that many programs share the work, many rows so that few turns wait for L2. Not yet measured.
SUM_COLS = 32
SUM_ROWS = 256
# bytes of x from which on two programs share a row. The zeros are one more launch: for an H100 2 to 5 us of the 130 to
# 200 that a norm's forward and backward take at this size (8192x4096; benchmarks/notes.md), and some for the host,
# whose time counts where tensors are small
SHARED_FROM = 64 * 2**20


@triton.jit
def add_to(sums, value, mask, is_first):
    """sums += value. The first row finds nothing there: scratch is written before it is read."""
    before = tl.load(sums, mask=mask & ~is_first, other=0.0)
    tl.store(sums, before + value, mask=mask)


@triton.jit
def leave(sums, value, mask, n_sharers):
    """What a program has added up, once: it becomes its row of sums, or is added to the row that it shares.

    n_sharers is no constant, so that batches of all sizes have one kernel.
    """
    if n_sharers == 1:
        tl.store(sums, value, mask=mask)
    else:
        # of two numbers, added to zeros, in any order. An NVIDIA GPU takes those below 2^-126 for zero here
        tl.atomic_add(sums, value, mask=mask, sem="relaxed")


# a batch or a device with another number of rows would compile everything again
@triton.jit(do_not_specialize=["n_parts", "n_numbers"])
def _sum_partials_kernel(
    partial_ptr,  # [2, P, D] fp32, and after it n_numbers parts of the number
    first_ptr,  # [D]
    second_ptr,  # [D]
    number_ptr,  # [1]
    n_parts,  # P
    n_cols,
    n_numbers,
    HAS_FIRST: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_NUMBER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    partial_ptr += part * n_parts * n_cols
    # the number is a vector of one column
    width = tl.where(part == 2, 1, n_cols)
    height = tl.where(part == 2, n_numbers, n_parts)
    if not HAS_FIRST:
        height = tl.where(part == 0, 0, height)
    if not HAS_SECOND:
        height = tl.where(part == 1, 0, height)

    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, height, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        total += tl.load(partial_ptr + rows * width + cols, mask=(rows < height) & (cols < width), other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    if HAS_FIRST:
        tl.store(first_ptr + cols, total, mask=(cols < width) & (part == 0))
    if HAS_SECOND:
        tl.store(second_ptr + cols, total, mask=(cols < width) & (part == 1))
    if HAS_NUMBER:
        tl.store(number_ptr + cols, total, mask=(cols < width) & (part == 2))


def sharers(x: Tensor, programs: int) -> int:
    """How many of a launch's programs leave their sums in one row, by `leave`: two or one."""
    if x.numel() * x.itemsize < SHARED_FROM:
        return 1
    return 2 if programs > multiprocessors(x) else 1


def partials(x: Tensor, rows: int, d: int, numbers: int = 0, *, vectors: int = 2, n_sharers: int = 1) -> Tensor:
    """Scratch for the parts of vectors [D], and of a number; beside x. Zeros where programs share rows."""
    make = torch.empty if n_sharers == 1 else torch.zeros
    return make(vectors * rows * d + numbers, dtype=torch.float32, device=x.device)


def sum_partials(
    partial: Tensor,
    rows: int,
    d: int,
    first: Tensor | None,
    second: Tensor | None = None,
    number: Tensor | None = None,
    n_numbers: int = 0,
) -> None:
    """Fills the vectors and the number that are wanted from their parts; the parts of the others are not read."""
    # a grid as deep as the last one that is wanted
    depth = 3 if number is not None else 2 if second is not None else 1
    launch(
        _sum_partials_kernel, (cdiv(d, SUM_COLS), depth),
        partial, first, second, number, rows, d, n_numbers,
        HAS_FIRST=first is not None, HAS_SECOND=second is not None, HAS_NUMBER=number is not None, BLOCK_ROWS=SUM_ROWS,
        BLOCK_COLS=SUM_COLS, num_warps=8,
    )  # fmt: skip
