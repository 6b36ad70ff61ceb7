"""The last step of a deterministic gradient of a parameter: programs' partial sums, added up in a fixed order.

A backward kernel leaves one row of partial sums per program, for as many as two vectors and a number; one launch adds
them. No atomics: same input, same bits.

Sizes: P programs, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._triton import cdiv

# few columns so that many programs share the work, many rows so that few turns wait for L2. Not yet measured.
SUM_COLS = 32
SUM_ROWS = 256


@triton.jit
def add_to(sums, value, mask, is_first):
    """sums += value. The first row finds nothing there: scratch is written before it is read."""
    before = tl.load(sums, mask=mask & ~is_first, other=0.0)
    tl.store(sums, before + value, mask=mask)


# a batch or a device with another number of programs would compile everything again
@triton.jit(do_not_specialize=["n_programs", "n_numbers"])
def _sum_partials_kernel(
    partial_ptr,  # [2, P, D] fp32, and after it n_numbers parts of the number
    first_ptr,  # [D]
    second_ptr,  # [D]
    number_ptr,  # [1]
    n_programs,
    n_cols,
    n_numbers,
    HAS_FIRST: tl.constexpr, HAS_SECOND: tl.constexpr, HAS_NUMBER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    partial_ptr += part * n_programs * n_cols
    # the number is a vector of one column
    width = tl.where(part == 2, 1, n_cols)
    height = tl.where(part == 2, n_numbers, n_programs)
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


def partials(x: Tensor, programs: int, d: int, numbers: int = 0) -> Tensor:
    """Scratch for the parts of two vectors [D], and for those of a number; beside x."""
    return torch.empty(2 * programs * d + numbers, dtype=torch.float32, device=x.device)


def sum_partials(
    partial: Tensor,
    programs: int,
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
        partial, first, second, number, programs, d, n_numbers,
        HAS_FIRST=first is not None, HAS_SECOND=second is not None, HAS_NUMBER=number is not None, BLOCK_ROWS=SUM_ROWS,
        BLOCK_COLS=SUM_COLS, num_warps=8,
    )  # fmt: skip
