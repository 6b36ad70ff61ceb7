"""The two kernels of neighborhood_attention. A program owns a tile of tokens of one class and walks their neighbours.

Tokens whose places leave one remainder by the dilation see only one another: they are a sequence of their own, a class,
in which a token's neighbours are those at most `half` places away. At the ends there are fewer, or, where the window
SHIFTS, it lies within the class, and as many as it holds are a token's neighbours. Rows of a class are read by stride.

Sizes: B batch entries, H heads, T tokens, D columns; n tokens of a class.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(n_tokens, n_heads, dilation, BLOCK: tl.constexpr):
    """Of this program: batch entry, head, class, the first place of its tile in it, and how many tokens it has."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(tl.cdiv(n_tokens, dilation), BLOCK)
    first = (pid % tiles) * BLOCK
    pid = pid // tiles
    of_class = pid % dilation
    pid = pid // dilation
    return pid // n_heads, pid % n_heads, of_class, first, tl.cdiv(n_tokens - of_class, dilation)


@triton.jit
def _rows(ptr, places, n, stride, n_cols, BLOCK_COLS: tl.constexpr):
    """Tokens at these places of a class [rows, BLOCK_COLS]; zeros where there is none."""
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (places[:, None] >= 0) & (places[:, None] < n) & (cols < n_cols)
    return tl.load(ptr + places[:, None] * stride + cols, mask=mask, other=0.0)


@triton.jit
def _store_rows(ptr, places, n, stride, n_cols, value, BLOCK_COLS: tl.constexpr):
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    mask = (places[:, None] < n) & (cols < n_cols)
    tl.store(ptr + places[:, None] * stride + cols, value, mask=mask)


@triton.jit
def _near(queries, keys, half, n, SHIFTS: tl.constexpr):
    """Which keys are neighbours of which queries, of a class of n."""
    if SHIFTS:
        size = tl.minimum(2 * half + 1, n)
        first = tl.maximum(tl.minimum(queries - half, n - size), 0)
        near = (keys >= first) & (keys < first + size)
    else:
        near = (queries - keys <= half) & (keys - queries <= half)
    return near & (queries < n) & (keys < n)


@triton.jit
def _keys_of(first, half, n, SHIFTS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the neighbours of a tile of queries begin and end."""
    begin = first - half
    end = tl.minimum(first + BLOCK, n) + half
    if SHIFTS:
        size = tl.minimum(2 * half + 1, n)
        begin = tl.minimum(begin, n - size)
        end = tl.maximum(end, size)
    return tl.maximum(begin, 0), tl.minimum(end, n)


@triton.jit
def _queries_of(first, half, n, SHIFTS: tl.constexpr, BLOCK: tl.constexpr):
    """Where the queries whose neighbours are in a tile begin and end."""
    begin = first - half
    end = first + BLOCK + half
    if SHIFTS:
        # the windows of all that are nearer to an end than half are the outermost
        size = tl.minimum(2 * half + 1, n)
        begin = tl.where(first < size, 0, begin)
        end = tl.where(first + BLOCK > n - size, n, end)
    return tl.maximum(begin, 0), tl.minimum(end, n)


# n_tokens is not specialized: a batch whose length is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_tokens"])
def _neighborhood_attention_fwd_kernel(
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
    SHIFTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32)
    batch, head, of_class, first, n = _place(n_tokens, n_heads, dilation, BLOCK_ROWS)
    q_ptr += batch * q_batch_stride + head * q_head_stride + of_class * q_token_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride + of_class * k_token_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride + of_class * v_token_stride
    y_ptr += batch * y_batch_stride + head * y_head_stride + of_class * y_token_stride
    lse_ptr += (batch * n_heads + head) * n_tokens + of_class

    rows = first + tl.arange(0, BLOCK_ROWS)
    q = _rows(q_ptr, rows, n, q_token_stride * dilation, n_cols, BLOCK_COLS)
    high = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    y = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    begin, end = _keys_of(first, half, n, SHIFTS, BLOCK_ROWS)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_KEYS)
        k = _rows(k_ptr, keys, n, k_token_stride * dilation, n_cols, BLOCK_COLS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        s = tl.where(_near(rows[:, None], keys[None, :], half, n, SHIFTS), s, -float("inf"))
        higher = tl.maximum(high, tl.max(s, axis=1))
        # a row may have met no neighbour yet, and -inf less -inf is NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s - shift[:, None])
        fade = tl.exp2(high - shift)
        total = total * fade + tl.sum(p, axis=1)
        v = _rows(v_ptr, keys, n, v_token_stride * dilation, n_cols, BLOCK_COLS)
        y = y * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        high = higher
    # rows past the last have met nobody
    total = tl.where(rows < n, total, 1.0)
    # a reciprocal a row: Triton's own division is off by two units in the last place
    y = y * tl.div_rn(1.0, total)[:, None]
    _store_rows(y_ptr, rows, n, y_token_stride * dilation, n_cols, y, BLOCK_COLS)
    tl.store(lse_ptr + rows * dilation, high + tl.log2(total), mask=rows < n)


@triton.jit
def _as_queries(
    dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, dy_step, q_step, k_step, v_step, y_step, lse_step,
    rows, begin, end, n, n_cols, half, scale,
    SHIFTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of a tile [BLOCK_ROWS, BLOCK_COLS]. A step: elements from one place of a class to the next."""
    q = _rows(q_ptr, rows, n, q_step, n_cols, BLOCK_COLS)
    dy = _rows(dy_ptr, rows, n, dy_step, n_cols, BLOCK_COLS)
    y = _rows(y_ptr, rows, n, y_step, n_cols, BLOCK_COLS)
    # sum(dp * p) over the neighbours
    inner = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    lse = tl.load(lse_ptr + rows * lse_step, mask=rows < n, other=0.0)
    dq = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        keys = start + tl.arange(0, BLOCK_KEYS)
        k = _rows(k_ptr, keys, n, k_step, n_cols, BLOCK_COLS)
        v = _rows(v_ptr, keys, n, v_step, n_cols, BLOCK_COLS)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.where(_near(rows[:, None], keys[None, :], half, n, SHIFTS), tl.exp2(s - lse[:, None]), 0.0)
        dp = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - inner[:, None])
        dq += tl.dot(ds.to(k.dtype), k, input_precision=PRECISION)
    return dq * scale


@triton.jit
def _as_keys(
    dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, dy_step, q_step, k_step, v_step, y_step, lse_step,
    rows, begin, end, n, n_cols, half, scale,
    SHIFTS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile, each [BLOCK_ROWS, BLOCK_COLS], from the queries whose neighbours its tokens are."""
    k = _rows(k_ptr, rows, n, k_step, n_cols, BLOCK_COLS)
    v = _rows(v_ptr, rows, n, v_step, n_cols, BLOCK_COLS)
    dk = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    dv = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        queries = start + tl.arange(0, BLOCK_KEYS)
        q = _rows(q_ptr, queries, n, q_step, n_cols, BLOCK_COLS)
        dy = _rows(dy_ptr, queries, n, dy_step, n_cols, BLOCK_COLS)
        y = _rows(y_ptr, queries, n, y_step, n_cols, BLOCK_COLS)
        inner = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
        lse = tl.load(lse_ptr + queries * lse_step, mask=queries < n, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
        p = tl.where(_near(queries[None, :], rows[:, None], half, n, SHIFTS), tl.exp2(s - lse[None, :]), 0.0)
        dv += tl.dot(p.to(dy.dtype), dy, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dy), input_precision=PRECISION)
        ds = p * (dp - inner[None, :])
        dk += tl.dot(ds.to(q.dtype), q, input_precision=PRECISION)
    return dk * scale, dv


@triton.jit(do_not_specialize=["n_tokens"])
def _neighborhood_attention_bwd_kernel(
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
    WANTS_DQ: tl.constexpr, WANTS_DKV: tl.constexpr, SHIFTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The tile's tokens as queries, then as keys: what both read lies in the caches, and nobody adds to what another
    program wrote.
    """
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32)
    batch, head, of_class, first, n = _place(n_tokens, n_heads, dilation, BLOCK_ROWS)
    dy_ptr += batch * dy_batch_stride + head * dy_head_stride + of_class * dy_token_stride
    q_ptr += batch * q_batch_stride + head * q_head_stride + of_class * q_token_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride + of_class * k_token_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride + of_class * v_token_stride
    y_ptr += batch * y_batch_stride + head * y_head_stride + of_class * y_token_stride
    lse_ptr += (batch * n_heads + head) * n_tokens + of_class
    dy_step, y_step = dy_token_stride * dilation, y_token_stride * dilation
    q_step, k_step, v_step = q_token_stride * dilation, k_token_stride * dilation, v_token_stride * dilation

    rows = first + tl.arange(0, BLOCK_ROWS)
    if WANTS_DQ:
        begin, end = _keys_of(first, half, n, SHIFTS, BLOCK_ROWS)
        dq = _as_queries(
            dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, dy_step, q_step, k_step, v_step, y_step, dilation,
            rows, begin, end, n, n_cols, half, scale,
            SHIFTS, PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_COLS, STAGES,
        )  # fmt: skip
        dq_ptr += batch * dq_batch_stride + head * dq_head_stride + of_class * dq_token_stride
        _store_rows(dq_ptr, rows, n, dq_token_stride * dilation, n_cols, dq, BLOCK_COLS)
    if WANTS_DKV:
        begin, end = _queries_of(first, half, n, SHIFTS, BLOCK_ROWS)
        dk, dv = _as_keys(
            dy_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, dy_step, q_step, k_step, v_step, y_step, dilation,
            rows, begin, end, n, n_cols, half, scale,
            SHIFTS, PRECISION, BLOCK_ROWS, BLOCK_KEYS, BLOCK_COLS, STAGES,
        )  # fmt: skip
        dk_ptr += batch * dk_batch_stride + head * dk_head_stride + of_class * dk_token_stride
        dv_ptr += batch * dv_batch_stride + head * dv_head_stride + of_class * dv_token_stride
        _store_rows(dk_ptr, rows, n, dk_token_stride * dilation, n_cols, dk, BLOCK_COLS)
        _store_rows(dv_ptr, rows, n, dv_token_stride * dilation, n_cols, dv, BLOCK_COLS)
