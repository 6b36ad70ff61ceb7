"""What softmax and sparsemax share: tensors [N, D] in which every row is worked on alone, whole or walked in blocks."""

from __future__ import annotations

from torch import Tensor
from triton.runtime.jit import JITFunction

from ds_fused.ops._launch import launch
from ds_fused.ops._row_tiles import tile
from ds_fused.ops._triton import cdiv, row_stride, rows_of, stages_for, warps_for

# A tile is whole rows up to these widths (32 fp32 values of a row in each of 1024 threads); wider rows are walked in
# blocks. Not measured yet.
WHOLE_ROW_FWD = 32768
WHOLE_ROW_BWD = 16384
# elements of a tile when a row is narrower (as many rows as fit), and of a thread. Not measured yet.
TILE, PER_THREAD = 2048, 16
# tiles of a wider row that are in flight
WALK_STAGES = 3


def along_rows(
    whole: JITFunction, walk: JITFunction, widest: int, walk_cols: int, out: Tensor, *inputs: Tensor
) -> Tensor:
    """Fills ``out`` [..., D] by one of two kernels, for rows up to ``widest`` columns and for wider ones,
    of which ``walk_cols`` at a time by 1024 threads: then few rows share a multiprocessor, and what a walk saw last is
    still in L2 for the next walk.

    They take inputs, out, the row stride of the first input (the others have no gaps), N (``whole`` alone), D, and
    ``walk`` the STAGES of its loops.
    """
    first = rows_of(inputs[0])
    n, d = first.shape  # not out's: dynamo 2.11 can't hold the sizes of what was made of an input
    if n == 0 or d == 0:
        return out
    block = tile(d, TILE, PER_THREAD, widest)
    tensors = (first, *inputs[1:], out, row_stride(first))
    if block.rows:
        grid = (cdiv(n, block.rows),)
        launch(whole, grid, *tensors, n, d, BLOCK_ROWS=block.rows, BLOCK_COLS=block.cols, num_warps=block.warps)
    else:
        warps = warps_for(walk_cols, max(1, walk_cols // 1024))
        stages = stages_for(WALK_STAGES, walk_cols * sum(x.element_size() for x in inputs))
        launch(walk, (n,), *tensors, d, BLOCK_COLS=walk_cols, STAGES=stages, num_warps=warps)
    return out


def check_dim(op: str, x: Tensor, dim: int) -> None:
    """A dimension that x has."""
    if x.ndim == 0:
        raise ValueError(f"{op}: x is a number; there must be a dimension to go along")
    if not -x.ndim <= dim < x.ndim:
        raise ValueError(f"{op}: dim is {dim}; x {tuple(x.shape)} has dimensions {-x.ndim} to {x.ndim - 1}")
