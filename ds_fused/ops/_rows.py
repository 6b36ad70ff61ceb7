"""How a pointwise kernel walks [N, D]: block by block over all of it where rows have no gaps, else row by row."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._triton import cdiv


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


def layout(n: int, d: int, block: int, *tensors: Tensor) -> tuple[bool, int, int]:
    """(whether rows have no gaps, so that all of it is one row; columns of a row; programs)."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return True, n * d, cdiv(n * d, block)
    return False, d, n * cdiv(d, block)
