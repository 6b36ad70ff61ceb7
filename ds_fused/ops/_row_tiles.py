"""Tiles of [N, D] for kernels that need rows as a whole: several rows, one, or one that is walked in blocks."""

from __future__ import annotations

from typing import NamedTuple

from ds_fused.ops._triton import power_of_2, warps_for

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
