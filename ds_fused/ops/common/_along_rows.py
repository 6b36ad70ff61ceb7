"""What softmax and sparsemax share: tensors [N, D] in which every row is worked on alone, whole or in blocks.

Or the rows are those of square matrices [.., D, D], of which a row sees what does not lie above the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from ds_fused.ops.common import _triton
from ds_fused.ops.common._launch import Kept, Ready, launch, launch_ready, lie_alike, ready
from ds_fused.ops.common._meet import arrivals, limited, passes
from ds_fused.ops.common._options import check_whole
from ds_fused.ops.common._row_tiles import tile
from ds_fused.ops.common._triton import cdiv, power_of_2, row_stride, rows_of, warps_for

# A tile is whole rows up to these widths (32 fp32 values of a row in each of 1024 threads). Not measured yet.
WHOLE_ROW_FWD = 32768
WHOLE_ROW_BWD = 16384
# elements of a tile when a row is narrower (as many rows as fit), and of a thread. Not measured yet.
TILE, PER_THREAD = 2048, 16
# of a wider row, elements of a part and of a thread: what counts is how much of all rows a multiprocessor's registers
# hold while parts wait for one another. On an H200, ms of softmax, 8192x128256: forward 1.25, with 32 elements a thread
# 1.39, with parts of 4096 1.26, of 16384 1.32; backward 1.49, with 32 elements a thread 1.54
PART_FWD, PART_PER_THREAD_FWD = 8192, 64
PART_BWD, PART_PER_THREAD_BWD = 8192, 64
# parts of a row whose numbers are read at a time, at most
MERGE_BLOCK = 256

# what lies above the diagonal: it counts like the rest; it doesn't, and is written as 0; or is left as it is, nearly
SEEN, ZERO, LEFT = "seen", "zero", "left"

_launches: Kept[Ready] = Kept()


@triton.jit
def _reach(rows, cols, n_cols):
    """Columns up to the diagonal, and up to 15 more: whether to load is one question for all that a thread may load at
    a time, or it loads them one by one.
    """
    return cols // 16 * 16 <= rows % n_cols


@triton.jit
def load_seen(ptr, rows, cols, stride, n_cols, mask, other, ABOVE: tl.constexpr):
    """Whole rows in fp32; ``other`` where an element doesn't count."""
    if ABOVE == "seen":
        x = tl.load(ptr + rows * stride + cols, mask=mask, other=other).to(tl.float32)
    else:
        x = tl.load(ptr + rows * stride + cols, mask=mask & _reach(rows, cols, n_cols), other=other).to(tl.float32)
        x = tl.where(cols <= rows % n_cols, x, other)
    return x


@triton.jit
def store_seen(ptr, rows, cols, n_cols, mask, value, ABOVE: tl.constexpr):
    """Whole rows without gaps, of which ``value`` is 0 where an element doesn't count."""
    if ABOVE == "left":
        mask = mask & _reach(rows, cols, n_cols)
    tl.store(ptr + rows * n_cols + cols, value, mask=mask)


@triton.jit
def ends_of(row, n_cols, ABOVE: tl.constexpr):
    """Of a wide row: how many columns count, and how many are written."""
    n_seen = n_cols
    n_written = n_cols
    if ABOVE != "seen":
        n_seen = (row % n_cols + 1).to(tl.int32)
        if ABOVE == "left":
            n_written = n_seen
    return n_seen, n_written


@triton.jit
def sum_of(numbers_ptr, n_parts, MERGE: tl.constexpr, MANY: tl.constexpr):
    """Of one number of each part; MANY: parts are more than MERGE. Without that there is no loop, around which a row's
    values would take 20 registers more."""
    other = tl.arange(0, MERGE)
    numbers = tl.load(numbers_ptr + other, mask=other < n_parts, other=0.0)
    if MANY:
        for first in range(MERGE, n_parts, MERGE):
            other = first + tl.arange(0, MERGE)
            numbers += tl.load(numbers_ptr + other, mask=other < n_parts, other=0.0)
    return tl.sum(numbers)


@triton.jit
def peak_and_total(highs_ptr, sums_ptr, n_parts, MERGE: tl.constexpr, MANY: tl.constexpr):
    """Of a row whose parts have left their maxima and sums of exponentials below those; MANY: see sum_of."""
    other = tl.arange(0, MERGE)
    highs = tl.load(highs_ptr + other, mask=other < n_parts, other=-float("inf"))
    sums = tl.load(sums_ptr + other, mask=other < n_parts, other=0.0)
    if MANY:
        for first in range(MERGE, n_parts, MERGE):
            other = first + tl.arange(0, MERGE)
            own = tl.load(highs_ptr + other, mask=other < n_parts, other=-float("inf"))
            higher = tl.maximum(highs, own)
            finite = tl.where(higher == -float("inf"), 0.0, higher)
            sums *= tl.exp(highs - finite)
            sums += tl.load(sums_ptr + other, mask=other < n_parts, other=0.0) * tl.exp(own - finite)
            highs = higher
    peak = tl.max(highs)
    # parts of -inf alone have the sum 0
    return peak, tl.sum(sums * tl.exp(highs - peak))


@triton.jit
def reciprocal(x):
    """Triton's own division is off by two units in the last place, and div_rn takes registers that hold a row."""
    y = 1.0 / x
    return y * (2.0 - x * y)


def along_rows(
    kernel: JITFunction, out: Tensor, *inputs: Tensor, above: str = SEEN, per_thread: int | None = None
) -> Tensor:
    """Fills ``out`` [..., D] by a kernel of whole rows, of which a thread has about so many elements.

    It takes inputs, out, the row stride of the first input (the others have no gaps), N, D and ABOVE.
    """
    first = inputs[0]
    key = None
    if not torch.compiler.is_compiling():
        # a kept launch holds its kernel, so that the id stays its
        key = id(kernel), first.shape, first.stride(), above, per_thread, TILE, PER_THREAD, _triton.LANES
    it = _launches.get(key)
    if it is None:
        rows = rows_of(first)
        n, d = rows.shape  # not out's: dynamo 2.11 can't hold the sizes of what was made of an input
        if n == 0 or d == 0:
            return out
        block = tile(d, TILE, per_thread or PER_THREAD, d)
        it = ready(
            kernel, (cdiv(n, block.rows),), row_stride(rows), n, d,
            ABOVE=above, BLOCK_ROWS=block.rows, BLOCK_COLS=block.cols, num_warps=block.warps,
        )  # fmt: skip
        if lie_alike((first,), (rows,)):
            _launches.keep(key, it)
        first = rows
    launch_ready(it, first, *inputs[1:], out)
    return out


def in_parts(
    kernel: JITFunction,
    n_measures: int,
    part: int,
    per_thread: int,
    out: Tensor,
    *inputs: Tensor,
    above: str = SEEN,
    registers: int | None = None,
) -> Tensor:
    """Fills ``out`` [..., D] by a kernel whose programs share a row (_meet.py): each measures its part of so many
    columns, leaves n_measures numbers, and writes its part by those of all. registers: of a thread, at most.

    It takes inputs, out, the numbers [n_measures, N, P], arrivals, the row stride of the first input (the others have
    no gaps), D, P, ABOVE, what it does, how many parts' numbers it may read at a time, and whether there are more.
    """
    first = rows_of(inputs[0])
    n, d = first.shape
    if n == 0:
        return out
    n_parts = cdiv(d, part)
    merge = min(MERGE_BLOCK, power_of_2(n_parts))
    measures = torch.empty(n_measures * n * n_parts, dtype=torch.float32, device=first.device)
    steps = passes(first, n_parts)
    # a mask for each value takes registers, too
    registers = registers if d % 16 == 0 else None
    arrived = arrivals(first, n, steps)
    for step in steps:
        launch(
            kernel, (n * n_parts,),
            first, *inputs[1:], out, measures, arrived, row_stride(first), d, n_parts,
            ABOVE=above, BLOCK=part, MERGE=merge, MANY=n_parts > merge,
            num_warps=warps_for(part, per_thread), **step, **limited(first, steps, registers),
        )  # fmt: skip
    return out


def along_dim(apply: Callable[..., Tensor], x: Tensor, dim: int, *options: object) -> Tensor:
    """``apply``, which works on the last dimension of tensors as they lie, along another one: over a copy."""
    is_last = dim in (-1, x.ndim - 1)
    if is_last and not torch.compiler.is_compiling():
        return apply(x, *options)
    # flattened here: dynamo 2.11 can't hold the sizes of what was made of an input
    x = x if is_last else x.transpose(dim, -1)
    y = apply(rows_of(x), *options).view(x.shape)
    return y if is_last else y.transpose(dim, -1)


def check_dim(op: str, x: Tensor, dim: int) -> None:
    """A dimension that x has."""
    if x.ndim == 0:
        raise ValueError(f"{op}: x is a number; there must be a dimension to go along")
    check_whole(op, dim=dim)
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{op}: dim is {dim}; x {tuple(x.shape)} has dimensions {-x.ndim} to {x.ndim - 1}")
