"""The streams behind a layer: ``out_i = sum_j res_ij x_j + post_i y``, the weights those of each token.

The second half of a hyper-connection (see mhc_coefficients.py): streams are mixed, and the layer's output
goes to each. Computed in fp32 and rounded once, to x's dtype. Saved for backward: x, y, post and res.
Traffic per token, in rows of C: forward N + 1 reads + N writes; backward 2 N + 1 reads + N + 1 writes.

Sizes: T tokens (every leading dimension, flattened), N streams, C columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._triton import (
    check_dtypes,
    like,
    power_of_2,
    row_stride,
    rows_of,
    runs_kernels,
    without_autocast,
)
from ds_fused.ops.residual._mhc_streams import (
    _mhc_post_res_bwd_kernel,
    _mhc_post_res_fwd_kernel,
)
from ds_fused.ops.residual._streams import check_streams, streams_of, tokens_of

# 98 % of the floor at 16384 tokens of 4 x 4096 on H100 (benchmarks/results/h100/ops.csv); no others are measured yet.
# N^2 columns of fp32 that a program adds up in backward, 128 in each of 64 threads; of these 16 registers for each
# column of four streams
ELEMENTS = 8192
MOST_COLS = 1024
WARPS = 2
STAGES_FWD, STAGES_BWD = 3, 3


def mhc_post_res_reference(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide, y_wide, post, res = (t.to(wide) for t in (x, y, post, res))
    with without_autocast(x):
        mixed = res @ x_wide
    return (mixed + post.unsqueeze(-1) * y_wide.unsqueeze(-2)).to(x.dtype)


def _blocks(n: int) -> dict[str, int]:
    side = power_of_2(n)
    return {"N": n, "SIDE": side, "BLOCK": min(MOST_COLS, ELEMENTS // side**2), "num_warps": WARPS}


def mhc_post_res_fwd(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """x [..., N, C], y [..., C], post [..., N], res [..., N, N] -> out [..., N, C]."""
    n, c = x.shape[-2:]
    out = like(x)
    if out.numel() == 0:
        return out
    rows, stride = streams_of(x)
    y = rows_of(y)
    launch(
        _mhc_post_res_fwd_kernel, (tokens_of(x),),
        rows, y, post, res, out, stride, row_stride(y), c,
        STAGES=STAGES_FWD, **_blocks(n),
    )  # fmt: skip
    return out


def mhc_post_res_bwd(
    dout: Tensor, x: Tensor, y: Tensor, post: Tensor, res: Tensor, wants: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """dout, x [..., N, C], y [..., C], post [..., N], res [..., N, N] -> dx, dy, dpost, dres; those wanted."""
    n, c = x.shape[-2:]
    nothing = x.numel() == 0
    dx, dy, dpost, dres = (
        (torch.zeros_like if nothing else like)(t) if wanted else None
        for t, wanted in zip((x, y, post, res), wants, strict=True)
    )
    if nothing or not any(wants):
        return dx, dy, dpost, dres
    rows, stride = streams_of(x)
    dout, dout_stride = streams_of(dout)
    y = rows_of(y)
    launch(
        _mhc_post_res_bwd_kernel, (tokens_of(x),),
        dout, rows, y, post, res, dx, dy, dpost, dres, dout_stride, stride, row_stride(y), c,
        WANTS_DX=wants[0], WANTS_DY=wants[1], WANTS_DPOST=wants[2], WANTS_DRES=wants[3],
        STAGES=STAGES_BWD, **_blocks(n),
    )  # fmt: skip
    return dx, dy, dpost, dres


class MHCPostResFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, post, res)
        return mhc_post_res_fwd(x, y, post, res)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor) -> tuple[Tensor | None, ...]:
        return mhc_post_res_bwd(dout, *ctx.saved_tensors, ctx.needs_input_grad)


def mhc_post_res(x: Tensor, y: Tensor, post: Tensor, res: Tensor) -> Tensor:
    """``res @ x + post * y`` for each token: [..., N, C], of x's dtype.

    Streams x [..., N, C], the layer's output y [..., C], post [..., N], res [..., N, N]: ``res[..., i, j]`` is what of
    stream j goes to stream i (DeepSeek-V4 of transformers has it the other way: ``res.transpose(-1, -2)``). N is at
    most 16.
    """
    op = "mhc_post_res"
    check_streams(op, x)
    *leading, n, c = x.shape
    for name, tensor, shape in (("y", y, (*leading, c)), ("post", post, (*leading, n)), ("res", res, (*leading, n, n))):
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} {tuple(tensor.shape)} must be {shape} for x {tuple(x.shape)}")
    if not runs_kernels(x, y, post, res):
        return mhc_post_res_reference(x, y, post, res)
    check_dtypes(op, x=x, y=y, post=post, res=res)
    post, res = post.contiguous(), res.contiguous()
    if torch.compiler.is_compiling():
        # as in rms_norm
        flat = x.reshape(-1, n, c), y.reshape(-1, c), post.reshape(-1, n), res.reshape(-1, n, n)
        return MHCPostResFunction.apply(*flat).view(x.shape)
    return MHCPostResFunction.apply(x, y, post, res)
