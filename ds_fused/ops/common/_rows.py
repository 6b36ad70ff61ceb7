"""How a pointwise kernel walks [N, D]: block by block over all of it where rows have no gaps, else row by row."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._triton import cdiv, row_stride, rows_of


@triton.jit
def place(n_cols, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row and its first column. FLAT: everything is one row, whose columns may need int64."""
    pid = tl.program_id(0).to(tl.int64)
    if FLAT:
        row = tl.zeros((), tl.int64)
        first = pid * BLOCK
    else:
        blocks = tl.cdiv(n_cols, BLOCK)
        row = pid // blocks
        first = (pid % blocks) * BLOCK
    return row, first


class Walk(NamedTuple):
    """How a launch goes through tensors that are read or written at the same places."""

    flat: bool  # rows have no gaps, so that all of it is one row
    n_cols: int  # columns of a row
    programs: int
    tensors: tuple[Tensor, ...]  # as rows, or as they are where they are flat
    strides: tuple[int, ...]  # of each, elements from one row to the next


def walk(shape: torch.Size, block: int, *tensors: Tensor, by_row: bool = False) -> Walk:
    """Over elements of that shape [..., D], which each of the tensors has (or that many pairs of columns).

    ``by_row``: a row of a tensor may hold more than those.
    """
    n_elements = shape.numel()
    # contiguous ones as they are: of views each costs as much time as it takes to look at all tensors
    if by_row or not all([tensor.is_contiguous() for tensor in tensors]):
        tensors = tuple([rows_of(tensor) for tensor in tensors])
        if by_row or not all([tensor.is_contiguous() for tensor in tensors]):
            d = shape[-1]
            programs = n_elements // d * cdiv(d, block) if d else 0
            return Walk(False, d, programs, tensors, tuple([row_stride(x) for x in tensors]))
    return Walk(True, n_elements, cdiv(n_elements, block), tensors, (0,) * len(tensors))
