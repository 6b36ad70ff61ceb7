"""Tiles of [N, D] for kernels that need rows as a whole: several, each of one block or more, or one that is walked."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._meet import at_most
from ds_fused.ops.common._triton import cdiv, power_of_2, resident, stages_for, warps_for

# columns of a row too wide for registers that are worked on at a time
WALK_BLOCK = 4096
# of one of NVIDIA's multiprocessors
REGISTERS = 65536
# of how many blocks side by side a row may be made up, and the least such block. Of seven a thread of the norms'
# backwards would want 191 registers (sm90), where a resident grid has 128
COUNTS = (3, 5)
LEAST_BLOCK = 128


class Tile(NamedTuple):
    """rows = 0: a row is walked in blocks of cols."""

    rows: int
    cols: int
    warps: int
    blocks: int = 1  # of cols each, side by side, make up a row


def tile(d: int, elements: int, per_thread: int, widest: int) -> Tile:
    """Whole rows of d columns, several where they are narrow."""
    if d > widest:
        return Tile(0, WALK_BLOCK, 8)
    cols = power_of_2(d)
    rows = max(1, elements // cols)
    return Tile(rows, cols, warps_for(rows * cols, per_thread))


def tile_of_blocks(d: int, elements: int, per_thread: int, widest: int, of_blocks: int) -> Tile:
    """As `tile`, but rows are made up of several blocks where fewer columns are then worked on: of 5120 columns
    5 x 1024, not 8192. A thread has of_blocks elements of them all at most.
    """
    blocks, cols = 1, power_of_2(d)
    for count in COUNTS:
        each = power_of_2(cdiv(d, count))
        if each >= LEAST_BLOCK and count * each < blocks * cols:
            blocks, cols = count, each
    if blocks == 1 or d > widest:
        return tile(d, elements, per_thread, widest)
    rows = 1
    while 2 * rows * cols * blocks <= elements:
        rows *= 2
    in_block = power_of_2(of_blocks // blocks + 1) // 2
    return Tile(rows, cols, warps_for(rows * cols, in_block), blocks)


def tile_of_columns(d: int, elements: int, per_thread: int, widest: int) -> Tile:
    """For kernels that need no row as a whole: blocks of its columns, of which the last has the fewest to spare."""
    cols = each = power_of_2(min(d, widest))
    while each > LEAST_BLOCK:
        each //= 2
        if cdiv(d, each) * each < cdiv(d, cols) * cols:
            cols = each
    return tile(cols, elements, per_thread, cols)


@triton.jit
def over_rows(cols, BLOCK_ROWS: tl.constexpr):
    """cols [1, C] as [BLOCK_ROWS, C]: where a value is read that all rows of a tile share.

    Threads hold a tensor of one row in another way than a tile of several, and Triton 3.6 then computes the tile in
    that way: each warp has parts of all rows, and every sum along a row goes through shared memory. The backward of
    rms_norm took 358 instructions for 168 at 256 columns, 250 for 182 at 1024 (sm90).
    """
    return tl.broadcast_to(cols, (BLOCK_ROWS, cols.shape[1]))


def _side_by_side(x: Tensor, warps_per_multiprocessor: int, warps: int) -> dict[str, int]:
    """Of a grid that is `resident`, over rows of 16 bits: how many registers a thread may have for that to be so.

    With a few more, a quarter of the programs begin when others end: 144 for 128 took layer_norm's backward from 0.208
    to 0.257 ms (256 MiB in rows of 512 columns, an H200).
    """
    # a program of more warps than that has the multiprocessor to itself
    return {} if x.itemsize > 2 else at_most(x, REGISTERS // (32 * max(warps_per_multiprocessor, warps)))


def in_turn(
    x: Tensor, block: Tile, n: int, warps_per_multiprocessor: int, itemsizes: int, stages: int, groups: int = 1
) -> tuple[int, dict[str, int]]:
    """How many programs take the n rows of each group in turn, tile by tile, and what their kernel knows of the tile.

    What the kernel knows are its columns and warps, and of whole rows how many they are, how many tiles are in flight
    (at most `stages` on x's device, of an element of each tensor that is read in itemsizes bytes), and its registers.
    """
    constants = {"BLOCK_COLS": block.cols, "num_warps": block.warps}
    if block.rows:
        constants["BLOCK_ROWS"] = block.rows
        constants["STAGES"] = stages_for(x, stages, itemsizes * block.rows * block.cols * block.blocks)
        constants |= _side_by_side(x, warps_per_multiprocessor, block.warps)
    most = max(1, resident(x, warps_per_multiprocessor, block.warps) // groups)
    return min(cdiv(n, max(1, block.rows)), most), constants
