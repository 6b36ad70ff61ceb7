"""What a layer reads of N residual streams: ``y = sum_i pre_i x_i``, the weights those of each token.

The first half of a hyper-connection (see mhc_coefficients.py). Computed in fp32 and rounded once, to x's
dtype. Saved for backward: x and pre.
Traffic per token, in rows of C: forward N reads + 1 write; backward N + 1 reads + N writes.

Sizes: T tokens (every leading dimension, flattened), N streams, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._triton import cdiv, check_dtypes, like, power_of_2, row_stride, rows_of, runs_kernels
from ds_fused.ops.residual._mhc_streams import _mhc_pre_bwd_kernel, _mhc_pre_fwd_kernel
from ds_fused.ops.residual._streams import check_streams, streams_of, tokens_of

# 99 % of the floor at 16384 tokens of 4 x 4096 on H100 (benchmarks/results/h100/ops.csv); no others are measured yet.
# Columns of a stream that a program has at a time: 16 bytes a thread of each stream
BLOCK, WARPS = 1024, 4
STAGES_BWD = 3


def mhc_pre_reference(x: Tensor, pre: Tensor) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (pre.to(wide).unsqueeze(-1) * x.to(wide)).sum(-2).to(x.dtype)


def mhc_pre_fwd(x: Tensor, pre: Tensor) -> Tensor:
    """x [..., N, C], pre [..., N] -> y [..., C]."""
    *leading, n, c = x.shape
    y = torch.empty((*leading, c), dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    rows, stride = streams_of(x)
    launch(
        _mhc_pre_fwd_kernel, (tokens_of(x) * cdiv(c, BLOCK),),
        rows, pre, y, stride, c,
        N=n, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return y


def mhc_pre_bwd(dy: Tensor, x: Tensor, pre: Tensor, wants: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
    """dy [..., C], x [..., N, C], pre [..., N] -> dx [..., N, C], dpre [..., N]; those wanted."""
    n, c = x.shape[-2:]
    nothing = dy.numel() == 0
    dx = like(x) if wants[0] else None
    dpre = (torch.zeros_like if nothing else torch.empty_like)(pre) if wants[1] else None
    if nothing or not any(wants):
        return dx, dpre
    dy = rows_of(dy)
    rows, stride = streams_of(x)
    launch(
        _mhc_pre_bwd_kernel, (tokens_of(x),),
        dy, rows, pre, dx, dpre, row_stride(dy), stride, c,
        N=n, SIDE=power_of_2(n), WANTS_DX=wants[0], WANTS_DPRE=wants[1],
        BLOCK=BLOCK, STAGES=STAGES_BWD, num_warps=WARPS,
    )  # fmt: skip
    return dx, dpre


class MHCPreFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, pre: Tensor) -> Tensor:
        ctx.save_for_backward(x, pre)
        return mhc_pre_fwd(x, pre)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return mhc_pre_bwd(dy, *ctx.saved_tensors, ctx.needs_input_grad)


def mhc_pre(x: Tensor, pre: Tensor) -> Tensor:
    """``sum_i pre[..., i] x[..., i, :]``: streams x [..., N, C], pre [..., N] -> [..., C], of x's dtype.

    N is at most 16.
    """
    op = "mhc_pre"
    check_streams(op, x)
    if pre.shape != x.shape[:-1]:
        raise ValueError(f"{op}: pre {tuple(pre.shape)} must be one value per stream of x {tuple(x.shape)}")
    if not runs_kernels(x, pre):
        return mhc_pre_reference(x, pre)
    check_dtypes(op, x=x, pre=pre)
    pre = pre.contiguous()
    if torch.compiler.is_compiling():
        # as in rms_norm
        flat = x.reshape(-1, *x.shape[-2:]), pre.reshape(-1, x.shape[-2])
        return MHCPreFunction.apply(*flat).view(*x.shape[:-2], x.shape[-1])
    return MHCPreFunction.apply(x, pre)
