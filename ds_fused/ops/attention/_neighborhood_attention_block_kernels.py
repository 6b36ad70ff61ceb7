"""The kernels of neighborhood_attention for windows so narrow that the neighbours of many tokens fit into one tile.

A program owns the tokens in the middle of its tile, and has with it all tokens that these see, and those that see them,
`reach` to either side: each tensor is loaded once, all at the same time, and no product is computed twice for dq and
for dk and dv. Sizes and classes as in _neighborhood_attention_kernels.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.attention._neighborhood_attention_kernels import LOG2_E, load_tile, near, place, store_tile


@triton.jit
def _own(n_tokens, n_heads, dilation, half, SHIFTS: tl.constexpr, BLOCK: tl.constexpr):
    """Batch entry, head, class, where the tile begins, where what is owned begins and ends, tokens of the class."""
    reach = half
    if SHIFTS:
        # from one end of a window to the other
        reach = 2 * half
    batch, head, of_class, first, n = place(n_tokens, n_heads, dilation, BLOCK - 2 * reach)
    return batch, head, of_class, first - reach, first, tl.minimum(first + BLOCK - 2 * reach, n), n


@triton.jit(do_not_specialize=["n_tokens", "half"])
def _neighborhood_attention_block_fwd_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    y_ptr,  # [B, H, T, D]
    lse_ptr,  # [B, H, T]: the logarithm, to the base of 2, of the sum of exponentials
    q_batch_stride, q_head_stride, q_token_stride,  # elements from one batch entry, head, token to the next
    k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride,
    y_batch_stride, y_head_stride, y_token_stride,
    n_heads,
    n_tokens,
    n_cols,
    half,
    dilation,
    scale,
    SHIFTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32)
    step = tl.cast(dilation, tl.int64)
    batch, head, of_class, first, begin, end, n = _own(n_tokens, n_heads, dilation, half, SHIFTS, BLOCK)
    q_ptr += batch * q_batch_stride + head * q_head_stride + of_class * q_token_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride + of_class * k_token_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride + of_class * v_token_stride
    y_ptr += batch * y_batch_stride + head * y_head_stride + of_class * y_token_stride
    lse_ptr += (batch * n_heads + head) * n_tokens + of_class

    q = load_tile(q_ptr, first, n, q_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    k = load_tile(k_ptr, first, n, k_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    v = load_tile(v_ptr, first, n, v_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    rows = first + tl.arange(0, BLOCK)
    is_own = (rows >= begin) & (rows < end)
    s = tl.dot(q, tl.trans(k)) * (scale * LOG2_E)
    s = tl.where(near(rows[:, None], rows[None, :], half, n, SHIFTS), s, -float("inf"))
    # others may have no neighbour here
    high = tl.where(is_own, tl.max(s, axis=1), 0.0)
    p = tl.exp2(s - high[:, None])
    total = tl.where(is_own, tl.sum(p, axis=1), 1.0)
    # a reciprocal a row: Triton's own division is off by two units in the last place
    y = tl.dot(p.to(v.dtype), v) * tl.div_rn(1.0, total)[:, None]
    store_tile(y_ptr, first, begin, end, y_token_stride * step, n_cols, y, BLOCK, BLOCK_COLS)
    tl.store(lse_ptr + rows * dilation, high + tl.log2(total), mask=is_own)


@triton.jit(do_not_specialize=["n_tokens", "half"])
def _neighborhood_attention_block_bwd_kernel(
    dy_ptr,  # [B, H, T, D]
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    y_ptr,  # [B, H, T, D]
    lse_ptr,  # [B, H, T]
    dq_ptr,  # [B, H, T, D]
    dk_ptr,  # [B, H, T, D]
    dv_ptr,  # [B, H, T, D]
    dy_batch_stride, dy_head_stride, dy_token_stride,  # elements from one batch entry, head, token to the next
    q_batch_stride, q_head_stride, q_token_stride,
    k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride,
    y_batch_stride, y_head_stride, y_token_stride,
    dq_batch_stride, dq_head_stride, dq_token_stride,
    dk_batch_stride, dk_head_stride, dk_token_stride,
    dv_batch_stride, dv_head_stride, dv_token_stride,
    n_heads,
    n_tokens,
    n_cols,
    half,
    dilation,
    scale,
    WANTS_DQ: tl.constexpr, WANTS_DKV: tl.constexpr, SHIFTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32)
    step = tl.cast(dilation, tl.int64)
    batch, head, of_class, first, begin, end, n = _own(n_tokens, n_heads, dilation, half, SHIFTS, BLOCK)
    dy_ptr += batch * dy_batch_stride + head * dy_head_stride + of_class * dy_token_stride
    q_ptr += batch * q_batch_stride + head * q_head_stride + of_class * q_token_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride + of_class * k_token_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride + of_class * v_token_stride
    y_ptr += batch * y_batch_stride + head * y_head_stride + of_class * y_token_stride
    lse_ptr += (batch * n_heads + head) * n_tokens + of_class

    q = load_tile(q_ptr, first, n, q_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    k = load_tile(k_ptr, first, n, k_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    v = load_tile(v_ptr, first, n, v_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    dy = load_tile(dy_ptr, first, n, dy_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    y = load_tile(y_ptr, first, n, y_token_stride * step, n_cols, BLOCK, BLOCK_COLS)
    rows = first + tl.arange(0, BLOCK)
    # queries that the class doesn't have get weights of 0
    lse = tl.load(lse_ptr + rows * dilation, mask=(rows >= 0) & (rows < n), other=float("inf"))
    # sum(dp * p) over the neighbours
    inner = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    p = tl.exp2(tl.dot(q, tl.trans(k)) * (scale * LOG2_E) - lse[:, None])
    p = tl.where(near(rows[:, None], rows[None, :], half, n, SHIFTS), p, 0.0)
    ds = (p * (tl.dot(dy, tl.trans(v)) - inner[:, None])).to(q.dtype)
    if WANTS_DKV:
        dv_ptr += batch * dv_batch_stride + head * dv_head_stride + of_class * dv_token_stride
        dv = tl.dot(tl.trans(p.to(dy.dtype)), dy)
        store_tile(dv_ptr, first, begin, end, dv_token_stride * step, n_cols, dv, BLOCK, BLOCK_COLS)
        dk_ptr += batch * dk_batch_stride + head * dk_head_stride + of_class * dk_token_stride
        dk = tl.dot(tl.trans(ds), q) * scale
        store_tile(dk_ptr, first, begin, end, dk_token_stride * step, n_cols, dk, BLOCK, BLOCK_COLS)
    if WANTS_DQ:
        dq_ptr += batch * dq_batch_stride + head * dq_head_stride + of_class * dq_token_stride
        dq = tl.dot(ds, k) * scale
        store_tile(dq_ptr, first, begin, end, dq_token_stride * step, n_cols, dq, BLOCK, BLOCK_COLS)
