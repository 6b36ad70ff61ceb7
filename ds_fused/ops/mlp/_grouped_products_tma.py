"""_grouped_products.py for many rows on a GPU that copies tiles by descriptors (TMA: NVIDIA's, from sm90 on).

    product_of_rows_tma      y[r] = a[r] @ weight[e].T for the rows r of each expert e
    product_of_experts_tma   dweight[e] = left[rows of e].T @ right[rows of e]
    in_order                 rows of tokens in the order of places

A copy of a tile takes one thread and no registers, but rows that follow each other: those of tokens are brought into
order before. As many programs as multiprocessors walk over the tiles, and the loads of a program's next tile are under
way while it writes one.

Rows of an expert end anywhere. Beyond them product_of_rows_tma computes what it doesn't store, and
product_of_experts_tma reads zeros, as where a tensor ends (tiles_that_end).

A graph of torch.compile has each product as one node.

Sizes: N rows, T tokens, E experts, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ds_fused.ops.common import _launch
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import TRITON, cdiv, multiprocessors, power_of_2, row_stride, warps_for
from ds_fused.ops.mlp._routes import Routes

# on one H100 the best for 512 and 1024 rows an expert, of tiles of 128 x 256, 256 x 128 and, two programs to a
# multiprocessor, 128 x 128; steps of 32 and 64; 3 and 4 stages; groups of 4, 8 and 16 (benchmarks/notes.md)
ROWS, COLS, STEP = 128, 256, 64
# TODO: three go when pyproject.toml asks for triton 3.5. Four are 258 KiB of shared memory by 3.4, 224 by others
NUM_WARPS, STAGES = 8, 4 if TRITON >= (3, 5) else 3
GROUP = 8
# columns of a program of in_order, and of a thread
BLOCK, PER_THREAD = 1024, 8
# bytes: what addresses and strides of a descriptor have to be multiples of
ALIGNED = 16
# rows that tiles_that_end speaks of
FAR = tl.constexpr(2**30)


@triton.jit
def _in_order_kernel(
    x_ptr,  # [T, D]
    y_ptr,  # [N, D]
    places_ptr,  # [N] by pairs
    x_stride,  # elements from one row to the next; y has no gaps
    n_cols,
    N_CHOICES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    x = tl.load(x_ptr + token * x_stride + cols, mask=mask, other=0.0)
    for choice in tl.static_range(N_CHOICES):
        place = tl.load(places_ptr + token * N_CHOICES + choice).to(tl.int64)
        tl.store(y_ptr + place * n_cols + cols, x, mask=mask & (place >= 0))


@triton.jit
def _product_of_rows_tma_kernel(
    y_ptr,  # [N, n_out]
    a,  # [N, n_in] in tiles [ROWS, STEP]
    weight,  # [E, n_out, n_in] in tiles [1, COLS, STEP]; TRANSPOSED: [E, n_in, n_out], [1, STEP, COLS]
    bounds_ptr,  # [E + 1]
    tile_experts_ptr,  # [tiles]
    tile_rows_ptr,  # [tiles]
    n_tiles_ptr,  # [1]
    n_out,
    n_in,
    TRANSPOSED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_out, COLS)
    n_tiles = tl.load(n_tiles_ptr)
    # so that both loops become one, whose loads go on from tile to tile
    tl.assume(n_in > 0)
    for turn in tl.range(tl.program_id(0), n_tiles * blocks, tl.num_programs(0), flatten=True):
        first = turn // (GROUP * blocks) * GROUP
        size = tl.minimum(GROUP, n_tiles - first)
        within = turn - first * blocks
        tile = first + within % size
        expert = tl.load(tile_experts_ptr + tile)
        row = tl.load(tile_rows_ptr + tile)
        end = tl.load(bounds_ptr + expert + 1)
        col = within // size * COLS
        y = tl.zeros((ROWS, COLS), tl.float32)
        for start in range(0, n_in, STEP):
            if TRANSPOSED:
                part = weight.load([expert, start, col]).reshape(STEP, COLS)
            else:
                part = weight.load([expert, col, start]).reshape(COLS, STEP).T
            y = tl.dot(a.load([row, start]), part, y)
        rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        y_ptrs = y_ptr + rows[:, None].to(tl.int64) * n_out + cols[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=(rows[:, None] < end) & (cols[None, :] < n_out))


@triton.jit
def _product_of_experts_tma_kernel(
    dweight_ptr,  # [E, n_left, n_right] by its strides
    left,  # [N, n_left] in tiles [STEP, ROWS]; tiles_that_end
    right,  # [N, n_right] in tiles [STEP, COLS]; tiles_that_end
    bounds_ptr,  # [E + 1]
    dweight_expert_stride,
    dweight_left_stride,
    dweight_right_stride,
    n_experts,
    n_left,
    n_right,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """ROWS and COLS are of dweight; STEP rows of an expert at a time."""
    across, down = tl.cdiv(n_right, COLS), tl.cdiv(n_left, ROWS)
    each = across * down
    program, programs = tl.program_id(0), tl.num_programs(0)
    # steps of all of the program's tiles, at least one each, so that its loads go on from tile to tile in one loop
    experts = tl.arange(0, EXPERTS)
    mask = experts < n_experts
    bounds_ptrs = bounds_ptr + experts
    counts = tl.load(bounds_ptrs + 1, mask=mask, other=0) - tl.load(bounds_ptrs, mask=mask, other=0)
    steps = tl.maximum(tl.cdiv(counts, STEP), 1)
    before = tl.cdiv(tl.maximum(experts * each - program, 0), programs)
    behind = tl.cdiv(tl.maximum((experts + 1) * each - program, 0), programs)
    n_steps = tl.sum(tl.where(mask, (behind - before) * steps, 0))

    tile = program - programs
    # of the tile: its expert's first row and number of rows, and how many of them are summed
    begin, count, at = 0, 0, 0
    expert, left_col, right_col = 0, 0, 0
    total = tl.zeros((ROWS, COLS), tl.float32)
    for _ in range(n_steps):
        # in this order, or triton does not pipeline the loads
        at += STEP
        if at >= count:
            tile += programs
            expert = tile // each
            begin = tl.load(bounds_ptr + expert)
            count = tl.load(bounds_ptr + expert + 1) - begin
            at = 0
            left_col = tile // across % down * ROWS
            right_col = tile % across * COLS
        left_tile = left.load([FAR, begin + count, FAR - count + at, left_col]).reshape(STEP, ROWS)
        right_tile = right.load([FAR, begin + count, FAR - count + at, right_col]).reshape(STEP, COLS)
        total = tl.dot(left_tile.T, right_tile, total)
        if at + STEP >= count:
            lefts, rights = left_col + tl.arange(0, ROWS), right_col + tl.arange(0, COLS)
            dweight_ptrs = (
                dweight_ptr
                + expert.to(tl.int64) * dweight_expert_stride
                + lefts[:, None].to(tl.int64) * dweight_left_stride
                + rights[None, :].to(tl.int64) * dweight_right_stride
            )
            inside = (lefts[:, None] < n_left) & (rights[None, :] < n_right)
            tl.store(dweight_ptrs, total.to(dweight_ptr.dtype.element_ty), mask=inside)
            total = tl.zeros((ROWS, COLS), tl.float32)


def in_order(x: Tensor, routes: Routes) -> Tensor:
    """x [T, D] -> [N, D], each place its token's row; behind the last place nothing is written."""
    (t, d), n = x.shape, routes.places.shape[0]
    y = torch.empty((n, d), dtype=x.dtype, device=x.device)
    block = min(BLOCK, power_of_2(d))
    launch(
        _in_order_kernel, (t, cdiv(d, block)),
        x, y, routes.places, row_stride(x), d,
        N_CHOICES=n // t, BLOCK=block, num_warps=warps_for(block, PER_THREAD),
    )  # fmt: skip
    return y


def can_be_copied(x: Tensor) -> bool:
    """Whether a descriptor can say where x lies, the last of whose dimensions is the one without gaps."""
    *strides, last = x.stride()
    return last == 1 and not any(n * x.element_size() % ALIGNED for n in strides) and x.data_ptr() % ALIGNED == 0


def tiles_that_end(x: Tensor, rows: int, cols: int) -> TensorDescriptor:
    """x [N, D] in tiles [rows, cols] that are 0 from some row on.

    The tile at [FAR, end, FAR - count + i, col] begins with the i-th of the count rows before row `end`. The third
    dimension has FAR rows, so it is 0 behind them. The second leads to row end, and the first, whose stride falls short
    of 2^34 by a row's, back by FAR rows: addresses have 64 bits, and FAR * 2^34 elements are no distance.
    """
    (n, d), stride = x.shape, x.stride(0)
    return TensorDescriptor(
        x, [FAR.value + 1, n + 1, FAR.value, d], [2**34 - stride, stride, stride, 1], [1, 1, rows, cols]
    )


def product_of_rows_tma(a: Tensor, weight: Tensor, routes: Routes, *, transposed: bool) -> Tensor:
    """a [N, n_in]; weight [E, n_out, n_in] or, ``transposed``, [E, n_in, n_out], which can be copied -> [N, n_out].

    Tiles of the routes have ROWS places.
    """
    n, n_in = a.shape
    n_out = weight.shape[2 if transposed else 1]
    y = torch.empty((n, n_out), dtype=a.dtype, device=a.device)
    most = routes.tile_experts.shape[0] * cdiv(n_out, COLS)
    box = [1, STEP, COLS] if transposed else [1, COLS, STEP]
    # the ordinary way, on which triton makes of a descriptor what the device reads
    _launch.launch_elsewhere(
        _product_of_rows_tma_kernel, (min(multiprocessors(a), most),),
        (
            y, TensorDescriptor.from_tensor(a, [ROWS, STEP]), TensorDescriptor.from_tensor(weight, box),
            routes.bounds, routes.tile_experts, routes.tile_rows, routes.n_tiles, n_out, n_in,
        ),
        {
            "TRANSPOSED": transposed, "GROUP": GROUP, "ROWS": ROWS, "COLS": COLS, "STEP": STEP,
            "num_warps": NUM_WARPS, "num_stages": STAGES,
        },
    )  # fmt: skip
    return y


def product_of_experts_tma(left: Tensor, right: Tensor, routes: Routes, dweight: Tensor) -> None:
    """left [N, n_left], right [N, n_right], which can be copied; dweight [E, n_left, n_right] is written."""
    n_experts, n_left, n_right = dweight.shape
    tiles = n_experts * cdiv(n_left, ROWS) * cdiv(n_right, COLS)
    _launch.launch_elsewhere(
        _product_of_experts_tma_kernel, (min(multiprocessors(left), tiles),),
        (
            dweight, tiles_that_end(left, STEP, ROWS), tiles_that_end(right, STEP, COLS),
            routes.bounds, *dweight.stride(), n_experts, n_left, n_right,
        ),
        {
            "EXPERTS": power_of_2(n_experts), "ROWS": ROWS, "COLS": COLS, "STEP": STEP,
            "num_warps": NUM_WARPS, "num_stages": STAGES,
        },
    )  # fmt: skip
