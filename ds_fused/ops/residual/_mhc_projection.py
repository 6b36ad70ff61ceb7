"""Kernels of the way back through the projection of mhc_coefficients.

Sizes: T tokens, N streams of C columns, K = N C, M = N^2 + 2 N coefficients, S parts of the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.residual._mhc_kernels import product


@triton.jit(do_not_specialize=["n_rows"])
def _mhc_projection_bwd_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [M, K]
    dz_ptr,  # [PARTS, T, BLOCK_M]: the gradient of x @ weight.T, cut into numbers of x's dtype; or fp32 in one
    factor_ptr,  # [T] fp32: what of dx is x times it
    dy_ptr,  # [T, C]: the gradient of what the layer reads, of which pre goes to each stream
    pre_ptr,  # [T, N]
    dstreams_ptr,  # [T, K]: the gradient of x itself, where it goes on elsewhere too
    dx_ptr,  # [T, K]
    dweights_ptr,  # [S, M, K]: the sums over these tokens
    x_stride,  # elements from one row to the next; weight and dx have no gaps
    dy_stride,
    dstreams_stride,
    n_rows,
    n_cols,  # of a stream
    N: tl.constexpr, BLOCK_M: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_DWEIGHT: tl.constexpr,
    HAS_DY: tl.constexpr, HAS_DSTREAMS: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some columns of a stream, of which a program reads each token once: dx, and what they add to dweight."""
    blocks = tl.cdiv(n_cols, BLOCK_COLS)
    stream = tl.program_id(0) // blocks
    col = (tl.program_id(0) % blocks) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    cols = (stream * n_cols + col)[None, :]
    col = col[None, :]
    width = tl.cast(n_cols, tl.int64) * N
    far = tl.cast(n_rows, tl.int64) * BLOCK_M  # from one part of dz to the next
    WHOLE: tl.constexpr = 0 if PARTS == 0 else 1  # no operand is cut here
    m = tl.arange(0, BLOCK_M)
    is_coefficient = m < N * N + 2 * N
    if WANTS_DX:
        weight = tl.load(
            weight_ptr + m[:, None] * (n_cols * N) + cols,
            mask=is_coefficient[:, None] & (col < n_cols),
            other=0.0,
        )
    dweight = tl.zeros((BLOCK_COLS, BLOCK_M), tl.float32)
    # within a tile: what of an address is the same for all tiles is computed once
    row = tl.arange(0, BLOCK_ROWS)
    below = row.to(tl.int64)[:, None]
    split = tl.program_id(1).to(tl.int64)
    step = tl.num_programs(1).to(tl.int64) * BLOCK_ROWS
    for begin in tl.range(split * BLOCK_ROWS, n_rows, step, num_stages=STAGES):
        exists = row < n_rows - begin
        mask = exists[:, None] & (col < n_cols)
        is_dz = exists[:, None] & is_coefficient[None, :]
        x = tl.load(x_ptr + begin * x_stride + (below * x_stride + cols), mask=mask, other=0.0)
        dz_at = dz_ptr + begin * BLOCK_M + (row[:, None] * BLOCK_M + m[None, :])
        dz = tl.load(dz_at, mask=is_dz, other=0.0)
        if WANTS_DWEIGHT:
            added = product(tl.trans(x), dz, WHOLE, PRECISION)
            for part in tl.static_range(1, PARTS):
                added += tl.dot(tl.trans(x), tl.load(dz_at + part * far, mask=is_dz, other=0.0))
            # fma: as in the forward
            dweight = tl.fma(added, 1.0, dweight)
        if WANTS_DX:
            # of parts the first alone: rounded as dx is
            dx = product(dz, weight, WHOLE, PRECISION)
            factor = tl.load(factor_ptr + begin + row, mask=exists, other=0.0)
            dx += factor[:, None] * x.to(tl.float32)
            if HAS_DY:
                dy = tl.load(dy_ptr + begin * dy_stride + (below * dy_stride + col), mask=mask, other=0.0)
                pre = tl.load(pre_ptr + (begin + row) * N + stream, mask=exists, other=0.0)
                dx += pre[:, None] * dy.to(tl.float32)
            if HAS_DSTREAMS:
                at = dstreams_ptr + begin * dstreams_stride + (below * dstreams_stride + cols)
                dx += tl.load(at, mask=mask, other=0.0).to(tl.float32)
            tl.store(dx_ptr + begin * width + (below * width + cols), dx, mask=mask)
    if WANTS_DWEIGHT:
        tl.store(
            dweights_ptr + (split * (N * N + 2 * N) + m[None, :]) * width + tl.trans(cols),
            dweight,
            mask=is_coefficient[None, :] & tl.trans(col < n_cols),
        )


@triton.jit(do_not_specialize=["n_programs", "n_splits"])
def _mhc_sums_kernel(
    partial_ptr,  # [programs, 2, M] fp32: sums of dlogits, and of dlogits times mix
    dweights_ptr,  # [S, M, K] fp32
    dbias_ptr,  # [M]
    dscale_ptr,  # [3]
    dweight_ptr,  # [M, K]
    n_programs,
    n_splits,
    n_weights,  # M K
    N: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DWEIGHTS: tl.constexpr,
    WANTS_DBIAS: tl.constexpr, WANTS_DSCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first program adds up dbias and dscale, the others dweight."""
    pid = tl.program_id(0).to(tl.int64) - 1
    if pid < 0:
        m: tl.constexpr = N * N + 2 * N
        coefficient = tl.arange(0, BLOCK_M)[None, :]
        sums = tl.zeros((BLOCK_ROWS, BLOCK_M), tl.float32)
        products = tl.zeros((BLOCK_ROWS, BLOCK_M), tl.float32)
        for begin in range(0, n_programs, BLOCK_ROWS):
            rows = begin + tl.arange(0, BLOCK_ROWS)[:, None]
            mask = (rows < n_programs) & (coefficient < m)
            if WANTS_DBIAS:
                sums += tl.load(partial_ptr + rows * (2 * m) + coefficient, mask=mask, other=0.0)
            if WANTS_DSCALE:
                products += tl.load(partial_ptr + rows * (2 * m) + m + coefficient, mask=mask, other=0.0)
        if WANTS_DBIAS:
            tl.store(dbias_ptr + coefficient, tl.sum(sums, axis=0, keep_dims=True), mask=coefficient < m)
        if WANTS_DSCALE:
            products = tl.sum(products, axis=0, keep_dims=True)
            tl.store(dscale_ptr, tl.sum(tl.where(coefficient < N, products, 0.0)))
            is_post = (coefficient >= N) & (coefficient < 2 * N)
            tl.store(dscale_ptr + 1, tl.sum(tl.where(is_post, products, 0.0)))
            tl.store(dscale_ptr + 2, tl.sum(tl.where(coefficient >= 2 * N, products, 0.0)))
    elif HAS_DWEIGHTS:
        at = pid * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for split in range(n_splits):
            total += tl.load(dweights_ptr + split * tl.cast(n_weights, tl.int64) + at, mask=at < n_weights, other=0.0)
        tl.store(dweight_ptr + at, total, mask=at < n_weights)
