"""Tiles of [N, D] for kernels that need rows as a whole: several rows, one, or one that is walked in blocks."""

from __future__ import annotations

from typing import NamedTuple

from ds_fused.ops._triton import cdiv, power_of_2, stages_for, warps_for

# columns of a row too wide for registers that are worked on at a time
WALK_BLOCK = 4096


class Tile(NamedTuple):
    """rows = 0: a row is walked in blocks of cols."""

    rows: int
    cols: int
    warps: int


def tile(d: int, elements: int, per_thread: int, widest: int) -> Tile:
    """Whole rows of d columns, several where they are narrow."""
    if d > widest:
        return Tile(0, WALK_BLOCK, 8)
    cols = power_of_2(d)
    rows = max(1, elements // cols)
    return Tile(rows, cols, warps_for(rows * cols, per_thread))


def in_turn(block: Tile, n: int, most: int, itemsizes: int, stages: int) -> tuple[int, dict[str, int]]:
    """How many programs, `most` of them, take n rows in turn, tile by tile, and what their kernel knows of the tile.

    That is its columns and warps, and of whole rows how many they are, and how many tiles are in flight: at most
    `stages`, of an element of each tensor that is read in itemsizes bytes.
    """
    constants = {"BLOCK_COLS": block.cols, "num_warps": block.warps}
    if block.rows:
        constants["BLOCK_ROWS"] = block.rows
        constants["STAGES"] = stages_for(stages, itemsizes * block.rows * block.cols)
    return min(cdiv(n, max(1, block.rows)), most), constants
