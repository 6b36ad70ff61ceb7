"""layer_norm's kernels for rows too wide for registers, which are walked in blocks, twice (the second walk hits L2).

Backward, the walk makes dx alone. The sums of dweight and dbias go down columns, in a launch of their own that reads dy
and x once more: kept per row they would be read and written in memory for every row.

Sizes: N rows, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _layer_norm_fwd_walk_kernel(
    x_ptr,  # [N, D]
    residual_ptr,  # [N, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    y_ptr,  # [N, D]
    sum_ptr,  # [N, D]
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    x_stride,
    residual_stride,
    n_cols,
    eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    # every lane keeps count, mean and squared distances of its own values (Welford's update), and they are merged once
    count = tl.zeros((BLOCK_COLS,), tl.float32)
    means = tl.zeros((BLOCK_COLS,), tl.float32)
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    turn = 0.0
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x = x.to(sum_ptr.dtype.element_ty).to(tl.float32)
            tl.store(sum_ptr + row * n_cols + cols, x, mask=mask)
        turn += 1.0
        distance = tl.where(mask, x - means, 0.0)
        means += distance / turn
        squares += tl.where(mask, distance * (x - means), 0.0)
        count += tl.where(mask, 1.0, 0.0)
    # measured from some lane's mean, so that values far from zero don't cost bits
    some = tl.max(means)
    mean = some + tl.sum(count * (means - some)) / n_cols
    means -= mean
    rstd = tl.rsqrt(tl.sum(squares + count * means * means) / n_cols + eps)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)

    if HAS_RESIDUAL:
        # the second walk reads what the first has written, in other threads
        tl.debug_barrier()
        x_ptr = sum_ptr
        x_stride = n_cols
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        y = (tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


@triton.jit
def _layer_norm_bwd_walk_kernel(
    dy_ptr,  # [N, D]
    dsum_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    dx_ptr,  # [N, D]
    dy_stride,
    dsum_stride,
    x_stride,
    n_cols,
    HAS_DSUM: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """dx of one row that is too wide for registers."""
    row = tl.program_id(0).to(tl.int64)
    mean = tl.load(mean_ptr + row)
    rstd = tl.load(rstd_ptr + row)
    dys = tl.zeros((BLOCK_COLS,), tl.float32)
    products = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            dy *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dys += dy
        products += dy * ((x - mean) * rstd)
    aside = tl.sum(dys) / n_cols
    along = tl.sum(products) / n_cols

    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        x_hat = (tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            dy *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        dx = rstd * (dy - aside - x_hat * along)
        if HAS_DSUM:
            dx += tl.load(dsum_ptr + row * dsum_stride + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * n_cols + cols, dx, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _layer_norm_columns_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    mean_ptr,  # [N]
    rstd_ptr,  # [N]
    partial_ptr,  # [2, programs, D] fp32
    dy_stride,
    x_stride,
    n_rows,
    n_cols,
    WANTS_DWEIGHT: tl.constexpr, WANTS_DBIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Parts of dweight and dbias for some columns of rows that are too wide for registers."""
    pid = tl.program_id(1).to(tl.int64)
    programs = tl.num_programs(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(pid * BLOCK_ROWS, n_rows, programs * BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (rows < n_rows) & (cols < n_cols)
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        dbias += dy
        if WANTS_DWEIGHT:
            x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + rows, mask=rows < n_rows, other=0.0)
            rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
            dweight += dy * ((x - mean) * rstd)
    if WANTS_DWEIGHT:
        total = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(partial_ptr + pid * n_cols + cols, total, mask=cols < n_cols)
    if WANTS_DBIAS:
        total = tl.sum(dbias, axis=0, keep_dims=True)
        tl.store(partial_ptr + (programs + pid) * n_cols + cols, total, mask=cols < n_cols)
