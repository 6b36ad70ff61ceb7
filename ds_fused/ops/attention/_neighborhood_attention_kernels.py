"""The kernels of neighborhood_attention for windows that are walked. A program owns a tile of tokens of one class.

Tokens whose places leave one remainder by the dilation see only one another: they are a sequence of their own, a class,
in which a token's neighbours are those at most `half` places away. At the ends there are fewer, or, where the window
SHIFTS, it lies within the class, and as many as it holds are a token's neighbours. Rows of a class are read by stride.

Sizes: B batch entries, H heads, T tokens, D columns; n tokens of a class.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# where no class has a token, and from where a difference to one is no overflow
FAR = tl.constexpr(2**30)


@triton.jit
def place(n_tokens, n_heads, dilation, own):
    """Of this program: batch entry, head, class, the first of its ``own`` places in it, and how many tokens it has."""
    pid = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(tl.cdiv(n_tokens, dilation), own)
    first = (pid % tiles).to(tl.int32) * own
    pid = pid // tiles
    of_class = pid % dilation
    pid = pid // dilation
    return pid // n_heads, pid % n_heads, of_class, first, tl.cdiv(n_tokens - of_class.to(tl.int32), dilation)


@triton.jit
def load_tile(ptr, first, n, step, n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tokens of a class from ``first`` on [ROWS, COLS], a step apart; zeros where there is none."""
    rows = tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    # as unsigned numbers those before the first are large
    mask = ((first + rows).to(tl.uint32) < n) & (cols < n_cols)
    # what is the same in each turn of a loop is added last
    return tl.load(ptr + tl.cast(first, tl.int64) * step + (rows.to(tl.int64) * step + cols), mask=mask, other=0.0)


@triton.jit
def store_tile(ptr, first, begin, end, step, n_cols, value, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Of a tile whose tokens begin at ``first``, those from begin to end."""
    rows = first + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, COLS)[None, :]
    mask = (rows >= begin) & (rows < end) & (cols < n_cols)
    tl.store(ptr + rows.to(tl.int64) * step + cols, value, mask=mask)


@triton.jit
def near(queries, keys, half, n, SHIFTS: tl.constexpr):
    """Which keys are neighbours of which queries; nothing is said of queries that the class of n doesn't have."""
    first = queries - half
    size = 2 * half + 1
    if SHIFTS:
        size = tl.minimum(size, n)
        first = tl.maximum(tl.minimum(first, n - size), 0)
    keys = tl.where((keys >= 0) & (keys < n), keys, FAR)
    # one comparison an element: as unsigned numbers those before the first are large
    return (keys - first).to(tl.uint32) < size


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
    SHIFTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32) * LOG2_E
    step = tl.cast(dilation, tl.int64)
    batch, head, of_class, first, n = place(n_tokens, n_heads, dilation, BLOCK_ROWS)
    q_ptr += batch * q_batch_stride + head * q_head_stride + of_class * q_token_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride + of_class * k_token_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride + of_class * v_token_stride
    y_ptr += batch * y_batch_stride + head * y_head_stride + of_class * y_token_stride
    lse_ptr += (batch * n_heads + head) * n_tokens + of_class
    q_step, k_step, v_step = q_token_stride * step, k_token_stride * step, v_token_stride * step

    rows = first + tl.arange(0, BLOCK_ROWS)
    q = load_tile(q_ptr, first, n, q_step, n_cols, BLOCK_ROWS, BLOCK_COLS)
    # with a scale that is positive the largest product is the largest score: scaled are rows, not elements
    q = tl.where(scale < 0.0, -q, q)
    # -inf times it is no NaN
    scale = tl.maximum(tl.abs(scale), 1e-30)
    high = tl.full((BLOCK_ROWS,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    y = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
    begin, end = _keys_of(first, half, n, SHIFTS, BLOCK_ROWS)
    for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
        k = load_tile(k_ptr, start, n, k_step, n_cols, BLOCK_KEYS, BLOCK_COLS)
        v = load_tile(v_ptr, start, n, v_step, n_cols, BLOCK_KEYS, BLOCK_COLS)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        keys = start + tl.arange(0, BLOCK_KEYS)
        s = tl.where(near(rows[:, None], keys[None, :], half, n, SHIFTS), s, -float("inf"))
        higher = tl.maximum(high, tl.max(s, axis=1) * scale)
        # a row may have met no neighbour yet, and -inf less -inf is NaN
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        p = tl.exp2(s * scale - shift[:, None])
        fade = tl.exp2(high - shift)
        total = total * fade + tl.sum(p, axis=1)
        y = y * fade[:, None]
        y = tl.dot(p.to(v.dtype), v, y, input_precision="ieee")
        high = higher
    # rows past the last have met nobody
    total = tl.where(rows < n, total, 1.0)
    # a reciprocal a row: Triton's own division is off by two units in the last place
    y = y * tl.div_rn(1.0, total)[:, None]
    store_tile(y_ptr, first, first, n, y_token_stride * step, n_cols, y, BLOCK_ROWS, BLOCK_COLS)
    tl.store(lse_ptr + rows * dilation, high + tl.log2(total), mask=rows < n)


@triton.jit(do_not_specialize=["n_tokens"])
def _neighborhood_attention_dq_kernel(
    dy_ptr,  # [B, H, T, D]
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    y_ptr,  # [B, H, T, D]
    lse_ptr,  # [B, H, T]
    inner_ptr,  # [B, H, T] fp32: of each token the sum of dy * y, for dk
    dq_ptr,  # [B, H, T, D]
    dy_batch_stride, dy_head_stride, dy_token_stride,  # elements from one batch entry, head, token to the next
    q_batch_stride, q_head_stride, q_token_stride,
    k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride,
    y_batch_stride, y_head_stride, y_token_stride,
    dq_batch_stride, dq_head_stride, dq_token_stride,
    n_heads,
    n_tokens,
    n_cols,
    half,
    dilation,
    scale,
    WANTS_DQ: tl.constexpr, WANTS_INNER: tl.constexpr, SHIFTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of queries: their dq, from its keys, and what their keys' gradients need to know of them."""
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32)
    step = tl.cast(dilation, tl.int64)
    batch, head, of_class, first, n = place(n_tokens, n_heads, dilation, BLOCK_ROWS)
    dy_ptr += batch * dy_batch_stride + head * dy_head_stride + of_class * dy_token_stride
    y_ptr += batch * y_batch_stride + head * y_head_stride + of_class * y_token_stride
    rows = first + tl.arange(0, BLOCK_ROWS)
    of_token = (batch * n_heads + head) * n_tokens + of_class + rows * dilation
    dy = load_tile(dy_ptr, first, n, dy_token_stride * step, n_cols, BLOCK_ROWS, BLOCK_COLS)
    y = load_tile(y_ptr, first, n, y_token_stride * step, n_cols, BLOCK_ROWS, BLOCK_COLS)
    # sum(dp * p) over the neighbours
    inner = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    if WANTS_INNER:
        tl.store(inner_ptr + of_token, inner, mask=rows < n)
    if WANTS_DQ:
        q_ptr += batch * q_batch_stride + head * q_head_stride + of_class * q_token_stride
        k_ptr += batch * k_batch_stride + head * k_head_stride + of_class * k_token_stride
        v_ptr += batch * v_batch_stride + head * v_head_stride + of_class * v_token_stride
        dq_ptr += batch * dq_batch_stride + head * dq_head_stride + of_class * dq_token_stride
        k_step, v_step = k_token_stride * step, v_token_stride * step
        q = load_tile(q_ptr, first, n, q_token_stride * step, n_cols, BLOCK_ROWS, BLOCK_COLS)
        lse = tl.load(lse_ptr + of_token, mask=rows < n, other=0.0)
        dq = tl.zeros((BLOCK_ROWS, BLOCK_COLS), tl.float32)
        begin, end = _keys_of(first, half, n, SHIFTS, BLOCK_ROWS)
        for start in tl.range(begin, end, BLOCK_KEYS, num_stages=STAGES):
            keys = start + tl.arange(0, BLOCK_KEYS)
            k = load_tile(k_ptr, start, n, k_step, n_cols, BLOCK_KEYS, BLOCK_COLS)
            v = load_tile(v_ptr, start, n, v_step, n_cols, BLOCK_KEYS, BLOCK_COLS)
            s = tl.dot(q, tl.trans(k), input_precision="ieee")
            dp = tl.dot(dy, tl.trans(v), input_precision="ieee")
            p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
            ds = p * (dp - inner[:, None])
            ds = tl.where(near(rows[:, None], keys[None, :], half, n, SHIFTS), ds, 0.0)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        store_tile(dq_ptr, first, first, n, dq_token_stride * step, n_cols, dq * scale, BLOCK_ROWS, BLOCK_COLS)


@triton.jit(do_not_specialize=["n_tokens"])
def _neighborhood_attention_dkv_kernel(
    dy_ptr,  # [B, H, T, D]
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, H, T, D]
    v_ptr,  # [B, H, T, D]
    lse_ptr,  # [B, H, T]
    inner_ptr,  # [B, H, T]
    dk_ptr,  # [B, H, T, D]
    dv_ptr,  # [B, H, T, D]
    dy_batch_stride, dy_head_stride, dy_token_stride,  # elements from one batch entry, head, token to the next
    q_batch_stride, q_head_stride, q_token_stride,
    k_batch_stride, k_head_stride, k_token_stride,
    v_batch_stride, v_head_stride, v_token_stride,
    dk_batch_stride, dk_head_stride, dk_token_stride,
    dv_batch_stride, dv_head_stride, dv_token_stride,
    n_heads,
    n_tokens,
    n_cols,
    half,
    dilation,
    scale,
    SHIFTS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of BLOCK_KEYS keys, from the queries whose neighbours they are, BLOCK_ROWS at a time."""
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32)
    step = tl.cast(dilation, tl.int64)
    batch, head, of_class, first, n = place(n_tokens, n_heads, dilation, BLOCK_KEYS)
    dy_ptr += batch * dy_batch_stride + head * dy_head_stride + of_class * dy_token_stride
    q_ptr += batch * q_batch_stride + head * q_head_stride + of_class * q_token_stride
    k_ptr += batch * k_batch_stride + head * k_head_stride + of_class * k_token_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride + of_class * v_token_stride
    dk_ptr += batch * dk_batch_stride + head * dk_head_stride + of_class * dk_token_stride
    dv_ptr += batch * dv_batch_stride + head * dv_head_stride + of_class * dv_token_stride
    lse_ptr += (batch * n_heads + head) * n_tokens + of_class
    inner_ptr += (batch * n_heads + head) * n_tokens + of_class
    dy_step, q_step = dy_token_stride * step, q_token_stride * step

    keys = first + tl.arange(0, BLOCK_KEYS)
    k = load_tile(k_ptr, first, n, k_token_stride * step, n_cols, BLOCK_KEYS, BLOCK_COLS)
    v = load_tile(v_ptr, first, n, v_token_stride * step, n_cols, BLOCK_KEYS, BLOCK_COLS)
    dk = tl.zeros((BLOCK_KEYS, BLOCK_COLS), tl.float32)
    dv = tl.zeros((BLOCK_KEYS, BLOCK_COLS), tl.float32)
    begin, end = _queries_of(first, half, n, SHIFTS, BLOCK_KEYS)
    for start in tl.range(begin, end, BLOCK_ROWS, num_stages=STAGES):
        queries = start + tl.arange(0, BLOCK_ROWS)
        q = load_tile(q_ptr, start, n, q_step, n_cols, BLOCK_ROWS, BLOCK_COLS)
        dy = load_tile(dy_ptr, start, n, dy_step, n_cols, BLOCK_ROWS, BLOCK_COLS)
        # queries past the last have weights of 0
        lse = tl.load(lse_ptr + queries * dilation, mask=queries < n, other=float("inf"))
        inner = tl.load(inner_ptr + queries * dilation, mask=queries < n, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        dp = tl.dot(v, tl.trans(dy), input_precision="ieee")
        p = tl.exp2(s * (scale * LOG2_E) - lse[None, :])
        p = tl.where(near(queries[None, :], keys[:, None], half, n, SHIFTS), p, 0.0)
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        ds = p * (dp - inner[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    store_tile(dk_ptr, first, first, n, dk_token_stride * step, n_cols, dk * scale, BLOCK_KEYS, BLOCK_COLS)
    store_tile(dv_ptr, first, first, n, dv_token_stride * step, n_cols, dv, BLOCK_KEYS, BLOCK_COLS)
