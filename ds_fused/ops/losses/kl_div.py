"""Pointwise Kullback-Leibler divergence of log-probabilities from a target, as ``F.kl_div`` defines it.

Per element:

    loss    = target * (log(target) - input)                 dinput = -target
                                                             dtarget = log(target) + 1 - input
    log_target:
    loss    = exp(target) * (target - input)                 dinput = -exp(target)
                                                             dtarget = exp(target) * (target + 1 - input)

An element whose target is nothing (0, or -inf as a logarithm) counts 0, and so do its gradients, whatever the input is:
where PyTorch has NaN.

Saved for backward: target, and input too where the target requires a gradient (no copies).
Traffic per element: forward 2 reads (+ 1 write with reduction "none"), backward 1 read + 1 write (+ 1 and + 1 for the
target's gradient, + 1 read with "none").

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._rows import place, walk
from ds_fused.ops.common._triton import check_dtypes, fp32_in_autocast, like, runs_kernels

# not yet measured. elements of a program and its warps
BLOCK = 4096
NUM_WARPS = 8

REDUCTIONS = ("mean", "batchmean", "sum", "none")


def kl_div_reference(
    input: Tensor,  # [..., D]
    target: Tensor,  # [..., D]
    *,
    log_target: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    wide = torch.promote_types(torch.promote_types(input.dtype, target.dtype), torch.float32)
    x, t = input.to(wide), target.to(wide)
    nothing = t == (-torch.inf if log_target else 0.0)
    # before anything is computed of them: a gradient of 0 * inf would be NaN
    t, x = t.masked_fill(nothing, 1.0), x.masked_fill(nothing, 0.0)
    loss = t.exp() * (t - x) if log_target else t * (t.log() - x)
    loss = loss.masked_fill(nothing, 0.0)
    if reduction == "none":
        return loss.to(fp32_in_autocast(input, input.dtype))
    return loss.sum() / _count(input.shape, reduction)


def _count(shape: torch.Size, reduction: str) -> int:
    """What the sum is divided by."""
    if reduction == "sum":
        return 1
    if reduction == "batchmean":
        return shape[0] if len(shape) else 1
    return shape.numel()


@triton.jit
def _terms(x, t, LOG_TARGET: tl.constexpr):
    """Loss, dinput and dtarget of elements in fp32; x and t may be anything where the target is nothing."""
    if LOG_TARGET:
        p, log_p = tl.exp(t), t
        counts = t != float("-inf")
        slope = p
    else:
        p, log_p = t, tl.log(t)
        counts = t != 0.0
        slope = 1.0
    gap = log_p - x
    return tl.where(counts, p * gap, 0.0), -p, tl.where(counts, slope * (gap + 1.0), 0.0)


@triton.jit
def _kl_div_fwd_kernel(
    x_ptr, t_ptr,  # [N, D]
    loss_ptr,  # [N, D] without gaps, or the sum of each program
    x_stride, t_stride, n_cols,
    LOG_TARGET: tl.constexpr, IS_SUM: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = place(n_cols, FLAT, BLOCK)
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n_cols
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(t_ptr + row * t_stride + cols, mask=mask, other=float("-inf") if LOG_TARGET else 0.0).to(tl.float32)
    loss, _, _ = _terms(x, t, LOG_TARGET)
    if IS_SUM:
        tl.store(loss_ptr + tl.program_id(0), tl.sum(loss, 0))
    else:
        tl.store(loss_ptr + row * n_cols + cols, loss, mask=mask)


@triton.jit
def _kl_div_bwd_kernel(
    dloss_ptr,  # [N, D], or one number
    x_ptr, t_ptr,  # [N, D]
    dx_ptr, dt_ptr,  # [N, D] without gaps
    dloss_stride, x_stride, t_stride, n_cols,
    LOG_TARGET: tl.constexpr, IS_SUM: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_DT: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = place(n_cols, FLAT, BLOCK)
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n_cols
    t = tl.load(t_ptr + row * t_stride + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.zeros_like(t)
    if WANTS_DT:  # nothing else needs it
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if IS_SUM:
        dloss = tl.load(dloss_ptr).to(tl.float32)
    else:
        dloss = tl.load(dloss_ptr + row * dloss_stride + cols, mask=mask, other=0.0).to(tl.float32)
    _, dx, dt = _terms(x, t, LOG_TARGET)
    if WANTS_DX:
        tl.store(dx_ptr + row * n_cols + cols, dloss * dx, mask=mask)
    if WANTS_DT:
        tl.store(dt_ptr + row * n_cols + cols, dloss * dt, mask=mask)


def kl_div_fwd(x: Tensor, t: Tensor, log_target: bool, dtype: torch.dtype | None) -> Tensor:
    """[..., D], [..., D] -> [..., D] in dtype, or, where that is None, one fp32 number: their sum."""
    is_sum = dtype is None
    way = walk(x.shape, BLOCK, x, t)
    if is_sum:
        # summed in two steps, always in the same order
        loss = torch.empty(way.programs, dtype=torch.float32, device=x.device)
    else:
        loss = like(x, dtype)
    if way.programs:
        launch(
            _kl_div_fwd_kernel, (way.programs,),
            *way.tensors, loss, *way.strides, way.n_cols,
            LOG_TARGET=log_target, IS_SUM=is_sum, FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return loss.sum() if is_sum else loss


def kl_div_bwd(
    dloss: Tensor,  # [..., D], or one number
    x: Tensor | None,  # None where the target wants no gradient
    t: Tensor,
    x_dtype: torch.dtype,
    log_target: bool,
    is_sum: bool,
    wants: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients [..., D] that are wanted."""
    dx = like(t, x_dtype) if wants[0] else None
    dt = like(t) if wants[1] else None
    # a tensor that stands for one that is not there is never touched
    way = walk(t.shape, BLOCK, t if is_sum else dloss, t if x is None else x, t)
    rows = (dloss, *way.tensors[1:]) if is_sum else way.tensors
    if way.programs:
        launch(
            _kl_div_bwd_kernel, (way.programs,),
            *rows, t if dx is None else dx, t if dt is None else dt, *way.strides, way.n_cols,
            LOG_TARGET=log_target, IS_SUM=is_sum, WANTS_DX=wants[0], WANTS_DT=wants[1],
            FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return dx, dt


class KLDivFunction(torch.autograd.Function):
    """Autograd around the two launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, t: Tensor, log_target: bool, dtype: torch.dtype | None) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, t)
        ctx.x_dtype, ctx.log_target, ctx.is_sum = x.dtype, log_target, dtype is None
        return kl_div_fwd(x, t, log_target, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, t = ctx.saved_tensors
        dx, dt = kl_div_bwd(dloss, x, t, ctx.x_dtype, ctx.log_target, ctx.is_sum, ctx.needs_input_grad[:2])
        return dx, dt, None, None


def kl_div(
    input: Tensor,  # [..., D] log-probabilities
    target: Tensor,  # [..., D] probabilities, or their logarithms with log_target
    *,
    log_target: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """``F.kl_div(input, target, reduction=reduction, log_target=log_target)``; computed, and summed, in fp32.

    ``reduction``: "batchmean" divides the sum by the first dimension, "mean" by all elements (PyTorch's default);
    "none" gives each element's loss in the input's dtype, under autocast in fp32.
    """
    if input.shape != target.shape:
        raise ValueError(f"kl_div: input {tuple(input.shape)} and target {tuple(target.shape)} must have one shape")
    if reduction not in REDUCTIONS:
        raise ValueError(f"kl_div: reduction is {reduction!r}; it must be 'mean', 'batchmean', 'sum' or 'none'")
    if target.device != input.device:
        raise ValueError(f"kl_div: target is on {target.device}, input on {input.device}; they must share a device")
    if not runs_kernels(input, target):
        return kl_div_reference(input, target, log_target=log_target, reduction=reduction)
    check_dtypes("kl_div", input=input, target=target)
    dtype = fp32_in_autocast(input, input.dtype) if reduction == "none" else None
    loss = KLDivFunction.apply(input, target, log_target, dtype)
    return loss if reduction in ("sum", "none") else loss / _count(input.shape, reduction)
