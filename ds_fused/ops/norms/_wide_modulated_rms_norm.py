"""modulated_rms_norm's kernels for rows too wide for registers, and the steps that they share with those of whole rows.

A wide row is walked in blocks, twice (the second walk hits L2). Backward, a program adds its sums up in memory, row by
row.

Sizes: N rows, M modulations of R rows each, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._sums import add_to
from ds_fused.ops.norms._wide_rms_norm import scaled, weight_at


@triton.jit
def modulated(
    x_hat, weight_ptr, scale_ptr, shift_ptr, cols, scale_at, shift_at, mask, col_mask, DTYPE: tl.constexpr,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr,
):  # fmt: skip
    """y in fp32. DTYPE: that of x."""
    y = scaled(x_hat, weight_ptr, None, cols, col_mask, DTYPE, OFFSET, CAST_BEFORE, HAS_WEIGHT, False)
    y *= 1.0 + tl.load(scale_ptr + scale_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_SHIFT:
        y += tl.load(shift_ptr + shift_at, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def weight_or_one(weight_ptr, cols, mask, OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        weight = weight_at(weight_ptr, cols, mask, OFFSET, CAST_BEFORE)
    else:
        weight = tl.full(cols.shape, 1.0, tl.float32)
    return weight


@triton.jit(do_not_specialize=["n_rows"])
def _modulated_rms_norm_fwd_walk_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    scale_ptr,  # [M, D]
    shift_ptr,  # [M, D]
    y_ptr,  # [N, D]
    rstd_ptr,  # [N]
    x_stride,
    scale_stride,
    shift_stride,
    n_rows,  # of a modulation
    n_cols,
    eps,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    modulation = row // n_rows
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / n_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
        y = modulated(
            x.to(tl.float32) * rstd, weight_ptr, scale_ptr, shift_ptr,
            cols, modulation * scale_stride + cols, modulation * shift_stride + cols, mask, mask, x.dtype,
            OFFSET, CAST_BEFORE, HAS_WEIGHT, HAS_SHIFT,
        )  # fmt: skip
        tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_programs"])
def _modulated_rms_norm_bwd_walk_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    scale_ptr,  # [M, D]
    rstd_ptr,  # [N]
    dx_ptr,  # [N, D]
    dscale_ptr,  # [N, D], with PER_ROW
    dshift_ptr,  # [N, D], with PER_ROW
    products_ptr,  # [M, programs, D] fp32, added to row by row
    sums_ptr,  # the same
    dy_stride,
    x_stride,
    scale_stride,
    n_rows,
    n_programs,
    n_cols,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, PER_ROW: tl.constexpr,
    WANTS_DX: tl.constexpr, WANTS_PRODUCTS: tl.constexpr, WANTS_DSCALE: tl.constexpr, WANTS_DSHIFT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Rows that are too wide for registers, one after the other; see _modulated_rms_norm_bwd_kernel."""
    pid = tl.program_id(0).to(tl.int64)
    modulation, program = pid // n_programs, pid % n_programs
    for own in range(program, n_rows, n_programs):
        row = modulation * n_rows + own
        scale_row_ptr = scale_ptr + (row if PER_ROW else modulation) * scale_stride
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros((BLOCK_COLS,), tl.float32)
        if WANTS_DX:
            for start in range(0, n_cols, BLOCK_COLS):
                cols = start + tl.arange(0, BLOCK_COLS)
                mask = cols < n_cols
                dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
                factor = 1.0 + tl.load(scale_row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
                weight = weight_or_one(weight_ptr, cols, mask, OFFSET, CAST_BEFORE, HAS_WEIGHT)
                products += dy * factor * weight * (x * rstd)
        mean = tl.sum(products) / n_cols

        for start in range(0, n_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = cols < n_cols
            dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x_hat = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            factor = 1.0 + tl.load(scale_row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            weight = weight_or_one(weight_ptr, cols, mask, OFFSET, CAST_BEFORE, HAS_WEIGHT)
            if WANTS_PRODUCTS:
                product = dy * factor * x_hat if PER_ROW else dy * x_hat
                add_to(products_ptr + pid * n_cols + cols, product, mask, own == program)
            if PER_ROW:
                if WANTS_DSCALE:
                    tl.store(dscale_ptr + row * n_cols + cols, dy * x_hat * weight, mask=mask)
                if WANTS_DSHIFT:
                    tl.store(dshift_ptr + row * n_cols + cols, dy, mask=mask)
            else:
                if WANTS_DSHIFT:
                    add_to(sums_ptr + pid * n_cols + cols, dy, mask, own == program)
            if WANTS_DX:
                dx = rstd * (dy * factor * weight - x_hat * mean)
                tl.store(dx_ptr + row * n_cols + cols, dx, mask=mask)
        # the next row's threads must see these sums
        tl.debug_barrier()
