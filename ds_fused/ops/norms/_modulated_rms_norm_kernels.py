"""Kernels of modulated_rms_norm for rows that one program holds whole, and of its sums.

Sizes: N rows, M modulations of R rows each, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._row_tiles import over_rows
from ds_fused.ops.common._sums import leave
from ds_fused.ops.norms._wide_modulated_rms_norm import modulated, weight_or_one


@triton.jit(do_not_specialize=["n_rows", "n_all"])
def _modulated_rms_norm_fwd_kernel(
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    scale_ptr,  # [M, D]
    shift_ptr,  # [M, D]
    y_ptr,  # [N, D]
    rstd_ptr,  # [N]
    x_stride,  # elements from one row to the next; y has no gaps
    scale_stride,
    shift_stride,
    n_rows,  # of a modulation
    n_all,
    n_cols,
    eps,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BLOCKS: tl.constexpr,  # side by side, of which a row is made up
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    modulation = rows // n_rows
    blocks = ()
    squares = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        mask = (rows < n_all) & (cols < n_cols)
        x = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        blocks = blocks + (x,)
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / n_cols + eps)
    tl.store(rstd_ptr + rows, rstd, mask=rows < n_all)
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        mask = (rows < n_all) & (cols < n_cols)
        each = over_rows(cols, BLOCK_ROWS)
        y = modulated(
            blocks[block] * rstd, weight_ptr, scale_ptr, shift_ptr,
            each, modulation * scale_stride + cols, modulation * shift_stride + cols, mask, each < n_cols,
            x_ptr.dtype.element_ty, OFFSET, CAST_BEFORE, HAS_WEIGHT, HAS_SHIFT,
        )  # fmt: skip
        tl.store(y_ptr + rows * n_cols + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_rows", "n_programs", "n_sharers"])
def _modulated_rms_norm_bwd_kernel(
    dy_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    scale_ptr,  # [M, D]
    rstd_ptr,  # [N]
    dx_ptr,  # [N, D]
    dscale_ptr,  # [N, D], with PER_ROW
    dshift_ptr,  # [N, D], with PER_ROW
    products_ptr,  # [M, programs / n_sharers, D] fp32: sums of dy * x_hat; with PER_ROW parts of dweight
    sums_ptr,  # [M, programs / n_sharers, D] fp32: sums of dy
    dy_stride,  # elements from one row to the next; gradients have no gaps
    x_stride,
    scale_stride,
    n_rows,  # of a modulation
    n_programs,  # of a modulation
    n_cols,
    n_sharers,  # programs of a modulation whose sums go to one row
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    PER_ROW: tl.constexpr,  # each row has a modulation of its own, and all rows count as those of one
    WANTS_DX: tl.constexpr, WANTS_PRODUCTS: tl.constexpr, WANTS_DSCALE: tl.constexpr, WANTS_DSHIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, BLOCKS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    modulation, program = pid // n_programs, pid % n_programs
    weights, products, sums = (), (), ()
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        each = over_rows(cols, BLOCK_ROWS)
        weight = weight_or_one(weight_ptr, each, each < n_cols, OFFSET, CAST_BEFORE, HAS_WEIGHT)
        if not PER_ROW:
            scale_at = modulation * scale_stride + each
            weight *= 1.0 + tl.load(scale_ptr + scale_at, mask=each < n_cols, other=0.0).to(tl.float32)
        weights = weights + (weight,)
        products = products + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32),)
        sums = sums + (tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32),)

    step = n_programs * BLOCK_ROWS
    for start in tl.range(program * BLOCK_ROWS, n_rows, step, num_stages=STAGES):
        own = start + tl.arange(0, BLOCK_ROWS)[:, None]
        rows = modulation * n_rows + own
        rstd = tl.load(rstd_ptr + rows, mask=own < n_rows, other=0.0)
        hats, dhats, more_products, more_sums = (), (), (), ()
        along = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for block in tl.static_range(BLOCKS):
            cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
            mask = (own < n_rows) & (cols < n_cols)
            dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
            x_hat = tl.load(x_ptr + rows * x_stride + cols, mask=mask, other=0.0).to(tl.float32) * rstd
            dhat = dy * weights[block]
            product = dy * x_hat
            if PER_ROW:
                factor = 1.0 + tl.load(scale_ptr + rows * scale_stride + cols, mask=mask, other=0.0).to(tl.float32)
                if WANTS_DSCALE:
                    tl.store(dscale_ptr + rows * n_cols + cols, product * weights[block], mask=mask)
                if WANTS_DSHIFT:
                    tl.store(dshift_ptr + rows * n_cols + cols, dy, mask=mask)
                dhat *= factor
                product *= factor
            if WANTS_PRODUCTS:
                more_products = more_products + (products[block] + product,)
            if WANTS_DSHIFT and not PER_ROW:
                more_sums = more_sums + (sums[block] + dy,)
            along += dhat * x_hat
            hats = hats + (x_hat,)
            dhats = dhats + (dhat,)
        if WANTS_PRODUCTS:
            products = more_products
        if WANTS_DSHIFT and not PER_ROW:
            sums = more_sums
        if WANTS_DX:
            mean = tl.sum(along, axis=1, keep_dims=True) / n_cols
            for block in tl.static_range(BLOCKS):
                cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
                dx = rstd * (dhats[block] - hats[block] * mean)
                tl.store(dx_ptr + rows * n_cols + cols, dx, mask=(own < n_rows) & (cols < n_cols))

    part = modulation * tl.cdiv(n_programs, n_sharers) + program // n_sharers
    for block in tl.static_range(BLOCKS):
        cols = block * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
        here = part * n_cols + cols
        if WANTS_PRODUCTS:
            leave(products_ptr + here, tl.sum(products[block], axis=0, keep_dims=True), cols < n_cols, n_sharers)
        if WANTS_DSHIFT and not PER_ROW:
            leave(sums_ptr + here, tl.sum(sums[block], axis=0, keep_dims=True), cols < n_cols, n_sharers)


@triton.jit(do_not_specialize=["n_modulations", "n_parts"])
def _modulated_rms_norm_sums_kernel(
    products_ptr,  # [M, parts, D] fp32: sums of dy * x_hat
    sums_ptr,  # [M, parts, D] fp32: sums of dy
    weight_ptr,  # [D]
    scale_ptr,  # [M, D]
    dscale_ptr,  # [M, D]
    dshift_ptr,  # [M, D]
    dweights_ptr,  # [its programs, D] fp32: parts of dweight; where one program has all modulations, dweight
    scale_stride,
    n_modulations,
    n_parts,  # of a modulation
    n_cols,
    OFFSET: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    WANTS_DWEIGHT: tl.constexpr, WANTS_DSCALE: tl.constexpr, WANTS_DSHIFT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Of one modulation after the other what its programs have left, added up."""
    pid = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    col_mask = cols < n_cols
    weight = weight_or_one(weight_ptr, cols, col_mask, OFFSET, CAST_BEFORE, HAS_WEIGHT)
    dweight = tl.zeros((1, BLOCK_COLS), tl.float32)
    for modulation in range(pid, n_modulations, tl.num_programs(1).to(tl.int64)):
        products = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        sums = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for start in range(0, n_parts, BLOCK_ROWS):
            rows = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
            mask = (rows < n_parts) & col_mask
            at = (modulation * n_parts + rows) * n_cols + cols
            if WANTS_DWEIGHT or WANTS_DSCALE:
                products += tl.load(products_ptr + at, mask=mask, other=0.0)
            if WANTS_DSHIFT:
                sums += tl.load(sums_ptr + at, mask=mask, other=0.0)
        product = tl.sum(products, axis=0, keep_dims=True)
        here = modulation * n_cols + cols
        if WANTS_DSCALE:
            tl.store(dscale_ptr + here, product * weight, mask=col_mask)
        if WANTS_DWEIGHT:
            scale = tl.load(scale_ptr + modulation * scale_stride + cols, mask=col_mask, other=0.0).to(tl.float32)
            dweight += product * (1.0 + scale)
        if WANTS_DSHIFT:
            tl.store(dshift_ptr + here, tl.sum(sums, axis=0, keep_dims=True), mask=col_mask)
    if WANTS_DWEIGHT:
        tl.store(dweights_ptr + pid * n_cols + cols, dweight, mask=col_mask)
