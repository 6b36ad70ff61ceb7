"""Tiles of [N, D] for kernels that need rows as a whole: several, one, one in three blocks, or one that is walked."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ds_fused.ops._triton import cdiv, power_of_2, stages_for, warps_for

# columns of a row too wide for registers that are worked on at a time
WALK_BLOCK = 4096
# the least block of a row in three
LEAST_THIRD = 1024


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


def tile_of_blocks(d: int, elements: int, per_thread: int, widest: int, in_block: int) -> Tile:
    """As `tile`, but a row that is at most three quarters of a power of two is three blocks of a quarter, of each of
    which a thread has in_block elements: of 5120 columns 6144 are then worked on, not 8192, and by fewer threads.
    """
    cols = power_of_2(d) // 4
    if d > min(3 * cols, widest) or cols < LEAST_THIRD:
        return tile(d, elements, per_thread, widest)
    return Tile(1, cols, warps_for(cols, in_block), 3)


def in_turn(x: Tensor, block: Tile, n: int, most: int, itemsizes: int, stages: int) -> tuple[int, dict[str, int]]:
    """How many programs, `most` of them, take n rows in turn, tile by tile, and what their kernel knows of the tile.

    What the kernel knows are its columns and warps, and of whole rows how many they are, and how many tiles are in
    flight: at most `stages` on x's device, of an element of each tensor that is read in itemsizes bytes.
    """
    constants = {"BLOCK_COLS": block.cols, "num_warps": block.warps}
    if block.rows:
        constants["BLOCK_ROWS"] = block.rows
        constants["STAGES"] = stages_for(x, stages, itemsizes * block.rows * block.cols * block.blocks)
    return min(cdiv(n, max(1, block.rows)), most), constants
