"""attention_residual's kernels: a program goes over the blocks of its token, several of them at a time.

A sum over columns keeps all threads of a program waiting, those of several blocks no longer than one.

Sizes: N blocks, T tokens, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._exp import exp_of


@triton.jit
def block_at(i, first_ptr, pointers, block_stride, LISTED: tl.constexpr):
    """Where block i, or each of several, begins: as many elements on as the stack says, or at its own pointer."""
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
    GROUP: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The mean of the blocks goes on from one group to the next, as their softmax does."""
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    query = query_of_keys(query_ptr, weight_ptr, cols, cols < n_cols, HAS_WEIGHT)
    member = tl.arange(0, GROUP)[:, None]
    far = tl.cast(n_rows, tl.int64)  # from one block's scores to the next one's
    for row in range(tl.program_id(0).to(tl.int64), n_rows, tl.num_programs(0).to(tl.int64)):
        # of the blocks so far: the largest score, the sum of exponentials above it, and the sum of rows by them
        top = tl.full((1, 1), float("-inf"), tl.float32)
        total = tl.zeros((1, 1), tl.float32)
        y = tl.zeros((1, BLOCK_COLS), tl.float32)
        for first in tl.range(0, n_blocks, GROUP, num_stages=STAGES):
            i = first + member
            exists = i < n_blocks
            at = block_at(first if GROUP == 1 else i, v_ptr, pointers, block_stride, LISTED)
            v = tl.load(at + (row * v_stride + cols), mask=exists & (cols < n_cols), other=0.0).to(tl.float32)
            rstd = tl.rsqrt(tl.sum(v * v, axis=1, keep_dims=True) / n_cols + eps)
            score = rstd * tl.sum(v * query, axis=1, keep_dims=True)
            tl.store(saved_ptr + i * far + row, score, mask=exists)
            tl.store(saved_ptr + (n_blocks + i) * far + row, rstd, mask=exists)
            score = tl.where(exists, score, float("-inf"))
            higher = tl.maximum(top, tl.max(score, axis=0, keep_dims=True))
            keeps, share = tl.exp(top - higher), tl.exp(score - higher)
            total = total * keeps + tl.sum(share, axis=0, keep_dims=True)
            y = y * keeps + tl.sum(share * v, axis=0, keep_dims=True)
            top = higher
        tl.store(saved_ptr + 2 * n_blocks * far + row + tl.zeros((1, 1), tl.int32), top)
        tl.store(y_ptr + row * n_cols + cols, y / total, mask=cols < n_cols)


# n_rows and n_blocks are not specialized: each connection of a model has one block more than the one before
@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_fwd_kernel(
    v_ptr,  # [N, T, D]
    query_ptr,  # [D]
    weight_ptr,  # [D]
    y_ptr,  # [T, D]
    saved_ptr,  # [2 N + 1, T] fp32: the blocks' scores, their 1/rms; the largest score
    block_stride,  # elements from one block to the next
    v_stride,  # elements from one row to the next; y has no gaps
    n_blocks,
    n_rows,
    n_cols,
    eps,
    HAS_WEIGHT: tl.constexpr, GROUP: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a stack."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    forward(
        v_ptr, None, query_ptr, weight_ptr, y_ptr, saved_ptr, block_stride, v_stride, n_blocks, n_rows, n_cols, eps,
        False, HAS_WEIGHT, GROUP, BLOCK_COLS, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_fwd_listed_kernel(
    v_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr,  # [T, D]
    v8_ptr, v9_ptr, v10_ptr, v11_ptr, v12_ptr, v13_ptr, v14_ptr, v15_ptr,
    query_ptr, weight_ptr, y_ptr, saved_ptr, v_stride, n_blocks, n_rows, n_cols, eps,
    HAS_WEIGHT: tl.constexpr, GROUP: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of blocks that lie each by itself; kernels for stacks have no such pointers, which take the host time."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    forward(
        v_ptr,
        (v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr, v8_ptr,
         v9_ptr, v10_ptr, v11_ptr, v12_ptr, v13_ptr, v14_ptr, v15_ptr),
        query_ptr, weight_ptr, y_ptr, saved_ptr, 0, v_stride, n_blocks, n_rows, n_cols, eps,
        True, HAS_WEIGHT, GROUP, BLOCK_COLS, STAGES,
    )  # fmt: skip


@triton.jit
def dots_of(
    first, v_ptr, pointers, v_at, block_stride, dy, top, saved_ptr, scratch_ptr, far, n_blocks, is_column,
    LISTED: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Writes dy v and exponentials of the blocks from `first` on; the sums of these, and of dy v by them, [1, 1]."""
    i = first + tl.arange(0, GROUP)[:, None]
    exists = i < n_blocks
    at = block_at(first if GROUP == 1 else i, v_ptr, pointers, block_stride, LISTED)
    v = tl.load(at + v_at[None, :], mask=exists & is_column[None, :], other=0.0).to(tl.float32)
    dot = tl.sum(dy[None, :] * v, axis=1, keep_dims=True)
    exponential = exp_of(tl.load(saved_ptr + i * far, mask=exists, other=float("-inf")) - top)
    tl.store(scratch_ptr + i, dot, mask=exists)
    tl.store(scratch_ptr + n_blocks + i, exponential, mask=exists)
    return tl.sum(exponential, axis=0, keep_dims=True), tl.sum(exponential * dot, axis=0, keep_dims=True)


@triton.jit
def dscore_of(share, dot, mean, rstd):
    """The gradient of a block's score, by 1/rms."""
    return share * (dot - mean) * rstd


@triton.jit
def dv_of(v, dy, query, share, dscore, score, rstd, n_cols):
    """The gradient of a block: through the mean, and through its score."""
    return share * dy + dscore * query - (dscore * rstd * score / n_cols) * v


@triton.jit
def gradient_of(
    i, v_ptr, pointers, dv_ptr, dpointers, v_at, dv_at, block_stride, dv_stride, dy_at, dy, query, dquery,
    query_ptr, weight_ptr, shrink, mean, saved_ptr, scratch_ptr, far, n_blocks, n_cols, cols,
    LISTED: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr,
    HOLDS_QUERY: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of block i; dquery with what this block adds to it."""
    mask = cols < n_cols
    # read for the last time, as what is written is read by other kernels: L2 is for the blocks of the other programs
    at = block_at(i, v_ptr, pointers, block_stride, LISTED) + v_at
    v = tl.load(at, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    score = tl.load(saved_ptr + i * far)
    rstd = tl.load(saved_ptr + (n_blocks + i) * far)
    share = tl.load(scratch_ptr + n_blocks + i) * shrink
    dscore = dscore_of(share, tl.load(scratch_ptr + i), mean, rstd)
    if WANTS_SUMS:
        dquery += dscore * v
    if WANTS_DV:
        if not HOLDS_QUERY:
            dy = tl.load(dy_at, mask=mask, other=0.0).to(tl.float32)
            query = query_of_keys(query_ptr, weight_ptr, cols, mask, HAS_WEIGHT)
        dv = dv_of(v, dy, query, share, dscore, score, rstd, n_cols)
        at = block_at(i, dv_ptr, dpointers, dv_stride, LISTED) + dv_at
        tl.store(at, dv, mask=mask, eviction_policy="evict_first")
    return dquery


@triton.jit
def backward(
    dy_ptr, v_ptr, pointers, dv_ptr, dpointers,  # as in the forward
    query_ptr, weight_ptr, saved_ptr, scratch_ptr, partial_ptr,
    dy_stride, block_stride, v_stride, n_blocks, n_rows, n_cols,
    LISTED: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr,
    HOLDS_QUERY: tl.constexpr,  # in registers, for all tokens, and dy for all blocks
    GROUP: tl.constexpr, UNROLL: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Twice over the blocks of a token: for dy v of each, and for their gradients."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_COLS)
    is_column = cols < n_cols
    query = 0.0
    if HOLDS_QUERY:
        query = query_of_keys(query_ptr, weight_ptr, cols, is_column, HAS_WEIGHT)
    dquery = tl.zeros((BLOCK_COLS,), tl.float32)
    far = tl.cast(n_rows, tl.int64)  # from one block's scores to the next one's
    dv_stride = far * n_cols
    scratch_ptr += pid * (2 * n_blocks)
    for row in range(pid, n_rows, tl.num_programs(0).to(tl.int64)):
        dy_at = dy_ptr + row * dy_stride + cols
        dy = tl.load(dy_at, mask=is_column, other=0.0).to(tl.float32)
        top = tl.load(saved_ptr + 2 * n_blocks * far + row)
        v_at, dv_at = row * v_stride + cols, row * n_cols + cols
        # The mean of dy v by the blocks' shares, which each block's own is compared with. It is made of the very
        # exponentials that are added up here: shares whose sum is off would take as much of dy v to the difference
        total = tl.zeros((1, 1), tl.float32)
        mean = tl.zeros((1, 1), tl.float32)
        for first in range(0, n_blocks, GROUP):
            exponentials, products = dots_of(
                first, v_ptr, pointers, v_at, block_stride, dy, top, saved_ptr + row, scratch_ptr, far, n_blocks,
                is_column, LISTED, GROUP,
            )  # fmt: skip
            total += exponentials
            mean += products
        # one thread reads what another one wrote
        tl.debug_barrier()
        shrink = tl.div_rn(1.0, tl.sum(tl.sum(total, axis=1), axis=0))
        mean = tl.sum(tl.sum(mean, axis=1), axis=0) * shrink

        # from the last block, which is nearest
        for k in tl.range(0, n_blocks, loop_unroll_factor=UNROLL):
            dquery = gradient_of(
                n_blocks - 1 - k, v_ptr, pointers, dv_ptr, dpointers, v_at, dv_at, block_stride, dv_stride, dy_at, dy,
                query, dquery, query_ptr, weight_ptr, shrink, mean, saved_ptr + row, scratch_ptr, far, n_blocks, n_cols,
                cols, LISTED, HAS_WEIGHT, WANTS_DV, WANTS_SUMS, HOLDS_QUERY,
            )  # fmt: skip
        # the next token's come where these have been read
        tl.debug_barrier()
    if WANTS_SUMS:
        tl.store(partial_ptr + pid * n_cols + cols, dquery, mask=is_column)


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_bwd_kernel(
    dy_ptr,  # [T, D]
    v_ptr,  # [N, T, D]
    dv_ptr,  # [N, T, D]
    query_ptr,  # [D]
    weight_ptr,  # [D]
    saved_ptr,  # [2 N + 1, T]
    scratch_ptr,  # [programs, 2, N] fp32: of a token's blocks dy v, and the exponentials of their scores
    partial_ptr,  # [programs, D] fp32: this program's part of the gradient of query * weight
    dy_stride,  # elements from one row to the next; gradients have no gaps
    block_stride,
    v_stride,
    n_blocks,
    n_rows,
    n_cols,
    HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr, HOLDS_QUERY: tl.constexpr,
    GROUP: tl.constexpr, UNROLL: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Of a stack."""
    backward(
        dy_ptr, v_ptr, None, dv_ptr, None, query_ptr, weight_ptr, saved_ptr, scratch_ptr, partial_ptr,
        dy_stride, block_stride, v_stride, n_blocks, n_rows, n_cols,
        False, HAS_WEIGHT, WANTS_DV, WANTS_SUMS, HOLDS_QUERY, GROUP, UNROLL, BLOCK_COLS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows", "n_blocks"])
def _attention_residual_bwd_listed_kernel(
    dy_ptr,  # [T, D]
    v_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr,  # [T, D]
    v8_ptr, v9_ptr, v10_ptr, v11_ptr, v12_ptr, v13_ptr, v14_ptr, v15_ptr,
    dv_ptr, dv1_ptr, dv2_ptr, dv3_ptr, dv4_ptr, dv5_ptr, dv6_ptr, dv7_ptr,  # [T, D]
    dv8_ptr, dv9_ptr, dv10_ptr, dv11_ptr, dv12_ptr, dv13_ptr, dv14_ptr, dv15_ptr,
    query_ptr, weight_ptr, saved_ptr, scratch_ptr, partial_ptr, dy_stride, v_stride, n_blocks, n_rows, n_cols,
    HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr, HOLDS_QUERY: tl.constexpr,
    GROUP: tl.constexpr, UNROLL: tl.constexpr, BLOCK_COLS: tl.constexpr,
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
        query_ptr, weight_ptr, saved_ptr, scratch_ptr, partial_ptr, dy_stride, 0, v_stride, n_blocks, n_rows, n_cols,
        True, HAS_WEIGHT, WANTS_DV, WANTS_SUMS, HOLDS_QUERY, GROUP, UNROLL, BLOCK_COLS,
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
