"""fp32 numbers as sums of three in bf16, so that products with other bf16 numbers keep the bits of fp32.

    v = v1 + v2 + v3, each the rounding of what those before it leave: 24 bits
    a v^T = a [v1, v2, v3]^T, its three parts added up          a is in bf16
    u v^T = [u1, u2, u3, u1, u1, u2] [v1, v1, v1, v2, v3, v2]^T of the nine products those above the last bit

The tensor cores multiply bf16 exactly and add up in fp32. Six times as many columns are nothing where there are few, as
in an adapter of rank 16, and fp32 of its own would have the layer's input and result in fp32, too.

Sizes: R rows, C columns of a number's own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._triton import cdiv

# of a product of two such: this one's pieces, and those that they meet; where the three pieces begin in each
LEFT, RIGHT = False, True
_FIRST = {LEFT: 0, RIGHT: 2}
# elements per program and warps, not measured yet
BLOCK = 1024
NUM_WARPS = 4


# one kernel for an adapter of any size: nothing here is read in vectors
@triton.jit(do_not_specialize=["n_rows", "n_cols"])
def _pieces_kernel(
    v_ptr,  # [R, PARTS, C] fp32: to be added up
    pieces_ptr,  # [R, 6, C] bf16
    n_rows, n_cols,
    scale,
    PARTS: tl.constexpr, RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    scale = tl.cast(scale, tl.float32)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, col = at // n_cols, at % n_cols
    mask = row < n_rows
    v = tl.load(v_ptr + row * (PARTS * n_cols) + col, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        v += tl.load(v_ptr + row * (PARTS * n_cols) + part * n_cols + col, mask=mask, other=0.0)
    v *= scale

    first = v.to(tl.bfloat16)
    rest = v - first.to(tl.float32)
    # of infinity or NaN nothing is left, not NaN: what it is multiplied by stays what it is
    rest = tl.where(rest == rest, rest, 0.0)
    second = rest.to(tl.bfloat16)
    third = (rest - second.to(tl.float32)).to(tl.bfloat16)
    out = pieces_ptr + row * (6 * n_cols) + col
    tl.store(out, first, mask=mask)
    tl.store(out + n_cols, first if RIGHT else second, mask=mask)
    tl.store(out + 2 * n_cols, first if RIGHT else third, mask=mask)
    tl.store(out + 3 * n_cols, second if RIGHT else first, mask=mask)
    tl.store(out + 4 * n_cols, third if RIGHT else first, mask=mask)
    tl.store(out + 5 * n_cols, second, mask=mask)


def pieces(v: Tensor, side: bool, parts: int = 1, scale: float = 1.0) -> Tensor:
    """[R, parts * C] fp32 without gaps -> [R, 6 * C] bf16: of ``scale`` times the sum of its parts."""
    n_rows, n_cols = v.shape[0], v.shape[1] // parts
    out = v.new_empty(n_rows, 6 * n_cols, dtype=torch.bfloat16)
    if out.numel():
        launch(
            _pieces_kernel, (cdiv(n_rows * n_cols, BLOCK),), v, out, n_rows, n_cols, float(scale),
            PARTS=parts, RIGHT=side, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


def pieces_of_rows(v: Tensor, side: bool) -> Tensor:
    """[R, C] fp32 -> [6 * R, C] bf16."""
    return pieces(v.contiguous().view(1, -1), side).view(6 * v.shape[0], v.shape[1])


def three(six: Tensor, side: bool) -> Tensor:
    """[R, 6 * C] -> the three pieces of each number, once: [R, 3 * C]."""
    n = six.shape[1] // 6
    return six.narrow(1, _FIRST[side] * n, 3 * n)


def added(parts: Tensor, dim: int) -> Tensor:
    """Sums of three, which lie one behind the other along a dimension."""
    return parts.unflatten(dim, (3, -1)).sum(dim)
