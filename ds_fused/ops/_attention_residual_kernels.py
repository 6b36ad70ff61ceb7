"""attention_residual's kernels: a program goes over the blocks of its tokens one after the other.

Sizes: N blocks, T tokens, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def block_at(i, first_ptr, pointers, block_stride, LISTED: tl.constexpr):
    """Where block i begins: as many elements on as the stack says, or at its own pointer."""
    at = first_ptr
    if LISTED:
        for j in tl.static_range(15):
            if pointers[j] is not None:
                at = tl.where(i == j + 1, pointers[j], at)
    else:
        at += i * tl.cast(block_stride, tl.int64)
    return at


@triton.jit
def query_of_keys(query_ptr, weight_ptr, cols, mask, HAS_WEIGHT: tl.constexpr):
    """query * weight in fp32: what meets a row that is normed and not weighted."""
    query = tl.load(query_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        query *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return query


@triton.jit
def forward(
    v_ptr, pointers,  # a stack; or the first of the blocks, and the others, None where there are none
    query_ptr, weight_ptr, y_ptr, saved_ptr, block_stride, v_stride, n_blocks, n_rows, n_cols, eps,
    LISTED: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The mean of the blocks goes on from one to the next, as their softmax does."""
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    query = query_of_keys(query_ptr, weight_ptr, cols, cols < n_cols, HAS_WEIGHT)
    far = tl.cast(n_rows, tl.int64)  # from one block's scores to the next one's
    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK_ROWS, n_rows, step):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        exists = rows < n_rows
        mask = exists & (cols < n_cols)
        # of the blocks so far: the largest score, the sum of exponentials above it, and the sum of rows by them
        top = tl.full((BLOCK_ROWS, 1), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        y = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        for i in tl.range(0, n_blocks, num_stages=STAGES):
            at = block_at(i, v_ptr, pointers, block_stride, LISTED)
            v = tl.load(at + rows * v_stride + cols, mask=mask, other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / n_cols + eps)
            score = rstd * tl.sum(v * query, axis=1, keep_dims=True)
            tl.store(saved_ptr + i * far + rows, score, mask=exists)
            tl.store(saved_ptr + (n_blocks + i) * far + rows, rstd, mask=exists)
            higher = tl.maximum(top, score)
            keeps, share = tl.exp(top - higher), tl.exp(score - higher)
            total = total * keeps + share
            y = y * keeps + share * v
            top = higher
        tl.store(saved_ptr + 2 * n_blocks * far + rows, top, mask=exists)
        tl.store(saved_ptr + (2 * n_blocks + 1) * far + rows, total, mask=exists)
        tl.store(y_ptr + rows * n_cols + cols, y / total, mask=mask)


# n_rows and n_blocks are not specialized: each connection of a model has one block more than the one before
@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_fwd_kernel(
    v_ptr,  # [N, T, D]
    query_ptr,  # [D]
    weight_ptr,  # [D]
    y_ptr,  # [T, D]
    saved_ptr,  # [2 N + 2, T] fp32: the blocks' scores, their 1/rms; the largest score, and the sum of exponentials
    block_stride,  # elements from one block to the next
    v_stride,  # elements from one row to the next; y has no gaps
    n_blocks,
    n_rows,
    n_cols,
    eps,
    HAS_WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a stack."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    forward(
        v_ptr, None, query_ptr, weight_ptr, y_ptr, saved_ptr, block_stride, v_stride, n_blocks, n_rows, n_cols, eps,
        False, HAS_WEIGHT, BLOCK_ROWS, BLOCK_COLS, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_fwd_listed_kernel(
    v_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr,  # [T, D]
    v8_ptr, v9_ptr, v10_ptr, v11_ptr, v12_ptr, v13_ptr, v14_ptr, v15_ptr,
    query_ptr, weight_ptr, y_ptr, saved_ptr, v_stride, n_blocks, n_rows, n_cols, eps,
    HAS_WEIGHT: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of blocks that lie each by itself; kernels for stacks have no such pointers, which take the host time."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    forward(
        v_ptr,
        (v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr, v8_ptr,
         v9_ptr, v10_ptr, v11_ptr, v12_ptr, v13_ptr, v14_ptr, v15_ptr),
        query_ptr, weight_ptr, y_ptr, saved_ptr, 0, v_stride, n_blocks, n_rows, n_cols, eps,
        True, HAS_WEIGHT, BLOCK_ROWS, BLOCK_COLS, STAGES,
    )  # fmt: skip


@triton.jit
def backward(
    dy_ptr, v_ptr, pointers, dv_ptr, dpointers,  # as in the forward
    query_ptr, weight_ptr, saved_ptr, partial_ptr, dy_stride, block_stride, v_stride, n_blocks, n_rows, n_cols,
    LISTED: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr,
    HOLDS_QUERY: tl.constexpr,  # in registers, for all tokens
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Twice over the blocks of a token: for the mean of dy v, and for their gradients."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    if HOLDS_QUERY:
        query = query_of_keys(query_ptr, weight_ptr, cols, cols < n_cols, HAS_WEIGHT)
    if WANTS_SUMS:
        dquery = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    far = tl.cast(n_rows, tl.int64)  # from one block's scores to the next one's
    step = tl.num_programs(0).to(tl.int64) * BLOCK_ROWS
    for start in range(pid * BLOCK_ROWS, n_rows, step):
        rows = start + tl.arange(0, BLOCK_ROWS)[:, None]
        exists = rows < n_rows
        mask = exists & (cols < n_cols)
        dy = tl.load(dy_ptr + rows * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        top = tl.load(saved_ptr + 2 * n_blocks * far + rows, mask=exists, other=0.0)
        total = tl.load(saved_ptr + (2 * n_blocks + 1) * far + rows, mask=exists, other=1.0)

        # the mean of dy v by the blocks' shares, which each block's own is compared with
        mean = tl.zeros((BLOCK_ROWS, 1), tl.float32)
        for i in tl.range(0, n_blocks, num_stages=STAGES):
            at = block_at(i, v_ptr, pointers, block_stride, LISTED)
            v = tl.load(at + rows * v_stride + cols, mask=mask, other=0.0).to(tl.float32)
            score = tl.load(saved_ptr + i * far + rows, mask=exists, other=0.0)
            mean += tl.exp(score - top) / total * tl.sum(dy * v, axis=1, keep_dims=True)

        # from the last block, which is nearest
        for k in tl.range(0, n_blocks, num_stages=STAGES):
            i = n_blocks - 1 - k
            at = block_at(i, v_ptr, pointers, block_stride, LISTED)
            v = tl.load(at + rows * v_stride + cols, mask=mask, other=0.0).to(tl.float32)
            score = tl.load(saved_ptr + i * far + rows, mask=exists, other=0.0)
            rstd = tl.load(saved_ptr + (n_blocks + i) * far + rows, mask=exists, other=0.0)
            share = tl.exp(score - top) / total
            # of the score, by 1/rms
            dscore = share * (tl.sum(dy * v, axis=1, keep_dims=True) - mean) * rstd
            if WANTS_SUMS:
                dquery += dscore * v
            if WANTS_DV:
                if not HOLDS_QUERY:
                    query = query_of_keys(query_ptr, weight_ptr, cols, cols < n_cols, HAS_WEIGHT)
                dv = share * dy + dscore * (query - (rstd * score / n_cols) * v)
                at = block_at(i, dv_ptr, dpointers, far * n_cols, LISTED)
                tl.store(at + rows * n_cols + cols, dv, mask=mask)
    if WANTS_SUMS:
        tl.store(partial_ptr + pid * n_cols + cols, tl.sum(dquery, axis=0, keep_dims=True), mask=cols < n_cols)


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_bwd_kernel(
    dy_ptr,  # [T, D]
    v_ptr,  # [N, T, D]
    dv_ptr,  # [N, T, D]
    query_ptr,  # [D]
    weight_ptr,  # [D]
    saved_ptr,  # [2 N + 2, T]
    partial_ptr,  # [programs, D] fp32: this program's part of the gradient of query * weight
    dy_stride,  # elements from one row to the next; gradients have no gaps
    block_stride,
    v_stride,
    n_blocks,
    n_rows,
    n_cols,
    HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr, HOLDS_QUERY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a stack."""
    backward(
        dy_ptr, v_ptr, None, dv_ptr, None, query_ptr, weight_ptr, saved_ptr, partial_ptr,
        dy_stride, block_stride, v_stride, n_blocks, n_rows, n_cols,
        False, HAS_WEIGHT, WANTS_DV, WANTS_SUMS, HOLDS_QUERY, BLOCK_ROWS, BLOCK_COLS, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_bwd_listed_kernel(
    dy_ptr,  # [T, D]
    v_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr,  # [T, D]
    v8_ptr, v9_ptr, v10_ptr, v11_ptr, v12_ptr, v13_ptr, v14_ptr, v15_ptr,
    dv_ptr, dv1_ptr, dv2_ptr, dv3_ptr, dv4_ptr, dv5_ptr, dv6_ptr, dv7_ptr,  # [T, D]
    dv8_ptr, dv9_ptr, dv10_ptr, dv11_ptr, dv12_ptr, dv13_ptr, dv14_ptr, dv15_ptr,
    query_ptr, weight_ptr, saved_ptr, partial_ptr, dy_stride, v_stride, n_blocks, n_rows, n_cols,
    HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr, HOLDS_QUERY: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of blocks that lie each by itself."""
    backward(
        dy_ptr,
        v_ptr,
        (v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr, v8_ptr,
         v9_ptr, v10_ptr, v11_ptr, v12_ptr, v13_ptr, v14_ptr, v15_ptr),
        dv_ptr,
        (dv1_ptr, dv2_ptr, dv3_ptr, dv4_ptr, dv5_ptr, dv6_ptr, dv7_ptr, dv8_ptr,
         dv9_ptr, dv10_ptr, dv11_ptr, dv12_ptr, dv13_ptr, dv14_ptr, dv15_ptr),
        query_ptr, weight_ptr, saved_ptr, partial_ptr, dy_stride, 0, v_stride, n_blocks, n_rows, n_cols,
        True, HAS_WEIGHT, WANTS_DV, WANTS_SUMS, HOLDS_QUERY, BLOCK_ROWS, BLOCK_COLS, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_programs"])
def _attention_residual_sums_kernel(
    partial_ptr,  # [programs, D] fp32
    query_ptr,  # [D]
    weight_ptr,  # [D]
    dquery_ptr,  # [D]
    dweight_ptr,  # [D]
    n_programs,
    n_cols,
    HAS_WEIGHT: tl.constexpr, WANTS_DQUERY: tl.constexpr, WANTS_DWEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """The parts of the gradient of query * weight, added up, and what of it is the gradient of each."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)[None, :]
    mask = cols < n_cols
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in range(0, n_programs, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None]
        total += tl.load(partial_ptr + rows * n_cols + cols, mask=(rows < n_programs) & mask, other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True)
    if WANTS_DQUERY:
        dquery = total
        if HAS_WEIGHT:
            dquery *= tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dquery_ptr + cols, dquery, mask=mask)
    if WANTS_DWEIGHT:
        query = tl.load(query_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dweight_ptr + cols, total * query, mask=mask)
