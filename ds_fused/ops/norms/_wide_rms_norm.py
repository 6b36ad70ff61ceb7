"""rms_norm's kernels for rows too wide for registers, and the steps that they share with those of whole rows.

A wide row is walked in blocks, twice (the second walk hits L2). Backward, a program adds its part of dweight and dbias
up in memory, row by row.

Sizes: N rows, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._sums import add_to


@triton.jit
def x_or_sum(x_ptr, residual_ptr, sum_ptr, x_at, residual_at, sum_at, mask, HAS_RESIDUAL: tl.constexpr):
    """What is normalised, in fp32: x, or x + residual, which is rounded to its dtype and stored."""
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + residual_at, mask=mask, other=0.0).to(tl.float32)
        x = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + sum_at, x, mask=mask)
        x = x.to(tl.float32)
    return x


@triton.jit
def weight_at(weight_ptr, cols, mask, OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr):
    """offset + weight in fp32; as PyTorch does it, in weight's dtype where x_hat is cast before."""
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    if OFFSET == 0.0:
        return weight.to(tl.float32)
    moved = OFFSET + weight.to(tl.float32)
    if CAST_BEFORE:
        moved = moved.to(weight.dtype).to(tl.float32)
    return moved


@triton.jit
def scaled(
    x_hat, weight_ptr, bias_ptr, cols, mask, DTYPE: tl.constexpr,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """y in fp32. DTYPE: that of x."""
    y = x_hat
    if CAST_BEFORE and (HAS_WEIGHT or HAS_BIAS):
        y = y.to(DTYPE).to(tl.float32)
    if HAS_WEIGHT:
        y *= weight_at(weight_ptr, cols, mask, OFFSET, CAST_BEFORE)
    if HAS_BIAS:
        y += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _rms_norm_fwd_walk_kernel(
    x_ptr,  # [N, D]
    residual_ptr,  # [N, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    y_ptr,  # [N, D]
    sum_ptr,  # [N, D]
    rstd_ptr,  # [N]
    x_stride,
    residual_stride,
    n_cols,
    eps,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One row that is too wide for registers."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        x = x_or_sum(
            x_ptr,
            residual_ptr,
            sum_ptr,
            row * x_stride + cols,
            row * residual_stride + cols,
            row * n_cols + cols,
            cols < n_cols,
            HAS_RESIDUAL,
        )
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / n_cols + eps)
    tl.store(rstd_ptr + row, rstd)
    if HAS_RESIDUAL:
        # one thread may read what another one wrote
        tl.debug_barrier()
        x_row_ptr = sum_ptr + row * n_cols
    else:
        x_row_ptr = x_ptr + row * x_stride
    for start in range(0, n_cols, BLOCK_COLS):
        cols = start + tl.arange(0, BLOCK_COLS)
        mask = cols < n_cols
        x = tl.load(x_row_ptr + cols, mask=mask, other=0.0)
        y = scaled(
            x.to(tl.float32) * rstd,
            weight_ptr,
            bias_ptr,
            cols,
            mask,
            x.dtype,
            OFFSET,
            CAST_BEFORE,
            HAS_WEIGHT,
            HAS_BIAS,
        )
        tl.store(y_ptr + row * n_cols + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_bwd_walk_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    rstd_ptr,  # [N]
    dsum_ptr,  # [N, D]
    dx_ptr,  # [N, D]; may be dy
    dweights_ptr,  # [programs, D] fp32: this program's part of dweight, added to row by row
    dbiases_ptr,  # the same of dbias
    dy_stride,
    x_stride,
    dsum_stride,
    n_rows,
    n_cols,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DSUM: tl.constexpr,
    WANTS_DX: tl.constexpr, WANTS_DWEIGHT: tl.constexpr, WANTS_DBIAS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Rows that are too wide for registers, one after the other."""
    pid = tl.program_id(0).to(tl.int64)
    for row in range(pid, n_rows, tl.num_programs(0).to(tl.int64)):
        rstd = tl.load(rstd_ptr + row)
        if WANTS_DX:
            products = tl.zeros((BLOCK_COLS,), tl.float32)
            for start in range(0, n_cols, BLOCK_COLS):
                cols = start + tl.arange(0, BLOCK_COLS)
                mask = cols < n_cols
                dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
                x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
                if HAS_WEIGHT:
                    dy *= weight_at(weight_ptr, cols, mask, OFFSET, CAST_BEFORE)
                products += dy * (x * rstd)
            mean = tl.sum(products) / n_cols

        for start in range(0, n_cols, BLOCK_COLS):
            cols = start + tl.arange(0, BLOCK_COLS)
            mask = cols < n_cols
            dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x_hat = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            if WANTS_DWEIGHT:
                add_to(dweights_ptr + pid * n_cols + cols, dy * x_hat, mask, row == pid)
            if WANTS_DBIAS:
                add_to(dbiases_ptr + pid * n_cols + cols, dy, mask, row == pid)
            if WANTS_DX:
                if HAS_WEIGHT:
                    dy *= weight_at(weight_ptr, cols, mask, OFFSET, CAST_BEFORE)
                dx = rstd * (dy - x_hat * mean)
                if HAS_DSUM:
                    dx += tl.load(dsum_ptr + row * dsum_stride + cols, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_ptr + row * n_cols + cols, dx, mask=mask)
        # the next row's threads must see these sums
        tl.debug_barrier()
