"""Squared ReLU without a gate: ``y = max(x, 0) ** 2``, one pass each way (Primer, arXiv 2109.08668; Nemotron).

Saved for backward: x, which the projection before it holds anyway. Traffic per element: forward 1 read + 1 write,
backward 2 reads + 1 write. fp32 inside, one rounding.

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._once import once_differentiable
from ds_fused.ops._rows import place, walk
from ds_fused.ops._triton import check_dtypes, like, runs_kernels

# elements per program and warps: glu's, not yet measured here
BLOCK = 2048
NUM_WARPS = 8


def relu2_reference(x: Tensor) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    return F.relu(x).square()


@triton.jit
def _relu2_fwd_kernel(
    x_ptr,  # [N, D]
    y_ptr,
    x_stride,  # elements from one row to the next; y has no gaps
    n_cols,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = place(n_cols, FLAT, BLOCK)
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n_cols

    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    # a comparison that is false for NaN, which therefore stays
    tl.store(y_ptr + row * n_cols + cols, tl.where(x <= 0.0, 0.0, x * x), mask=mask)


@triton.jit
def _relu2_bwd_kernel(
    dy_ptr,  # [N, D]
    x_ptr,
    dx_ptr,
    dy_stride,  # elements from one row to the next; dx has no gaps
    x_stride,
    n_cols,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = place(n_cols, FLAT, BLOCK)
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n_cols

    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * n_cols + cols, tl.where(x <= 0.0, 0.0, 2.0 * x * dy), mask=mask)


def relu2_fwd(x: Tensor) -> Tensor:
    """[..., D] -> [..., D]."""
    y = like(x)
    way = walk(x.shape, BLOCK, x)
    if way.programs:
        launch(
            _relu2_fwd_kernel, (way.programs,),
            *way.tensors, y, *way.strides, way.n_cols, FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


def relu2_bwd(dy: Tensor, x: Tensor) -> Tensor:
    """[..., D] x 2 -> dx [..., D]."""
    dx = like(x)
    way = walk(x.shape, BLOCK, dy, x)
    if way.programs:
        launch(
            _relu2_bwd_kernel, (way.programs,),
            *way.tensors, dx, *way.strides, way.n_cols, FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx


class ReLU2Function(torch.autograd.Function):
    """Autograd around the two launchers."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return relu2_fwd(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return relu2_bwd(dy, x)


def relu2(x: Tensor) -> Tensor:
    """``F.relu(x).square()`` for x [..., D]; with a gate beside it, it is ``glu(gate, up, "relu2")``."""
    if not runs_kernels(x):
        return relu2_reference(x)
    check_dtypes("relu2", x=x)
    return ReLU2Function.apply(x)
