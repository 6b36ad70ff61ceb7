"""Coefficients of manifold-constrained hyper-connections (mHC), by which a layer reads and writes N residual streams.

Of a token's streams x [N, C], flattened to K = N C numbers, ``mix = weight x / sqrt(mean(x^2) + eps)``; of its parts

    pre = sigmoid(scale[0] mix_pre + bias_pre) + pre_eps                      [N], what of each stream the layer reads
    post = post_factor sigmoid(scale[1] mix_post + bias_post)                 [N], what of its output goes to each
    res = Sinkhorn-Knopp(scale[2] mix_res + bias_res)                         [N, N], how streams are mixed

Sinkhorn-Knopp: a softmax over columns + sinkhorn_eps, of which columns are divided by their sums + sinkhorn_eps; then,
iterations - 1 times, rows by theirs and columns by theirs, which comes near a matrix whose rows and columns sum to one.
From Xie et al., "mHC: Manifold-Constrained Hyper-Connections" (DeepSeek, 2025, arXiv 2512.24880).

Everything is computed in fp32, products by tensor cores: beside streams of bf16 a weight of fp32 is cut into three bf16
numbers, which have all its bits, and products in fp32 are six in bf16 (three in tf32 before triton 3.6). The gradient
is that of the iterations as they are, not of their limit.

Saved for backward: x, weight, bias and scale, and in fp32 mix and 1/rms, M + 1 numbers of a token (M = N^2 + 2 N).
Traffic per token: forward K reads, backward K reads + K writes; the rest is small. Backward, the iterations run once
more, and leave 2 N factors of each for the way back (scratch of the programs that run side by side). dweight, dbias and
dscale are added up in a fixed order (no atomics: same input, same bits).

Sizes: T tokens (every leading dimension, flattened), N streams, C columns, K = N C, M = N^2 + 2 N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.common import _triton
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers, check_whole
from ds_fused.ops.common._triton import (
    cdiv,
    check_dtypes,
    multiprocessors,
    power_of_2,
    row_stride,
    rows_of,
    runs_kernels,
    stages_for,
    without_autocast,
)
from ds_fused.ops.residual._mhc_kernels import (
    _mhc_coefficients_fwd_kernel,
    _mhc_gates_bwd_kernel,
)
from ds_fused.ops.residual._mhc_projection import (
    _mhc_projection_bwd_kernel,
    _mhc_sums_kernel,
)
from ds_fused.ops.residual._streams import check_streams, streams_of, tokens_of

# Of products in fp32. Six of bf16: three of tf32, in as much time, are off by five times what PyTorch's are.
# TODO: the latter go when pyproject.toml asks for triton 3.6, the first that has the former
IN_FP32 = "bf16x6" if _triton.TRITON >= (3, 6) else "tf32x3"
# Tokens of a tile, at most: for as many the forward reads the weight again, from L2. None of the forward's is measured
# against others yet
MOST_ROWS_FWD, COLS_FWD, WARPS_FWD, STAGES_FWD = 64, 128, 4, 4
# 386 us for 16384 tokens of four streams of 4096 columns on an H100; four warps and two programs a multiprocessor 388,
# half the columns 403, twice the columns 391
MOST_ROWS_BWD, COLS_BWD, WARPS_BWD, STAGES_BWD, PROGRAMS_PER_MULTIPROCESSOR_BWD = 64, 128, 8, 4, 1
# with what mhc_in adds: 616 us, with twice the tokens 655 to 688, with four times as many 608 in more shared memory
# than an A100 has
MOST_ROWS_IN, PROGRAMS_PER_MULTIPROCESSOR_IN = 32, 2
# N^2 numbers of its tokens that a program of the gates, one warp, holds of each matrix, and the programs of a
# multiprocessor that have scratch
GATES, GATES_PER_MULTIPROCESSOR = 256, 16
# of the sums: weights of a program, and coefficients of all that it adds up at a time (2048: 32 us, 16384: 13)
SUM_BLOCK, SUM_COEFFICIENTS = 1024, 16384


class Options(NamedTuple):
    """What is no tensor."""

    iterations: int
    eps: float
    pre_eps: float
    sinkhorn_eps: float
    post_factor: float


def mhc_coefficients_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_factor: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    n = x.shape[-2]
    flat = x.flatten(-2)
    flat = flat.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias, scale = (t.to(flat.dtype) for t in (weight, bias, scale))
    with without_autocast(x):
        mix = F.linear(flat, weight)
    mix = mix * torch.rsqrt(flat.pow(2).mean(-1, keepdim=True) + eps)
    pre, post, res = (
        factor * part + offset
        for factor, part, offset in zip(scale, mix.split([n, n, n * n], -1), bias.split([n, n, n * n]), strict=True)
    )
    matrix = res.unflatten(-1, (n, n)).softmax(-1) + sinkhorn_eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + sinkhorn_eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + sinkhorn_eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + sinkhorn_eps)
    return pre.sigmoid() + pre_eps, post_factor * post.sigmoid(), matrix


class Through(NamedTuple):
    """What else x goes to, and dx gets from there: see mhc_in.py."""

    dy: Tensor | None  # [..., C]
    pre: Tensor  # [..., N]
    dstreams: Tensor | None  # [..., N, C]


class Sizes(NamedTuple):
    """Of x and of what the kernels make of it."""

    rows: int  # tokens
    streams: int
    cols: int  # of a stream
    coefficients: int
    side: int  # streams, as tiles have them
    block_m: int  # coefficients, as tiles have them

    @classmethod
    def of(cls, x: Tensor) -> Sizes:
        """x [..., N, C]."""
        n, c = x.shape[-2:]
        m = n * (n + 2)
        return cls(tokens_of(x), n, c, m, power_of_2(n), max(16, power_of_2(m)))

    def block_rows(self, x: Tensor, most: int) -> int:
        """As few tokens as give every multiprocessor a program, and as tensor cores take."""
        if self.block_m > 128:
            return 16
        # compared and not computed: torch.compile guards that much alone
        many = multiprocessors(x) * 16
        return 16 if self.rows <= many else min(32, most) if self.rows <= 2 * many else most


class Products(NamedTuple):
    """How products with x are made as exact as the result asks for: see `product` in _mhc_kernels.py."""

    parts: int
    precision: str

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, *, backward: bool) -> Products:
        precision = IN_FP32
        if x.dtype == torch.bfloat16:
            parts = 1 if weight.dtype == x.dtype else 3
        elif x.dtype == torch.float16 == weight.dtype:
            # backward not in fp16, whose range gradients would leave; tf32 has all bits of x
            parts, precision = (0, "tf32") if backward else (1, precision)
        else:
            parts = 0
        # of AMD's devices tensor cores have no such modes in Triton
        return cls(parts, "ieee" if _triton.LANES == 64 else precision)

    def tiles(self, cols: int, sizes: Sizes) -> dict[str, object]:
        """And the columns of x's and the weight's tiles: fewer where products are in fp32, or coefficients many."""
        fewer = (2 if self.parts == 0 else 1) * (1 if sizes.block_m <= 32 else 2 if sizes.block_m <= 128 else 8)
        return {"PARTS": self.parts, "PRECISION": self.precision, "BLOCK_COLS": max(16, cols // fewer)}


def mhc_coefficients_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [..., N, C], weight [M, K], bias [M], scale [3] -> pre, post [..., N], res [..., N, N], mix [M, T], rstd [T]"""
    leading, sizes = x.shape[:-2], Sizes.of(x)
    n = sizes.streams
    pre, post = (torch.empty((*leading, n), dtype=torch.float32, device=x.device) for _ in range(2))
    res = torch.empty((*leading, n, n), dtype=torch.float32, device=x.device)
    mix = torch.empty((sizes.coefficients, sizes.rows), dtype=torch.float32, device=x.device)
    rstd = torch.empty(sizes.rows, dtype=torch.float32, device=x.device)
    if sizes.rows == 0:
        return pre, post, res, mix, rstd
    block_rows = sizes.block_rows(x, MOST_ROWS_FWD)
    x, stride = streams_of(x)
    launch(
        _mhc_coefficients_fwd_kernel, (cdiv(sizes.rows, block_rows),),
        x, weight, bias, scale, pre, post, res, mix, rstd,
        stride, sizes.rows, n * sizes.cols, options.iterations,
        options.eps, options.pre_eps, options.sinkhorn_eps, options.post_factor,
        N=n, SIDE=sizes.side, BLOCK_M=sizes.block_m, **Products.of(x, weight, backward=False).tiles(COLS_FWD, sizes),
        BLOCK_ROWS=block_rows, STAGES=STAGES_FWD, num_warps=WARPS_FWD,
    )  # fmt: skip
    return pre, post, res, mix, rstd


def mhc_coefficients_bwd(
    dpre: Tensor | None,
    dpost: Tensor | None,
    dres: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    mix: Tensor,
    rstd: Tensor,
    options: Options,
    wants: tuple[bool, bool, bool, bool],
    through: Through | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of pre, post [..., N] and res [..., N, N], None where all zero, and what the forward had and saved.

    -> dx [..., N, C], dweight [M, K], dbias [M], dscale [3]; those wanted.
    """
    nothing = x.numel() == 0
    make = torch.zeros_like if nothing else torch.empty_like
    dx = _triton.like(x) if wants[0] else None
    dweight, dbias, dscale = (
        make(t) if wanted else None for t, wanted in zip((weight, bias, scale), wants[1:], strict=True)
    )
    if nothing or not any(wants):
        return dx, dweight, dbias, dscale
    sizes, device = Sizes.of(x), x.device
    n, m = sizes.streams, sizes.coefficients

    gates = max(2, min(32, GATES // sizes.side**2))
    programs = min(cdiv(sizes.rows, gates), multiprocessors(x) * GATES_PER_MULTIPROCESSOR)
    products = Products.of(x, weight, backward=True)
    dz = torch.empty(
        (max(1, products.parts), sizes.rows, sizes.block_m),
        dtype=x.dtype if products.parts else torch.float32, device=device,
    )  # fmt: skip
    # each in memory of its own: torch.compile gives every name that a kernel writes memory of its own
    factor, partial, scratch = (
        torch.empty(size, dtype=torch.float32, device=device)
        for size in (sizes.rows, programs * 2 * m, programs * options.iterations * 2 * sizes.side * gates)
    )
    launch(
        _mhc_gates_bwd_kernel, (programs,),
        mix, rstd, bias, scale, *(None if d is None else d.contiguous() for d in (dpre, dpost, dres)),
        dz, factor, scratch, partial, sizes.rows, n * sizes.cols, options.iterations, options.sinkhorn_eps,
        options.post_factor,
        N=n, SIDE=sizes.side, BLOCK_M=sizes.block_m, PARTS=products.parts,
        HAS_DPRE=dpre is not None, HAS_DPOST=dpost is not None, HAS_DRES=dres is not None, BLOCK=gates, num_warps=1,
    )  # fmt: skip
    # of dweight, where tokens are in parts; else it is written at once
    splits, dweights = 1, None
    if wants[0] or wants[1]:
        most, per_multiprocessor = MOST_ROWS_BWD, PROGRAMS_PER_MULTIPROCESSOR_BWD
        if through is not None:
            most, per_multiprocessor = MOST_ROWS_IN, PROGRAMS_PER_MULTIPROCESSOR_IN
        if products.parts == 0:
            # which are made of fp32 in registers
            most = min(most, 32)
        block_rows = sizes.block_rows(x, most)
        tiles = products.tiles(COLS_BWD, sizes)
        chunks = n * cdiv(sizes.cols, tiles["BLOCK_COLS"])
        splits = max(1, min(cdiv(sizes.rows, block_rows), multiprocessors(x) * per_multiprocessor // chunks))
        if wants[1] and splits > 1:
            dweights = torch.empty((splits, *weight.shape), dtype=torch.float32, device=device)
        dy = pre = dstreams = None
        dy_stride = dstreams_stride = 0
        if through is not None:
            dy, pre, dstreams = through
            if dy is not None:
                dy = rows_of(dy)
                dy_stride = row_stride(dy)
            if dstreams is not None:
                dstreams, dstreams_stride = streams_of(dstreams)
        x, stride = streams_of(x)
        # of a tile that is in flight
        of_x = tiles["BLOCK_COLS"] * x.itemsize * (1 + (dy is not None) + (dstreams is not None))
        row_bytes = of_x + max(1, products.parts) * sizes.block_m * dz.itemsize
        launch(
            _mhc_projection_bwd_kernel, (chunks, splits),
            x, weight, dz, factor, dy, pre, dstreams, dx, dweight if dweights is None else dweights,
            stride, dy_stride, dstreams_stride, sizes.rows, sizes.cols,
            N=n, BLOCK_M=sizes.block_m, WANTS_DX=wants[0], WANTS_DWEIGHT=wants[1],
            HAS_DY=dy is not None, HAS_DSTREAMS=dstreams is not None, **tiles,
            BLOCK_ROWS=block_rows, STAGES=stages_for(x, STAGES_BWD, block_rows * row_bytes),
            num_warps=WARPS_BWD * (1 if sizes.block_m <= 128 else 2),
        )  # fmt: skip
    in_parts = dweights is not None
    if wants[2] or wants[3] or in_parts:
        launch(
            _mhc_sums_kernel, (1 + (cdiv(weight.numel(), SUM_BLOCK) if in_parts else 0),),
            partial, dweights, dbias, dscale, dweight, programs, splits, weight.numel(),
            N=n, BLOCK_M=sizes.block_m, HAS_DWEIGHTS=in_parts, WANTS_DBIAS=wants[2], WANTS_DSCALE=wants[3],
            BLOCK_ROWS=SUM_COEFFICIENTS // sizes.block_m, BLOCK=SUM_BLOCK, num_warps=8,
        )  # fmt: skip
    return dx, dweight, dbias, dscale


class MHCCoefficientsFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, *options: float) -> tuple[Tensor, ...]:
        options = Options(*options)
        pre, post, res, mix, rstd = mhc_coefficients_fwd(x, weight, bias, scale, options)
        ctx.save_for_backward(x, weight, bias, scale, mix, rstd)
        ctx.options = options
        # a coefficient that nobody uses has no gradient: no zeros are made and read
        ctx.set_materialize_grads(False)
        return pre, post, res

    @staticmethod
    @once_differentiable
    def backward(ctx, dpre: Tensor | None, dpost: Tensor | None, dres: Tensor | None) -> tuple[Tensor | None, ...]:
        wants = ctx.needs_input_grad[:4]
        gradients = mhc_coefficients_bwd(dpre, dpost, dres, *ctx.saved_tensors, ctx.options, wants)
        return *gradients, *[None] * len(ctx.options)


def check_coefficients(op: str, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, options: Options) -> None:
    """x [..., N, C], weight [N^2 + 2 N, N C], bias [N^2 + 2 N], scale [3]."""
    check_streams(op, x, least=1)
    n, c = x.shape[-2:]
    m = n * (n + 2)
    for name, tensor, shape in (("weight", weight, (m, n * c)), ("bias", bias, (m,)), ("scale", scale, (3,))):
        if tensor.shape != shape:
            raise ValueError(f"{op}: {name} {tuple(tensor.shape)} must be {shape} for x {tuple(x.shape)}")
    check_whole(op, iterations=options.iterations)
    check_numbers(op, **options._asdict())
    if options.iterations < 1:
        raise ValueError(f"{op}: iterations is {options.iterations}; there must be at least 1")


def mhc_coefficients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    *,
    iterations: int = 20,
    eps: float = 1e-6,
    pre_eps: float = 0.0,
    sinkhorn_eps: float = 1e-6,
    post_factor: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """pre [..., N], post [..., N] and res [..., N, N] in fp32, of streams x [..., N, C].

    With ``mix = weight x / sqrt(mean(x^2) + eps)``, a token's streams being one vector,
    ``pre = sigmoid(scale[0] mix + bias) + pre_eps``, ``post = post_factor sigmoid(scale[1] mix + bias)`` and
    ``res = Sinkhorn-Knopp(scale[2] mix + bias)``, each of its own rows: a softmax over columns plus sinkhorn_eps, then
    ``iterations`` times (the first of columns alone) rows and columns divided by their sums plus sinkhorn_eps.

    weight [N^2 + 2 N, N C], as that of nn.Linear, bias [N^2 + 2 N], scale [3]: for pre, post and res. Liger's phi is
    the transposed weight: ``phi.T``, which is copied. N is at most 16; up to 4 it is fast. Other shapes, and fewer than
    one iteration, are a ValueError. From Xie et al. (DeepSeek), arXiv 2512.24880.
    """
    op = "mhc_coefficients"
    options = Options(iterations, eps, pre_eps, sinkhorn_eps, post_factor)
    check_coefficients(op, x, weight, bias, scale, options)
    if not runs_kernels(x, weight, bias, scale):
        return mhc_coefficients_reference(x, weight, bias, scale, **options._asdict())
    check_dtypes(op, x=x, weight=weight, bias=bias, scale=scale)
    weight, bias, scale = weight.contiguous(), bias.contiguous(), scale.contiguous()
    if torch.compiler.is_compiling():
        # as in rms_norm
        n, c = x.shape[-2:]
        pre, post, res = MHCCoefficientsFunction.apply(x.reshape(-1, n, c), weight, bias, scale, *options)
        return pre.view(x.shape[:-1]), post.view(x.shape[:-1]), res.view(*x.shape[:-1], n)
    return MHCCoefficientsFunction.apply(x, weight, bias, scale, *options)
