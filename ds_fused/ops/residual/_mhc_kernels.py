"""Kernels of the coefficients of hyper-connections: projection, gates and Sinkhorn-Knopp's iterations.

Tiles of the gates end in tokens: a thread has all or many of a token's numbers, and sums over streams need few others.

Sizes: T tokens, N streams of C columns, K = N C, M = N^2 + 2 N coefficients (pre, post and res, in this order); SIDE is
N, or the power of two above it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._exp import exp_of
from ds_fused.ops.common._sigmoid import exact_slope


@triton.jit
def product(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b in fp32. PARTS: how many numbers of a's dtype b is cut into, 3 for all bits of fp32; 0: both are fp32."""
    if PARTS == 0:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    high = b.to(a.dtype)
    y = tl.dot(a, high)
    if PARTS == 3:
        rest = b.to(tl.float32) - high.to(tl.float32)
        middle = rest.to(a.dtype)
        y += tl.dot(a, middle)
        y += tl.dot(a, (rest - middle.to(tl.float32)).to(a.dtype))
    return y


@triton.jit
def store_in_parts(at, part_stride, x, mask, PARTS: tl.constexpr):
    """x in fp32; or as so many numbers of the pointers' dtype, the sum of which is x."""
    if PARTS == 0:
        tl.store(at, x, mask=mask)
    for part in tl.static_range(PARTS):
        high = x.to(at.dtype.element_ty)
        tl.store(at + part * part_stride, high, mask=mask)
        x -= high.to(tl.float32)


@triton.jit
def start(logits, exists, eps):
    """softmax over the columns of logits [SIDE, SIDE, tokens], and it + eps, from where the iterations go on."""
    logits = tl.where(exists, logits, float("-inf"))
    top = tl.max(logits, axis=1, keep_dims=True)
    # a row that is not there has nothing but -inf
    shares = exp_of(logits - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(shares, axis=1, keep_dims=True)
    shares = tl.div_rn(shares, tl.where(total == 0.0, 1.0, total))
    return shares, tl.where(exists, shares + eps, 0.0)


@triton.jit
def scaled(matrix, rows, columns):
    """The matrix by factors of its rows and columns: numbers that are rounded before they are added up."""
    # Rounded by an fma, which no addition is taken into. Else each thread adds its own number unrounded to those of
    # others, and the threads of one row find sums that differ by an ulp: their factors drift apart with each iteration
    return tl.fma(matrix * rows, columns, 0.0)


@triton.jit
def normed_columns(matrix, rows, columns, missing, eps):
    """Factors of the columns that make their sums one; matrix is multiplied by those of rows and columns before."""
    # div_rn: the quotients of twenty iterations, each off by two ulp, are a matrix off by six
    return tl.div_rn(columns, tl.sum(scaled(matrix, rows, columns), axis=0, keep_dims=True) + eps + missing)


@triton.jit
def normed_rows(matrix, rows, columns, missing, eps):
    return tl.div_rn(rows, tl.sum(scaled(matrix, rows, columns), axis=1, keep_dims=True) + eps + missing)


@triton.jit
def logits_of(mix_ptr, bias_ptr, scale_ptr, coefficient, exists, part: tl.constexpr, n_rows, token):
    """Those of a part of the coefficients, and what of them is projected."""
    mix = tl.load(mix_ptr + coefficient * tl.cast(n_rows, tl.int64) + token, mask=exists & (token < n_rows), other=0.0)
    bias = tl.load(bias_ptr + coefficient, mask=exists, other=0.0).to(tl.float32)
    return mix * tl.load(scale_ptr + part).to(tl.float32) + bias, mix


# n_rows is not specialized: a batch whose token count is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_rows", "iterations"])
def _mhc_coefficients_fwd_kernel(
    x_ptr,  # [T, K]
    weight_ptr,  # [M, K]
    bias_ptr,  # [M]
    scale_ptr,  # [3]
    pre_ptr,  # [T, N]
    post_ptr,  # [T, N]
    res_ptr,  # [T, N, N]
    mix_ptr,  # [M, T] fp32: what is projected, by the norm
    rstd_ptr,  # [T]
    x_stride,  # elements from one row to the next; the weight has no gaps
    n_rows,
    n_cols,
    iterations,
    eps,
    pre_eps,
    sinkhorn_eps,
    post_factor,
    N: tl.constexpr, SIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    pre_eps = tl.cast(pre_eps, tl.float32)
    sinkhorn_eps = tl.cast(sinkhorn_eps, tl.float32)
    post_factor = tl.cast(post_factor, tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    far = tl.cast(n_rows, tl.int64)
    rows = first + tl.arange(0, BLOCK_ROWS)
    exists = rows < n_rows
    m = tl.arange(0, BLOCK_M)
    y = tl.zeros((BLOCK_ROWS, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for begin in tl.range(0, n_cols, BLOCK_COLS, num_stages=STAGES):
        cols = begin + tl.arange(0, BLOCK_COLS)
        x = tl.load(
            x_ptr + rows[:, None] * x_stride + cols[None, :],
            mask=exists[:, None] & (cols < n_cols)[None, :],
            other=0.0,
        )
        weight = tl.load(
            weight_ptr + m[None, :] * n_cols + cols[:, None],
            mask=(m < N * N + 2 * N)[None, :] & (cols < n_cols)[:, None],
            other=0.0,
        )
        # fma: a sum is taken into the tensor cores, which cut off what they add up
        y = tl.fma(product(x, weight, PARTS, PRECISION), 1.0, y)
        wide = x.to(tl.float32)
        squares += wide * wide
    rstd = tl.rsqrt(tl.sum(squares, axis=1) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=exists)
    tl.store(
        mix_ptr + m[None, :] * far + rows[:, None],
        y * rstd[:, None],
        mask=exists[:, None] & (m < N * N + 2 * N)[None, :],
    )

    # one thread may read what another one wrote
    tl.debug_barrier()
    i = tl.arange(0, SIDE)[:, None]
    token = first + tl.arange(0, BLOCK_ROWS)[None, :]
    mask = (i < N) & (token < n_rows)
    logits, _ = logits_of(mix_ptr, bias_ptr, scale_ptr, i, i < N, 0, n_rows, token)
    tl.store(pre_ptr + token * N + i, tl.sigmoid(logits) + pre_eps, mask=mask)
    logits, _ = logits_of(mix_ptr, bias_ptr, scale_ptr, N + i, i < N, 1, n_rows, token)
    tl.store(post_ptr + token * N + i, tl.sigmoid(logits) * post_factor, mask=mask)

    i = tl.arange(0, SIDE)[:, None, None]
    j = tl.arange(0, SIDE)[None, :, None]
    token = first + tl.arange(0, BLOCK_ROWS)[None, None, :]
    exists = (i < N) & (j < N)
    mask = exists & (token < n_rows)
    logits, _ = logits_of(mix_ptr, bias_ptr, scale_ptr, 2 * N + i * N + j, exists, 2, n_rows, token)
    _, matrix = start(logits, exists, sinkhorn_eps)
    no_row, no_column = tl.where(i < N, 0.0, 1.0), tl.where(j < N, 0.0, 1.0)
    by_row = tl.full((SIDE, 1, BLOCK_ROWS), 1.0, tl.float32)
    by_column = tl.full((1, SIDE, BLOCK_ROWS), 1.0, tl.float32)
    by_column = normed_columns(matrix, by_row, by_column, no_column, sinkhorn_eps)
    for _ in range(1, iterations):
        by_row = normed_rows(matrix, by_row, by_column, no_row, sinkhorn_eps)
        by_column = normed_columns(matrix, by_row, by_column, no_column, sinkhorn_eps)
    tl.store(res_ptr + (token * N + i) * N + j, matrix * by_row * by_column, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "iterations"])
def _mhc_gates_bwd_kernel(
    mix_ptr,  # [M, T]
    rstd_ptr,  # [T]
    bias_ptr,  # [M]
    scale_ptr,  # [3]
    dpre_ptr,  # [T, N]
    dpost_ptr,  # [T, N]
    dres_ptr,  # [T, N, N]
    dz_ptr,  # [PARTS, T, BLOCK_M]: the gradient of x @ weight.T, cut into numbers of x's dtype; or fp32 in one
    factor_ptr,  # [T] fp32: what of dx is x times it, through the norm
    scratch_ptr,  # [programs, iterations, 2, SIDE, BLOCK] fp32: factors of rows and columns after each iteration
    partial_ptr,  # [programs, 2, M] fp32: this program's sums of dlogits, and of dlogits times mix
    n_rows,
    n_cols,
    iterations,
    sinkhorn_eps,
    post_factor,
    N: tl.constexpr, SIDE: tl.constexpr, BLOCK_M: tl.constexpr, PARTS: tl.constexpr,
    HAS_DPRE: tl.constexpr, HAS_DPOST: tl.constexpr, HAS_DRES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Back through gates and iterations: these run once more, and leave in memory what the way back asks for."""
    # Inductor passes fp64
    sinkhorn_eps = tl.cast(sinkhorn_eps, tl.float32)
    post_factor = tl.cast(post_factor, tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    part_stride = tl.cast(n_rows, tl.int64) * BLOCK_M
    i2 = tl.arange(0, SIDE)[:, None]
    i = tl.arange(0, SIDE)[:, None, None]
    j = tl.arange(0, SIDE)[None, :, None]
    lane = tl.arange(0, BLOCK)
    no_row, no_column = tl.where(i < N, 0.0, 1.0), tl.where(j < N, 0.0, 1.0)
    scale = tl.load(scale_ptr).to(tl.float32)
    post_scale = tl.load(scale_ptr + 1).to(tl.float32)
    res_scale = tl.load(scale_ptr + 2).to(tl.float32)
    dpre_sums = tl.zeros((SIDE, BLOCK), tl.float32)
    dpost_sums = tl.zeros((SIDE, BLOCK), tl.float32)
    dres_sums = tl.zeros((SIDE, SIDE, BLOCK), tl.float32)
    pre_products = tl.zeros((SIDE, BLOCK), tl.float32)
    post_products = tl.zeros((SIDE, BLOCK), tl.float32)
    res_products = tl.zeros((SIDE, SIDE, BLOCK), tl.float32)

    scratch_ptr += pid * (iterations * 2 * SIDE * BLOCK)
    row_scratch = scratch_ptr + i * BLOCK + lane[None, None, :]
    column_scratch = scratch_ptr + (SIDE + j) * BLOCK + lane[None, None, :]
    for begin in range(pid * BLOCK, n_rows, tl.num_programs(0).to(tl.int64) * BLOCK):
        # of dlogits times mix, over all coefficients of a token
        along = tl.zeros((BLOCK,), tl.float32)
        token = begin + lane[None, :]
        rstd = tl.load(rstd_ptr + token, mask=token < n_rows, other=0.0)
        mask = (i2 < N) & (token < n_rows)
        dlogits = tl.zeros((SIDE, BLOCK), tl.float32)
        if HAS_DPRE:
            logits, mix = logits_of(mix_ptr, bias_ptr, scale_ptr, i2, i2 < N, 0, n_rows, token)
            dlogits = tl.load(dpre_ptr + token * N + i2, mask=mask, other=0.0) * exact_slope(logits)
            dpre_sums += dlogits
            pre_products += dlogits * mix
            along += scale * tl.sum(dlogits * mix, axis=0)
        store_in_parts(dz_ptr + token * BLOCK_M + i2, part_stride, scale * dlogits * rstd, mask, PARTS)
        dlogits = tl.zeros((SIDE, BLOCK), tl.float32)
        if HAS_DPOST:
            logits, mix = logits_of(mix_ptr, bias_ptr, scale_ptr, N + i2, i2 < N, 1, n_rows, token)
            dpost = tl.load(dpost_ptr + token * N + i2, mask=mask, other=0.0)
            dlogits = dpost * post_factor * exact_slope(logits)
            dpost_sums += dlogits
            post_products += dlogits * mix
            along += post_scale * tl.sum(dlogits * mix, axis=0)
        store_in_parts(dz_ptr + token * BLOCK_M + N + i2, part_stride, post_scale * dlogits * rstd, mask, PARTS)

        token = begin + lane[None, None, :]
        exists = (i < N) & (j < N)
        mask = exists & (token < n_rows)
        coefficient = 2 * N + i * N + j
        dlogits = tl.zeros((SIDE, SIDE, BLOCK), tl.float32)
        if HAS_DRES:
            logits, mix = logits_of(mix_ptr, bias_ptr, scale_ptr, coefficient, exists, 2, n_rows, token)
            shares, matrix = start(logits, exists, sinkhorn_eps)
            by_row = tl.full((SIDE, 1, BLOCK), 1.0, tl.float32)
            by_column = tl.full((1, SIDE, BLOCK), 1.0, tl.float32)
            by_column = normed_columns(matrix, by_row, by_column, no_column, sinkhorn_eps)
            tl.store(row_scratch, by_row)
            tl.store(column_scratch, by_column)
            for k in range(1, iterations):
                by_row = normed_rows(matrix, by_row, by_column, no_row, sinkhorn_eps)
                by_column = normed_columns(matrix, by_row, by_column, no_column, sinkhorn_eps)
                tl.store(row_scratch + k * (2 * SIDE * BLOCK), by_row)
                tl.store(column_scratch + k * (2 * SIDE * BLOCK), by_column)
            # one thread may read what another one wrote
            tl.debug_barrier()

            dmatrix = tl.load(dres_ptr + (token * N + i) * N + j, mask=mask, other=0.0)
            for back in range(1, iterations):
                k = iterations - 1 - back
                row_before = tl.load(row_scratch + k * (2 * SIDE * BLOCK))
                column_before = tl.load(column_scratch + k * (2 * SIDE * BLOCK))
                # of y = x / (sum(x) + eps): dx = (dy - sum(dy y)) / (sum(x) + eps)
                mean = tl.sum(dmatrix * (matrix * by_row * by_column), axis=0, keep_dims=True)
                dmatrix = (dmatrix - mean) * tl.div_rn(by_column, column_before)
                mean = tl.sum(dmatrix * (matrix * by_row * column_before), axis=1, keep_dims=True)
                dmatrix = (dmatrix - mean) * tl.div_rn(by_row, row_before)
                by_row, by_column = row_before, column_before
            # what is not there has been given a gradient by the means
            mean = tl.sum(dmatrix * (matrix * by_column), axis=0, keep_dims=True)
            dmatrix = (dmatrix - mean) * by_column
            dlogits = shares * (dmatrix - tl.sum(dmatrix * shares, axis=1, keep_dims=True))
            dres_sums += dlogits
            res_products += dlogits * mix
            along += res_scale * tl.sum(tl.sum(dlogits * mix, axis=0), axis=0)
            # the next tokens' factors come where these have been read
            tl.debug_barrier()
        rstd = tl.load(rstd_ptr + token, mask=token < n_rows, other=0.0)
        store_in_parts(dz_ptr + token * BLOCK_M + coefficient, part_stride, res_scale * dlogits * rstd, mask, PARTS)
        token = begin + lane
        rstd = tl.load(rstd_ptr + token, mask=token < n_rows, other=0.0)
        tl.store(factor_ptr + token, -along * rstd * rstd / n_cols, mask=token < n_rows)

    m: tl.constexpr = N * N + 2 * N
    partial_ptr += pid * (2 * m)
    i1 = tl.arange(0, SIDE)
    tl.store(partial_ptr + i1, tl.sum(dpre_sums, axis=1), mask=i1 < N)
    tl.store(partial_ptr + N + i1, tl.sum(dpost_sums, axis=1), mask=i1 < N)
    tl.store(partial_ptr + m + i1, tl.sum(pre_products, axis=1), mask=i1 < N)
    tl.store(partial_ptr + m + N + i1, tl.sum(post_products, axis=1), mask=i1 < N)
    i = tl.arange(0, SIDE)[:, None]
    j = tl.arange(0, SIDE)[None, :]
    at = partial_ptr + 2 * N + i * N + j
    tl.store(at, tl.sum(dres_sums, axis=2), mask=(i < N) & (j < N))
    tl.store(at + m, tl.sum(res_products, axis=2), mask=(i < N) & (j < N))
