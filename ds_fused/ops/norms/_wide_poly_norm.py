"""poly_norm's kernels for rows too wide for registers, and the steps that they share with those of whole rows.

A wide row is walked in blocks, twice (the second walk hits L2).

Sizes: N rows, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def factors(weight_ptr):
    """Of the cube, the square, and x."""
    return (
        tl.load(weight_ptr).to(tl.float32),
        tl.load(weight_ptr + 1).to(tl.float32),
        tl.load(weight_ptr + 2).to(tl.float32),
    )


@triton.jit
def _add3(a3, a2, a1, b3, b2, b1):
    return a3 + b3, a2 + b2, a1 + b1


@triton.jit
def _add4(a3, a2, a1, a0, b3, b2, b1, b0):
    return a3 + b3, a2 + b2, a1 + b1, a0 + b0


@triton.jit
def sums_of_three(sums):
    """Along rows, together: warps meet once, not once for each."""
    return tl.reduce(sums, 1, _add3, keep_dims=True)


@triton.jit
def sums_of_four(sums, TOGETHER: tl.constexpr):
    if TOGETHER:
        return tl.reduce(sums, 1, _add4, keep_dims=True)
    return (
        tl.sum(sums[0], 1, keep_dims=True), tl.sum(sums[1], 1, keep_dims=True),
        tl.sum(sums[2], 1, keep_dims=True), tl.sum(sums[3], 1, keep_dims=True),
    )  # fmt: skip


@triton.jit
def polynomial(x, cubic, quadratic, linear, bias_ptr, HAS_BIAS: tl.constexpr):
    """((cubic x + quadratic) x + linear) x + bias, in fp32."""
    y = ((cubic * x + quadratic) * x + linear) * x
    if HAS_BIAS:
        y += tl.load(bias_ptr).to(tl.float32)
    return y


@triton.jit
def slope(x, dy, factor3, factor2, factor1, mean3, mean2, mean1):
    """dx: of each power p times factor x^(p-1) (dy - x^p mean). factor: weight rstd; mean: rstd^2 mean(dy x^p)."""
    # in two polynomials of few steps: as it stands above, 236 bytes a thread spill on sm90 at 16384 columns of fp32
    square = x * x
    direct = (3.0 * factor3 * x + 2.0 * factor2) * x + factor1
    through_means = (3.0 * factor3 * mean3 * square + 2.0 * factor2 * mean2) * square + factor1 * mean1
    return dy * direct - x * through_means


@triton.jit
def store_parts(partial_ptr, dweight3, dweight2, dweight1, dbias):
    """What this program has added up, where sum_partials looks for vectors of three and a number."""
    pid = tl.program_id(0).to(tl.int64)
    tl.store(partial_ptr + pid * 3, dweight3)
    tl.store(partial_ptr + pid * 3 + 1, dweight2)
    tl.store(partial_ptr + pid * 3 + 2, dweight1)
    tl.store(partial_ptr + 6 * tl.num_programs(0).to(tl.int64) + pid, dbias)


@triton.jit
def _poly_norm_fwd_walk_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [3]
    bias_ptr,  # [1]
    y_ptr,  # [N, D]
    rstds_ptr,  # [N, 3]
    x_stride,
    n_cols,
    eps,
    HAS_BIAS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers, read twice."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    sixths = tl.zeros((BLOCK_COLS,), tl.float32)
    fourths = tl.zeros((BLOCK_COLS,), tl.float32)
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        square = x * x
        sixths += square * square * square
        fourths += square * square
        squares += square
    rstd3 = tl.rsqrt(tl.sum(sixths) / n_cols + eps)
    rstd2 = tl.rsqrt(tl.sum(fourths) / n_cols + eps)
    rstd1 = tl.rsqrt(tl.sum(squares) / n_cols + eps)
    tl.store(rstds_ptr + row * 3, rstd3)
    tl.store(rstds_ptr + row * 3 + 1, rstd2)
    tl.store(rstds_ptr + row * 3 + 2, rstd1)
    weight3, weight2, weight1 = factors(weight_ptr)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        y = polynomial(x, weight3 * rstd3, weight2 * rstd2, weight1 * rstd1, bias_ptr, HAS_BIAS)
        tl.store(y_ptr + row * n_cols + cols, y, mask=cols < n_cols)


@triton.jit(do_not_specialize=["n_rows"])
def _poly_norm_bwd_walk_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [3]
    rstds_ptr,  # [N, 3]
    dx_ptr,  # [N, D]
    partial_ptr,  # [2, P, 3] and P fp32: see _poly_norm_bwd_kernel
    dy_stride,
    x_stride,
    n_rows,
    n_cols,
    WANTS_DX: tl.constexpr, WANTS_SUMS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Rows that are too wide for registers, one after the other, each read twice where dx is wanted."""
    pid = tl.program_id(0).to(tl.int64)
    weight3, weight2, weight1 = factors(weight_ptr)
    dweight3 = 0.0
    dweight2 = 0.0
    dweight1 = 0.0
    dbias = 0.0
    for row in range(pid, n_rows, tl.num_programs(0).to(tl.int64)):
        cubes = tl.zeros((BLOCK_COLS,), tl.float32)
        squares = tl.zeros((BLOCK_COLS,), tl.float32)
        products = tl.zeros((BLOCK_COLS,), tl.float32)
        dys = tl.zeros((BLOCK_COLS,), tl.float32)
        for start in range(0, n_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            dy = tl.load(dy_ptr + row * dy_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
            cubes += dy * x * x * x
            squares += dy * x * x
            products += dy * x
            dys += dy
        rstd3 = tl.load(rstds_ptr + row * 3)
        rstd2 = tl.load(rstds_ptr + row * 3 + 1)
        rstd1 = tl.load(rstds_ptr + row * 3 + 2)
        sum3 = rstd3 * tl.sum(cubes)
        sum2 = rstd2 * tl.sum(squares)
        sum1 = rstd1 * tl.sum(products)
        dweight3 += sum3
        dweight2 += sum2
        dweight1 += sum1
        dbias += tl.sum(dys)
        if WANTS_DX:
            for start in range(0, n_cols, BLOCK_COLS):
                cols = start + tl.arange(0, BLOCK_COLS)
                dy = tl.load(dy_ptr + row * dy_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
                dx = slope(
                    x, dy, weight3 * rstd3, weight2 * rstd2, weight1 * rstd1,
                    rstd3 * sum3 / n_cols, rstd2 * sum2 / n_cols, rstd1 * sum1 / n_cols,
                )  # fmt: skip
                tl.store(dx_ptr + row * n_cols + cols, dx, mask=cols < n_cols)
    if WANTS_SUMS:
        store_parts(partial_ptr, dweight3, dweight2, dweight1, dbias)
