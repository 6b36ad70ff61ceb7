"""Kernels of mhc_pre and mhc_post_res: what a layer reads of streams, and writes.

A program has one token, whose streams it goes over in blocks of columns; sums over columns are taken at the end.

Sizes: T tokens, N streams, C columns; SIDE is N, or the power of two above it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weights_of(post_ptr, res_ptr, N: tl.constexpr, SIDE: tl.constexpr):
    """A token's post [SIDE, 1, 1] and res [SIDE, SIDE, 1], loaded as they lie: see the backward of pre."""
    i = tl.arange(0, SIDE)
    post = tl.load(post_ptr + i, mask=i < N, other=0.0).to(tl.float32)
    at = i[:, None] * N + i[None, :]
    res = tl.load(res_ptr + at, mask=(i < N)[:, None] & (i < N)[None, :], other=0.0).to(tl.float32)
    return post[:, None, None], res[:, :, None]


@triton.jit
def _mhc_pre_fwd_kernel(
    x_ptr,  # [T, N, C]
    pre_ptr,  # [T, N]
    y_ptr,  # [T, C]
    x_stride,  # elements from one token to the next; y has no gaps
    n_cols,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_cols, BLOCK)
    token = tl.program_id(0).to(tl.int64) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    y = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(N):
        x = tl.load(x_ptr + token * x_stride + i * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
        y += tl.load(pre_ptr + token * N + i).to(tl.float32) * x
    tl.store(y_ptr + token * n_cols + cols, y, mask=mask)


@triton.jit
def _mhc_pre_bwd_kernel(
    dy_ptr,  # [T, C]
    x_ptr,  # [T, N, C]
    pre_ptr,  # [T, N]
    dx_ptr,  # [T, N, C]
    dpre_ptr,  # [T, N]
    dy_stride,  # elements from one token to the next; dx has no gaps
    x_stride,
    n_cols,
    N: tl.constexpr, SIDE: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_DPRE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, SIDE)
    # loaded as it lies: with a dimension of columns each thread would load it as often as it has columns
    pre = tl.load(pre_ptr + token * N + i, mask=i < N, other=0.0).to(tl.float32)[:, None]
    i = i[:, None]
    products = tl.zeros((SIDE, BLOCK), tl.float32)
    for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = (i < N) & (cols < n_cols)
        dy = tl.load(dy_ptr + token * dy_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        if WANTS_DPRE:
            x = tl.load(x_ptr + token * x_stride + i * n_cols + cols, mask=mask, other=0.0).to(tl.float32)
            products += dy * x
        if WANTS_DX:
            tl.store(dx_ptr + (token * N + i) * n_cols + cols, pre * dy, mask=mask)
    if WANTS_DPRE:
        tl.store(dpre_ptr + token * N + i, tl.sum(products, axis=1, keep_dims=True), mask=i < N)


@triton.jit
def _mhc_post_res_fwd_kernel(
    x_ptr,  # [T, N, C]
    y_ptr,  # [T, C]
    post_ptr,  # [T, N]
    res_ptr,  # [T, N, N]
    out_ptr,  # [T, N, C]
    x_stride,  # elements from one token to the next; out has no gaps
    y_stride,
    n_cols,
    N: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    post, res = weights_of(post_ptr + token * N, res_ptr + token * N * N, N, SIDE)
    i = tl.arange(0, SIDE)[:, None, None]
    j = tl.arange(0, SIDE)[None, :, None]
    for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)[None, None, :]
        x_mask, out_mask = (j < N) & (cols < n_cols), (i < N) & (cols < n_cols)
        x = tl.load(x_ptr + token * x_stride + j * n_cols + cols, mask=x_mask, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + token * y_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        out = tl.sum(res * x, axis=1, keep_dims=True) + post * y
        tl.store(out_ptr + (token * N + i) * n_cols + cols, out, mask=out_mask)


@triton.jit
def _mhc_post_res_bwd_kernel(
    dout_ptr,  # [T, N, C]
    x_ptr,  # [T, N, C]
    y_ptr,  # [T, C]
    post_ptr,  # [T, N]
    res_ptr,  # [T, N, N]
    dx_ptr,  # [T, N, C]
    dy_ptr,  # [T, C]
    dpost_ptr,  # [T, N]
    dres_ptr,  # [T, N, N]
    dout_stride,  # elements from one token to the next; gradients have no gaps
    x_stride,
    y_stride,
    n_cols,
    N: tl.constexpr, SIDE: tl.constexpr,
    WANTS_DX: tl.constexpr, WANTS_DY: tl.constexpr, WANTS_DPOST: tl.constexpr, WANTS_DRES: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    post, res = weights_of(post_ptr + token * N, res_ptr + token * N * N, N, SIDE)
    i = tl.arange(0, SIDE)[:, None, None]
    j = tl.arange(0, SIDE)[None, :, None]
    dpost = tl.zeros((SIDE, 1, BLOCK), tl.float32)
    dres = tl.zeros((SIDE, SIDE, BLOCK), tl.float32)
    for start in tl.range(0, n_cols, BLOCK, num_stages=STAGES):
        cols = start + tl.arange(0, BLOCK)[None, None, :]
        x_mask, out_mask = (j < N) & (cols < n_cols), (i < N) & (cols < n_cols)
        dout = tl.load(dout_ptr + token * dout_stride + i * n_cols + cols, mask=out_mask, other=0.0).to(tl.float32)
        if WANTS_DPOST:
            y = tl.load(y_ptr + token * y_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            dpost += dout * y
        if WANTS_DRES:
            x = tl.load(x_ptr + token * x_stride + j * n_cols + cols, mask=x_mask, other=0.0).to(tl.float32)
            dres += dout * x
        if WANTS_DX:
            dx = tl.sum(res * dout, axis=0, keep_dims=True)
            tl.store(dx_ptr + (token * N + j) * n_cols + cols, dx, mask=x_mask)
        if WANTS_DY:
            dy = tl.sum(post * dout, axis=0, keep_dims=True)
            tl.store(dy_ptr + token * n_cols + cols, dy, mask=cols < n_cols)
    if WANTS_DPOST:
        tl.store(dpost_ptr + token * N + i, tl.sum(dpost, axis=2, keep_dims=True), mask=i < N)
    if WANTS_DRES:
        tl.store(dres_ptr + (token * N + i) * N + j, tl.sum(dres, axis=2, keep_dims=True), mask=(i < N) & (j < N))
