"""Matrix products of groups of rows, each with a matrix of its own: what an expert's rows are multiplied by.

    product_of_rows      y[r] = a[r] @ weight[e].T for the rows r of each expert e
    product_of_experts   dweight[e] = left[rows of e].T @ right[rows of e]

Rows lie in the order of _routes.py, by expert. Sums are fp32 and rounded once, to the dtype of the result. Products of
fp32 are fp32's. There are two ways: many rows are multiplied by _grouped_products_tma.py where the device can, from a
copy of the tokens' in that order; all else here, and the tokens' rows are then gathered by the product that reads them.

Tiles of product_of_rows have rows of one expert, found in a table. They are taken in groups of GROUP, whose programs
share the weight's columns while these are in L2. A program of product_of_experts walks all rows of its expert.

Sizes: N rows, T tokens, E experts, H and I the sides of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common import _triton
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, copies_tiles, power_of_2, row_stride
from ds_fused.ops.mlp import _grouped_products_tma as tma
from ds_fused.ops.mlp._routes import Routes

# rows of a tile: fewer where an expert has few
ROWS, FEW_ROWS = 128, 64
# columns of a tile, and how much of the sum is in flight at a time: on one H100 490 and 624 TFLOP/s of rows, 322 and
# 400 of experts (benchmarks/notes.md). Others are not measured yet
COLS, STEP = 256, 64
NUM_WARPS, STAGES = 8, 3
# of fp32, whose products are made without matrix units, and where loads are of single numbers, for which a larger tile
# has not the registers
SMALL_ROWS, SMALL_COLS, SMALL_STEP = 64, 64, 32
# elements: rows that begin at multiples of it are loaded 16 bytes at a time
ALIGNED = 16
GROUP = 8
# what the matrix units take at least
LEAST = 16
# N H I from which a device that can copies tiles: 1.2 times as fast in all at 2^34.6 and more on one H100. Descriptors
# take the host some time at each launch; where they begin to pay is not measured yet
MANY = 2**31


class Way(NamedTuple):
    """How products of N rows are made."""

    tile_rows: int  # places of a tile of product_of_rows
    copies: bool  # tiles, for which rows have to lie in order


class Tile(NamedTuple):
    """Of one program."""

    rows: int
    cols: int
    step: int  # of the sum
    warps: int
    stages: int


@triton.jit
def _plus_product(total, left, right):
    """total + left @ right, total in fp32."""
    if left.dtype == tl.float32:
        # a step's sum by itself: one number after the other onto the whole loses more than cuBLAS does. An ordinary
        # addition triton makes a start of the product's sum
        return tl.fma(tl.dot(left, right, input_precision="ieee"), 1.0, total)
    return tl.dot(left, right, total)


@triton.jit(do_not_specialize=["n_tiles", "n_chunks"])
def _product_of_rows_kernel(
    a_ptr,  # [N, n_in]; GATHERS: [T, n_in]
    weight_ptr,  # [E, n_out, n_in] by its strides
    y_ptr,  # [N, n_out]
    tokens_ptr,  # [N]
    ends_ptr,  # [E, chunks]
    tile_experts_ptr,  # [tiles]
    tile_rows_ptr,  # [tiles]
    a_stride,  # elements from one row to the next; y has no gaps
    weight_expert_stride,
    weight_out_stride,
    weight_in_stride,
    n_tiles,
    n_experts,
    n_chunks,
    n_out,
    n_in,
    GATHERS: tl.constexpr, EVEN_OUT: tl.constexpr, EVEN_IN: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(n_out, COLS)
    first = pid // (GROUP * blocks) * GROUP
    size = tl.minimum(GROUP, n_tiles - first)
    within = pid - first * blocks
    tile = first + within % size
    expert = tl.load(tile_experts_ptr + tile).to(tl.int64)
    if expert < n_experts:
        row = tl.load(tile_rows_ptr + tile).to(tl.int64)
        end = tl.load(ends_ptr + (expert + 1) * n_chunks - 1)
        rows = row + tl.arange(0, ROWS)
        # those behind the end are read as the last one, and not stored
        rows_read = tl.minimum(rows, end - 1)
        if GATHERS:
            rows_read = tl.load(tokens_ptr + rows_read).to(tl.int64)
        cols = within // size * COLS + tl.arange(0, COLS)
        ins = tl.arange(0, STEP)
        a_ptrs = a_ptr + rows_read[:, None] * a_stride + ins[None, :]
        weight_ptr += expert * weight_expert_stride
        weight_ptrs = weight_ptr + cols[None, :] * weight_out_stride + ins[:, None].to(tl.int64) * weight_in_stride
        y = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, n_in, STEP):
            if EVEN_IN:
                a = tl.load(a_ptrs)
            else:
                a = tl.load(a_ptrs, mask=ins[None, :] < n_in - start, other=0.0)
            if EVEN_IN and EVEN_OUT:
                weight = tl.load(weight_ptrs)
            else:
                inside = (ins[:, None] < n_in - start) & (cols[None, :] < n_out)
                weight = tl.load(weight_ptrs, mask=inside, other=0.0)
            y = _plus_product(y, a, weight)
            a_ptrs += STEP
            weight_ptrs += STEP * weight_in_stride
        y_ptrs = y_ptr + rows[:, None] * n_out + cols[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < end) & (cols[None, :] < n_out))


@triton.jit(do_not_specialize=["n_chunks"])
def _product_of_experts_kernel(
    left_ptr,  # [N, n_left]
    right_ptr,  # [T, n_right]
    dweight_ptr,  # [E, n_left, n_right] by its strides
    tokens_ptr,  # [N]
    ends_ptr,  # [E, chunks]
    left_stride,  # elements from one row to the next
    right_stride,
    dweight_expert_stride,
    dweight_left_stride,
    dweight_right_stride,
    n_chunks,
    n_left,
    n_right,
    ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """ROWS and COLS are of dweight; STEP rows of the expert at a time."""
    pid = tl.program_id(0).to(tl.int64)
    across, down = tl.cdiv(n_right, COLS), tl.cdiv(n_left, ROWS)
    expert = pid // (across * down)
    last = ends_ptr + (expert + 1) * n_chunks - 1
    end = tl.load(last)
    begin = tl.load(last - n_chunks, mask=expert > 0, other=0)
    lefts = pid // across % down * ROWS + tl.arange(0, ROWS)
    rights = pid % across * COLS + tl.arange(0, COLS)
    steps = tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, STEP):
        rows = start + steps
        inside = rows < end
        tokens = tl.load(tokens_ptr + rows, mask=inside, other=0).to(tl.int64)
        left_ptrs = left_ptr + rows.to(tl.int64)[None, :] * left_stride + lefts[:, None]
        left = tl.load(left_ptrs, mask=inside[None, :] & (lefts[:, None] < n_left), other=0.0)
        right_ptrs = right_ptr + tokens[:, None] * right_stride + rights[None, :]
        right = tl.load(right_ptrs, mask=inside[:, None] & (rights[None, :] < n_right), other=0.0)
        total = _plus_product(total, left, right)
    dweight_ptr += expert * dweight_expert_stride
    dweight_ptrs = dweight_ptr + lefts[:, None] * dweight_left_stride + rights[None, :] * dweight_right_stride
    mask = (lefts[:, None] < n_left) & (rights[None, :] < n_right)
    tl.store(dweight_ptrs, total.to(dweight_ptr.dtype.element_ty), mask=mask)


def way_of(n_rows: int, weight: Tensor) -> Way:
    """For N rows that are shared out among weight's experts [E, H, I]."""
    n_experts, h, i = weight.shape
    if _is_small(weight):
        return Way(SMALL_ROWS, False)
    if n_rows <= n_experts * FEW_ROWS:
        return Way(FEW_ROWS, False)
    if copies_tiles(weight) and n_rows * h * i >= MANY:
        return Way(tma.ROWS, True)
    return Way(ROWS, False)


def in_order(x: Tensor, routes: Routes, way: Way) -> Tensor:
    """Rows of tokens [T, D] as products take them: [N, D], or as they are."""
    return tma.in_order(x, routes) if way.copies else x


def product_of_rows(
    a: Tensor, weight: Tensor, routes: Routes, way: Way, *, gathers: bool = False, transposed: bool = False
) -> Tensor:
    """a [N, n_in] or, ``gathers``, [T, n_in] after in_order; weight [E, n_out, n_in], ``transposed`` [E, n_in, n_out].

    [N, n_out].
    """
    if way.copies:
        if torch.compiler.is_compiling():
            return _product_of_rows_node(a, weight, list(routes), transposed)
        for lies, turned in ((weight, transposed), (weight.transpose(1, 2), not transposed)):
            if tma.can_be_copied(lies):
                return tma.product_of_rows_tma(a, lies, routes, transposed=turned)
    n, n_tiles = routes.pairs.shape[0], routes.tile_experts.shape[0]
    if transposed:
        n_experts, n_in, n_out = weight.shape
        expert_stride, in_stride, out_stride = _strides(weight)
    else:
        n_experts, n_out, n_in = weight.shape
        expert_stride, out_stride, in_stride = _strides(weight)
    y = torch.empty((n, n_out), dtype=a.dtype, device=a.device)
    tile = _tile(weight, way.tile_rows, n_out, n_in)
    launch(
        _product_of_rows_kernel, (n_tiles * cdiv(n_out, tile.cols),),
        a, weight, y, routes.tokens, routes.ends, routes.tile_experts, routes.tile_rows,
        row_stride(a), expert_stride, out_stride, in_stride,
        n_tiles, n_experts, routes.ends.shape[1], n_out, n_in,
        GATHERS=gathers and not way.copies, EVEN_OUT=n_out % tile.cols == 0, EVEN_IN=n_in % tile.step == 0,
        GROUP=GROUP, ROWS=way.tile_rows, COLS=tile.cols, STEP=tile.step,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def product_of_experts(
    left: Tensor, right: Tensor, routes: Routes, way: Way, like: Tensor, *, swapped: bool = False
) -> Tensor:
    """left [N, n_left], right [T, n_right] after in_order. [E, n_left, n_right] or, ``swapped``, [E, n_right, n_left],
    as `like` lies in memory."""
    if way.copies:
        if torch.compiler.is_compiling():
            return _product_of_experts_node(left, right, list(routes), like, swapped)
        dweight = torch.empty_like(like)
        if swapped:
            left, right = right, left
        if dweight.stride(2) == 1:
            tma.product_of_experts_tma(left, right, routes, dweight)
        else:
            # so that neighbours are written together
            tma.product_of_experts_tma(right, left, routes, dweight.transpose(1, 2))
        return dweight
    n_left, n_right = left.shape[1], right.shape[1]
    dweight = torch.empty_like(like)
    expert_stride, left_stride, right_stride = _strides(dweight)
    if swapped:
        left_stride, right_stride = right_stride, left_stride
    # steps as of many rows: how many an expert has the device alone knows, and a traced graph then is for any N
    tile = _tile(like, n_left, n_right, STEP, levels=2)
    launch(
        _product_of_experts_kernel, (like.shape[0] * cdiv(n_left, tile.rows) * cdiv(n_right, tile.cols),),
        left, right, dweight, routes.tokens, routes.ends, row_stride(left), row_stride(right),
        expert_stride, left_stride, right_stride, routes.ends.shape[1], n_left, n_right,
        ROWS=tile.rows, COLS=tile.cols, STEP=tile.step, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dweight


# nodes of a graph of torch.compile, which can't say where a descriptor's tiles end
@torch.library.custom_op("ds_fused::product_of_rows", mutates_args=())
def _product_of_rows_node(a: Tensor, weight: Tensor, routes: list[Tensor], transposed: bool) -> Tensor:
    return product_of_rows(a, weight, Routes(*routes), Way(tma.ROWS, True), transposed=transposed)


@_product_of_rows_node.register_fake
def _(a: Tensor, weight: Tensor, routes: list[Tensor], transposed: bool) -> Tensor:
    return a.new_empty(a.shape[0], weight.shape[2 if transposed else 1])


@torch.library.custom_op("ds_fused::product_of_experts", mutates_args=())
def _product_of_experts_node(left: Tensor, right: Tensor, routes: list[Tensor], like: Tensor, swapped: bool) -> Tensor:
    return product_of_experts(left, right, Routes(*routes), Way(tma.ROWS, True), like, swapped=swapped)


@_product_of_experts_node.register_fake
def _(left: Tensor, right: Tensor, routes: list[Tensor], like: Tensor, swapped: bool) -> Tensor:
    return torch.empty_like(like)


def _tile(weight: Tensor, rows: int, n_cols: int, n_steps: int, levels: int = 1) -> Tile:
    """``levels``: of loads in the loop, each of which waits for the one before it."""
    if _is_small(weight):
        most, warps, stages = (SMALL_ROWS, SMALL_COLS, SMALL_STEP), 4, 2
    else:
        most, warps = (ROWS, COLS, STEP), NUM_WARPS
        # two buffers are more than an AMD device has shared memory for
        stages = STAGES if _triton.LANES == 32 else 2
    sides = zip((rows, n_cols, n_steps), most, strict=True)
    rows, cols, step = (max(LEAST, min(power_of_2(size), side)) for size, side in sides)
    # a warp has at least 1024 numbers of a tile; triton gives each level its share of the stages
    return Tile(rows, cols, step, max(1, min(warps, rows * cols // 1024)), levels * (stages - 1) + 1)


def _is_small(weight: Tensor) -> bool:
    _, n_out, n_in = weight.shape
    return weight.dtype == torch.float32 or n_out % ALIGNED > 0 or n_in % ALIGNED > 0


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of three dimensions; see row_stride."""
    if torch.compiler.is_compiling() and weight.is_contiguous():
        return weight.shape[1] * weight.shape[2], weight.shape[2], 1
    return weight.stride()
