"""Products of a bf16 matrix and a narrow one in fp32 that keep the bits of fp32: it is multiplied as three in bf16.

    v = v1 + v2 + v3, each the rounding of what those before it leave: 24 bits
    a v = a v1 + a v2 + a v3                                                        a is in bf16
    u v = [u1, u2, u3, u1, u1, u2] [v1, v1, v1, v2, v3, v2]^T of the nine products those above the last bit

The tensor cores multiply bf16 exactly. Their own sums are cut off, not rounded (an H100's: 2.6e-6 after 1024 terms),
so a step of a few terms is added to what was summed up before by an instruction that rounds. Three or six times the
work is nothing where the other matrix is read from memory, as beside an adapter of rank 16; and fp32 of its own would
have the layer's input and result in fp32, too.

Sizes: M rows, K columns of the wide matrix, C of the narrow one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common import _triton
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, multiprocessors, power_of_2, row_stride, stages_for

# of a product of two such: this one's six columns, and those that they meet
LEFT, RIGHT = False, True
# elements per program that only splits; not measured yet
BLOCK = 1024
# columns of the narrow matrix in a tile, least (a tensor core's) and most
LEAST_COLS, MOST_COLS = 16, 64
# rows of the wide one in a tile, where its columns are summed up; its columns, where its rows are; elements of a tile
# of the narrow one. On an H100, us of 8192x14336 by 16 columns: along columns 119, with 32 rows 213; along rows 103,
# with steps of 64 rows, not 128, 115
ROWS, COLS, SMALL = 64, 128, 2048
STAGES = 4
NUM_WARPS = 4


@triton.jit
def _three_of(v):
    """fp32 -> what adds up to it, in bf16."""
    first = v.to(tl.bfloat16)
    rest = v - first.to(tl.float32)
    # of infinity or NaN nothing is left, not NaN: what it is multiplied by stays what it is
    rest = tl.where(rest == rest, rest, 0.0)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def _store_six(out_ptr, n_cols, first, second, third, mask, RIGHT: tl.constexpr):
    tl.store(out_ptr, first, mask=mask)
    tl.store(out_ptr + n_cols, first if RIGHT else second, mask=mask)
    tl.store(out_ptr + 2 * n_cols, first if RIGHT else third, mask=mask)
    tl.store(out_ptr + 3 * n_cols, second if RIGHT else first, mask=mask)
    tl.store(out_ptr + 4 * n_cols, third if RIGHT else first, mask=mask)
    tl.store(out_ptr + 5 * n_cols, second, mask=mask)


# kernels for an adapter of any size: its own numbers are few, and need not be read in vectors
@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _pieces_kernel(
    v_ptr,  # [M, C] fp32
    pieces_ptr,  # [M, 6, C] bf16
    n_rows, n_cols,
    RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = at // n_cols, at % n_cols
    mask = row < n_rows
    first, second, third = _three_of(tl.load(v_ptr + at, mask=mask, other=0.0))
    _store_six(pieces_ptr + row * (6 * n_cols) + col, n_cols, first, second, third, mask, RIGHT)


@triton.jit(do_not_specialize=["n_rows"])
def _times_narrow_kernel(
    rows_ptr,  # [M, K] bf16
    narrow_ptr,  # [K, C] fp32
    pieces_ptr,  # [M, 6, C] bf16
    rows_stride,
    narrow_stride_k, narrow_stride_c,
    n_rows, n_inner, n_cols,
    scale,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    inner = tl.arange(0, BLOCK_INNER)
    rows_ptr += rows[:, None] * rows_stride
    narrow_ptr += cols[None, :] * narrow_stride_c
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in tl.range(0, n_inner, BLOCK_INNER, num_stages=STAGES):
        k = start + inner
        mask = (rows < n_rows)[:, None] & (k < n_inner)[None, :]
        a = tl.load(rows_ptr + k[None, :], mask=mask, other=0.0)
        mask = (k < n_inner)[:, None] & (cols < n_cols)[None, :]
        v = tl.load(narrow_ptr + k[:, None].to(tl.int64) * narrow_stride_k, mask=mask, other=0.0)
        first, second, third = _three_of(v)
        part = tl.dot(a, first, tl.dot(a, second, tl.dot(a, third)))
        # a sum of both by the compiler would be the tensor cores' own
        total = tl.fma(part, scale, total)
    first, second, third = _three_of(total)
    mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
    _store_six(
        pieces_ptr + rows[:, None] * (6 * n_cols) + cols[None, :], n_cols, first, second, third, mask, RIGHT=False
    )


@triton.jit(do_not_specialize=["n_rows"])
def _narrow_times_kernel(
    pieces_ptr,  # [M, 6, C] bf16
    rows_ptr,  # [M, K] bf16
    out_ptr,  # [S, C, K] fp32, or [S, K, C]: a sum of each share of the rows
    rows_stride,
    out_stride_c, out_stride_k,
    n_rows, n_inner, n_cols,
    share,  # of the rows, a multiple of BLOCK_ROWS
    one,
    BLOCK_ROWS: tl.constexpr, BLOCK_INNER: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    one = tl.cast(one, tl.float32)
    k = tl.program_id(0) * BLOCK_INNER + tl.arange(0, BLOCK_INNER)
    cols = tl.program_id(1) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    begin = tl.program_id(2).to(tl.int64) * share
    total = tl.zeros((BLOCK_COLS, BLOCK_INNER), tl.float32)
    for start in tl.range(0, share, BLOCK_ROWS, num_stages=STAGES):
        row = begin + start + tl.arange(0, BLOCK_ROWS)
        mask = (row < n_rows)[:, None] & (k < n_inner)[None, :]
        a = tl.load(rows_ptr + row[:, None] * rows_stride + k[None, :], mask=mask, other=0.0)
        mask = (row < n_rows)[:, None] & (cols < n_cols)[None, :]
        narrow_ptr = pieces_ptr + row[:, None] * (6 * n_cols) + cols[None, :]
        first = tl.load(narrow_ptr, mask=mask, other=0.0)
        second = tl.load(narrow_ptr + n_cols, mask=mask, other=0.0)
        third = tl.load(narrow_ptr + 2 * n_cols, mask=mask, other=0.0)
        part = tl.dot(tl.trans(third), a)
        part = tl.dot(tl.trans(first), a, tl.dot(tl.trans(second), a, part))
        # a sum of both by the compiler would be the tensor cores' own
        total = tl.fma(part, one, total)
    out_ptr += tl.program_id(2).to(tl.int64) * n_inner * n_cols
    out_ptr += cols[:, None].to(tl.int64) * out_stride_c + k[None, :].to(tl.int64) * out_stride_k
    tl.store(out_ptr, total, mask=(cols < n_cols)[:, None] & (k < n_inner)[None, :])


def pieces(v: Tensor, side: bool) -> Tensor:
    """[M, C] fp32 -> [M, 6 * C] bf16."""
    v = v.contiguous()
    n_rows, n_cols = v.shape
    out = v.new_empty(n_rows, 6 * n_cols, dtype=torch.bfloat16)
    if out.numel():
        launch(
            _pieces_kernel, (cdiv(n_rows * n_cols, BLOCK),), v, out, n_rows, n_cols,
            RIGHT=side, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def pieces_of_rows(v: Tensor, side: bool) -> Tensor:
    """[M, C] fp32 -> [6 * M, C] bf16."""
    return pieces(v.contiguous().view(1, -1), side).view(6 * v.shape[0], v.shape[1])


def added(six: Tensor) -> Tensor:
    """[M, 6 * C] of the left -> [M, C] fp32."""
    return six.unflatten(1, (6, -1))[:, :3].float().sum(1)


def times_narrow(rows: Tensor, narrow: Tensor, scale: float) -> Tensor:
    """``scale * rows @ narrow``, [M, K] bf16 and [K, C] fp32, as it is multiplied again: [M, 6 * C], of the left."""
    (n_rows, n_inner), n_cols = rows.shape, narrow.shape[1]
    out = rows.new_empty(n_rows, 6 * n_cols)
    if out.numel():
        block = _cols(n_cols)
        per_tile = SMALL // block
        launch(
            _times_narrow_kernel, (cdiv(n_rows, ROWS), cdiv(n_cols, block)),
            rows, narrow, out, row_stride(rows), *narrow.stride(), n_rows, n_inner, n_cols, float(scale),
            BLOCK_ROWS=ROWS, BLOCK_INNER=per_tile, BLOCK_COLS=block,
            STAGES=_stages(rows, per_tile * (2 * ROWS + 4 * block)), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def narrow_times(six: Tensor, rows: Tensor, *, turned: bool = False) -> Tensor:
    """The transpose of [M, 6 * C], of the left, by [M, K] bf16 -> [C, K] fp32; ``turned``: [K, C]."""
    (n_rows, n_inner), n_cols = rows.shape, six.shape[1] // 6
    block = _cols(n_cols)
    tiles = cdiv(n_inner, COLS), cdiv(n_cols, block)
    # as many shares as there are multiprocessors for, twice
    step = SMALL // block
    steps = max(1, cdiv(n_rows, step))
    share = cdiv(steps, max(1, min(steps, 2 * multiprocessors(rows) // max(1, tiles[0] * tiles[1]))))
    shares = cdiv(steps, share)
    out = rows.new_empty(shares, *((n_inner, n_cols) if turned else (n_cols, n_inner)), dtype=torch.float32)
    if out.numel():
        launch(
            _narrow_times_kernel, (*tiles, shares),
            six, rows, out, row_stride(rows), *((1, n_cols) if turned else (n_inner, 1)), n_rows, n_inner, n_cols,
            share * step, 1.0,
            BLOCK_ROWS=step, BLOCK_INNER=COLS, BLOCK_COLS=block,
            STAGES=_stages(rows, 2 * step * (COLS + 3 * block)), num_warps=NUM_WARPS,
        )  # fmt: skip
    return out[0] if shares == 1 else out.sum(0)


def _stages(x: Tensor, tile_bytes: int) -> int:
    # AMD's have 64 KiB of shared memory
    return stages_for(x, STAGES if _triton.LANES == 32 else 2, tile_bytes)


def _cols(n_cols: int) -> int:
    return max(LEAST_COLS, min(MOST_COLS, power_of_2(n_cols)))
