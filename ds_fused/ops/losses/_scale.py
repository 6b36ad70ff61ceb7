"""Gradients that were made in a forward, for an upstream gradient that was taken for granted, meet the real one.

A loss is linear in its upstream gradient, a number that the backward alone knows. It stays on the device: to ask for it
would make the host wait. Where it is what was taken for granted, nothing is read or written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._tiles import wide
from ds_fused.ops.common._triton import cdiv, multiprocessors, row_stride, runs_kernels

# elements a turn, and programs that take turns: few, so that it costs next to nothing where there is nothing to do.
# Not yet measured
BLOCK = 4096
PROGRAMS_PER_MULTIPROCESSOR = 8


@triton.jit(do_not_specialize=["n_tiles"])
def _scale_kernel(
    x_ptr,  # [N, D]
    upstream_ptr,  # []
    x_stride,
    n_cols,
    n_blocks,  # of a row
    n_tiles,
    assumed,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr)
    if upstream != assumed:
        factor = upstream / assumed
        for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
            row = (tile // n_blocks).to(tl.int64)
            cols = (tile % n_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            mask = cols < n_cols
            x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
            # zeros of ignored tokens stay, whatever the upstream gradient is
            tl.store(x_ptr + row * x_stride + cols, tl.where(x == 0.0, 0.0, x * factor), mask=mask)


def scaled_torch(x: Tensor, upstream: Tensor, assumed: float = 1.0) -> Tensor:
    """`scaled` without a kernel, to a new tensor."""
    return (x.to(wide(x)) * (upstream / assumed)).to(x.dtype).masked_fill(x == 0, 0)


def scaled(x: Tensor, upstream: Tensor, assumed: float = 1.0) -> Tensor:
    """``upstream / assumed * x``, rounded once, ``upstream`` [] a wide number beside x.

    Where a kernel runs, over x, which is [N, D] with neighbouring columns or contiguous; else a new tensor.
    """
    if torch.compiler.is_compiling() or not runs_kernels(x):
        return scaled_torch(x, upstream, assumed)
    # without gaps it is all one row
    n, d, stride = (1, x.numel(), 0) if x.is_contiguous() else (*x.shape, row_stride(x))
    n_blocks = cdiv(d, BLOCK)
    programs = min(n * n_blocks, multiprocessors(x) * PROGRAMS_PER_MULTIPROCESSOR)
    if programs:
        launch(_scale_kernel, (programs,), x, upstream, stride, d, n_blocks, n * n_blocks, float(assumed), BLOCK=BLOCK)
    return x
