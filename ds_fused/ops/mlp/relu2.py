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
from triton.runtime.jit import JITFunction

from ds_fused.ops.common._launch import Kept, Ready, launch_ready, lie_alike, ready
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._rows import place, walk
from ds_fused.ops.common._triton import check_dtypes, like, runs_kernels

# elements per program and warps: glu's, not yet measured here
BLOCK = 2048
NUM_WARPS = 8

_launches: Kept[Ready] = Kept()


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
    return _fill(_relu2_fwd_kernel, like(x), x)


def relu2_bwd(dy: Tensor, x: Tensor) -> Tensor:
    """[..., D] x 2 -> dx [..., D]."""
    return _fill(_relu2_bwd_kernel, like(x), dy, x)


def _fill(kernel: JITFunction, out: Tensor, *inputs: Tensor) -> Tensor:
    """``out`` [..., D] by a kernel that takes inputs, out, the row strides of the inputs, and D."""
    key = None
    if not torch.compiler.is_compiling():
        # each kernel has its own number of inputs
        key = inputs[0].shape, *[x.stride() for x in inputs], BLOCK, NUM_WARPS
    it = _launches.get(key)
    if it is None:
        # not out's: dynamo 2.11 can't hold the sizes of what was made of an input
        way = walk(inputs[-1].shape, BLOCK, *inputs)
        if not way.programs:
            return out
        it = ready(
            kernel, (way.programs,), *way.strides, way.n_cols, FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS
        )  # fmt: skip
        if lie_alike(inputs, way.tensors):
            _launches.keep(key, it)
        inputs = way.tensors
    launch_ready(it, *inputs, out)
    return out


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
