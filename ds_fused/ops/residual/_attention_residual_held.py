"""attention_residual's backward where a program holds all blocks of its token: each is read once.

The next tokens' blocks are on their way in shared memory. Which blocks are held says is_held in attention_residual.

Sizes: N blocks, T tokens, D columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._again import wide_again
from ds_fused.ops.common._exp import exp_of
from ds_fused.ops.residual._attention_residual_kernels import dscore_of, dv_of, query_of_keys


@triton.jit
def place_of(i: tl.constexpr, pointers, block_stride, LISTED: tl.constexpr):
    """Where block i begins: at its own pointer, or in the stack at the only one."""
    at = pointers[0]
    if LISTED:
        at = pointers[i]
    else:
        at += i * tl.cast(block_stride, tl.int64)
    return at


@triton.jit
def backward_held(
    dy_ptr, v_ptrs, dv_ptrs,  # of each block, or of the stack
    query_ptr, weight_ptr, saved_ptr, partial_ptr, dy_stride, block_stride, v_stride, n_rows, n_cols,
    LISTED: tl.constexpr, HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr,
    N_BLOCKS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Once over the blocks of a token."""
    pid = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_COLS)
    mask = cols < n_cols
    query = query_of_keys(query_ptr, weight_ptr, cols, mask, HAS_WEIGHT)
    dquery = tl.zeros((BLOCK_COLS,), tl.float32)
    far = tl.cast(n_rows, tl.int64)  # from one block's scores to the next one's
    for row in tl.range(pid, n_rows, tl.num_programs(0).to(tl.int64), num_stages=STAGES):
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0)
        top = tl.load(saved_ptr + row + 2 * N_BLOCKS * far)
        blocks, scores, rstds = (), (), ()
        for i in tl.static_range(N_BLOCKS):
            at = place_of(i, v_ptrs, block_stride, LISTED)
            blocks += (tl.load(at + row * v_stride + cols, mask=mask, other=0.0),)
            scores += (tl.load(saved_ptr + row + i * far),)
            rstds += (tl.load(saved_ptr + row + (N_BLOCKS + i) * far),)

        # as in _attention_residual_kernels: the mean is made of the very exponentials that are added up
        total, mean = 0.0, 0.0
        dots, exponentials = (), ()
        for i in tl.static_range(N_BLOCKS):
            dot = tl.sum(dy.to(tl.float32) * blocks[i].to(tl.float32), axis=0)
            exponential = exp_of(scores[i] - top)
            total += exponential
            mean += exponential * dot
            dots += (dot,)
            exponentials += (exponential,)
        shrink = tl.div_rn(1.0, total)
        mean *= shrink

        for i in tl.static_range(N_BLOCKS):
            share = exponentials[i] * shrink
            dscore = dscore_of(share, dots[i], mean, rstds[i])
            v = wide_again(blocks[i])
            if WANTS_SUMS:
                dquery += dscore * v
            if WANTS_DV:
                dv = dv_of(v, wide_again(dy), query, share, dscore, scores[i], rstds[i], n_cols)
                at = place_of(i, dv_ptrs, far * n_cols, LISTED)
                tl.store(at + row * n_cols + cols, dv, mask=mask)
    if WANTS_SUMS:
        tl.store(partial_ptr + pid * n_cols + cols, dquery, mask=mask)


# N_BLOCKS is a constant, so a kernel is compiled for each number of blocks
@triton.jit(do_not_specialize=["n_rows"])
def _attention_residual_bwd_held_kernel(
    dy_ptr,  # [T, D]
    v_ptr,  # [N, T, D]
    dv_ptr,  # [N, T, D]
    query_ptr,  # [D]
    weight_ptr,  # [D]
    saved_ptr,  # [2 N + 1, T]
    partial_ptr,  # [programs, D] fp32: this program's part of the gradient of query * weight
    dy_stride,  # elements from one row to the next; gradients have no gaps
    block_stride,
    v_stride,
    n_rows,
    n_cols,
    HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr,
    N_BLOCKS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of a stack."""
    backward_held(
        dy_ptr, (v_ptr,), (dv_ptr,), query_ptr, weight_ptr, saved_ptr, partial_ptr,
        dy_stride, block_stride, v_stride, n_rows, n_cols,
        False, HAS_WEIGHT, WANTS_DV, WANTS_SUMS, N_BLOCKS, BLOCK_COLS, STAGES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["n_rows"])
def _attention_residual_bwd_held_listed_kernel(
    dy_ptr,  # [T, D]
    v_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr,  # [T, D]
    dv_ptr, dv1_ptr, dv2_ptr, dv3_ptr, dv4_ptr, dv5_ptr, dv6_ptr, dv7_ptr,  # [T, D]
    query_ptr, weight_ptr, saved_ptr, partial_ptr, dy_stride, v_stride, n_rows, n_cols,
    HAS_WEIGHT: tl.constexpr, WANTS_DV: tl.constexpr, WANTS_SUMS: tl.constexpr,
    N_BLOCKS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Of blocks that lie each by itself."""
    backward_held(
        dy_ptr,
        (v_ptr, v1_ptr, v2_ptr, v3_ptr, v4_ptr, v5_ptr, v6_ptr, v7_ptr),
        (dv_ptr, dv1_ptr, dv2_ptr, dv3_ptr, dv4_ptr, dv5_ptr, dv6_ptr, dv7_ptr),
        query_ptr, weight_ptr, saved_ptr, partial_ptr, dy_stride, 0, v_stride, n_rows, n_cols,
        True, HAS_WEIGHT, WANTS_DV, WANTS_SUMS, N_BLOCKS, BLOCK_COLS, STAGES,
    )  # fmt: skip
