"""rms_norm's kernels for rows that registers hold: several rows of a tile, or one, each of one block or more.

Sizes: N rows, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._row_tiles import over_rows
from ds_fused.ops.common._sums import leave
from ds_fused.ops.norms._wide_rms_norm import scaled, weight_at, x_or_sum


# n_rows is not specialized: a batch whose token count is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_rows"])
def _rms_norm_fwd_kernel(
    x_ptr,  # [N, D]
    residual_ptr,  # [N, D]
    weight_ptr,  # [D]
    bias_ptr,  # [D]
    y_ptr,  # [N, D]
    sum_ptr,  # [N, D]: x + residual
    rstd_ptr,  # [N]
    x_stride,  # elements from one row to the next; y and the sum have no gaps
    residual_stride,
    n_rows,
    n_cols,
    eps,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BLOCKS: tl.constexpr,  # side by side, of which a row is made up
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    blocks = ()
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        x = x_or_sum(
            x_ptr, residual_ptr, sum_ptr, rows * x_stride + cols, rows * residual_stride + cols, rows * n_cols + cols,
            (rows < n_rows) & (cols < n_cols), HAS_RESIDUAL,
        )  # fmt: skip
        blocks = blocks + (x,)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_rows)
    dtype: tl.constexpr = sum_ptr.dtype.element_ty if HAS_RESIDUAL else x_ptr.dtype.element_ty
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        each = over_rows(cols, BLOCK_ROWS)
        y = scaled(
            blocks[block] * rstd, weight_ptr, bias_ptr, each, each < n_cols, dtype,
            OFFSET, CAST_BEFORE, HAS_WEIGHT, HAS_BIAS,
        )  # fmt: skip
        tl.store(y_ptr + rows * n_cols + cols, y, mask=(rows < n_rows) & (cols < n_cols))


@triton.jit(do_not_specialize=["n_rows", "n_sharers"])
def _rms_norm_bwd_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    rstd_ptr,  # [N]
    dsum_ptr,  # [N, D]: the gradient of x itself, where x is a sum that goes on elsewhere too
    dx_ptr,  # [N, D]; may be dy
    dweights_ptr,  # [programs / n_sharers, D] fp32: parts of dweight
    dbiases_ptr,  # the same of dbias
    dy_stride,  # elements from one row to the next; dx has no gaps
    x_stride,
    dsum_stride,
    n_rows,
    n_cols,
    n_sharers,  # programs whose sums go to one row
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_DSUM: tl.constexpr,
    WANTS_DX: tl.constexpr, WANTS_DWEIGHT: tl.constexpr, WANTS_DBIAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    weights, dweights, dbiases = (), (), ()
    for block in tl.static_range(BLOCKS):
        if HAS_WEIGHT:
            each = over_rows(block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :], BLOCK_ROWS)
            weights = weights + (weight_at(weight_ptr, each, each < n_cols, OFFSET, CAST_BEFORE),)
        dweights = dweights + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32),)
        dbiases = dbiases + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32),)

    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    for start in tl.range(pid * BLOCK_ROWS, n_rows, step, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < n_rows, other=0.0)
        hats, dhats, more_dweights, more_dbiases = (), (), (), ()
        for block in tl.static_range(BLOCKS):
            cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
            mask = (rows < n_rows) & (cols < n_cols)
            dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x_hat = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            if WANTS_DWEIGHT:
                more_dweights = more_dweights + (dweights[block] + dy * x_hat,)
            if WANTS_DBIAS:
                more_dbiases = more_dbiases + (dbiases[block] + dy,)
            if HAS_WEIGHT:
                dy *= weights[block]
            # not from zeros, which would be added to every value
            if block == 0:
                along = dy * x_hat
            else:
                along += dy * x_hat
            hats = hats + (x_hat,)
            dhats = dhats + (dy,)
        if WANTS_DWEIGHT:
            dweights = more_dweights
        if WANTS_DBIAS:
            dbiases = more_dbiases
        if WANTS_DX:
            mean = tl.sum(along, axis=1, keep_dims=True) / n_cols
            for block in tl.static_range(BLOCKS):
                cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
                mask = (rows < n_rows) & (cols < n_cols)
                dx = rstd * (dhats[block] - hats[block] * mean)
                if HAS_DSUM:
                    dx += tl.load(dsum_ptr + rows * dsum_stride + cols, mask=mask, other=0.0).to(tl.float32)
                tl.store(dx_ptr + rows * n_cols + cols, dx, mask=mask)

    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        here = pid // n_sharers * n_cols + cols
        if WANTS_DWEIGHT:
            leave(dweights_ptr + here, tl.sum(dweights[block], axis=0, keep_dims=True), cols < n_cols, n_sharers)
        if WANTS_DBIAS:
            leave(dbiases_ptr + here, tl.sum(dbiases[block], axis=0, keep_dims=True), cols < n_cols, n_sharers)
