"""The kernels of _causal_conv: a convolution over the planes of x, as products with banded matrices.

One row of taps moves a row of x over its columns: a product with a matrix that has the taps along its diagonals, one
matrix for all tiles of a plane. A tile of y is the sum of these products, one for each row of taps, of tiles of x that
lie a row (or a dilation) apart. Columns of x start PAD_COLS before those of y, a multiple of 16: so they are loaded as
many at a time as the hardware can.

Sizes: B batch entries, C channels of y, n_outs of a group, of which OUTS share the tiles of x; S = n_sources channels
of x in a group; planes of x and y [rows, cols]; taps [height, width]; K = CHUNKS * BLOCK_K columns of x meet BLOCK_COLS
columns of y.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _below(ptr, rows, offsets, cols, n_rows, n_cols):
    """Elements of a plane up to its diagonal, zeros elsewhere. ``offsets``: of the rows, in elements."""
    inside = (rows >= 0) & (rows < n_rows) & (cols >= 0) & (cols < n_cols)
    # what lies above is not always written. Up to 15 more columns are loaded, so that it can be done 16 at a time
    x = tl.load(ptr + offsets + cols, mask=inside & (cols // 16 * 16 <= rows), other=0.0)
    return tl.where(cols <= rows, x, 0.0)


@triton.jit
def _causal_conv_bands_kernel(
    weight_ptr,  # [C_out, C_in of a group, height, width]
    bands_ptr,  # [C / OUTS, S, height, K, OUTS, BLOCK_COLS]
    n_outs,
    n_sources,
    height,
    width,
    dilation,
    shift,  # columns of x before the first tap of y's first one
    FLIPPED: tl.constexpr, OUTS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """A row of taps between two channels, as a matrix. FLIPPED: of the convolution back, from C_out to C_in."""
    pid = tl.program_id(0).to(tl.int64)
    tap = pid % height
    pair = pid // height
    channel, source = pair // n_sources, pair % n_sources
    bands_ptr += (
        ((channel // OUTS * n_sources + source) * height + tap) * tl.num_programs(1) * BLOCK_K * OUTS * BLOCK_COLS
    )
    bands_ptr += channel % OUTS * BLOCK_COLS
    if FLIPPED:
        group, within = channel // n_outs, channel % n_outs
        pair = (group * n_sources + source) * n_outs + within
        tap = height - 1 - tap

    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    place = k - cols - shift
    col_tap = place // dilation
    is_tap = (place >= 0) & (place % dilation == 0) & (col_tap < width)
    if FLIPPED:
        col_tap = width - 1 - col_tap
    weight = tl.load(weight_ptr + (pair * height + tap) * width + col_tap, mask=is_tap, other=0.0)
    tl.store(bands_ptr + k * OUTS * BLOCK_COLS + cols, weight)


@triton.jit
def _causal_conv_kernel(
    x_ptr,  # [B, C / n_outs * S, x_rows, x_cols]
    bands_ptr,  # [C / OUTS, S, height, K, OUTS, BLOCK_COLS]
    bias_ptr,  # [C]
    y_ptr,  # [B, C, y_rows, y_cols]
    x_rows,
    x_cols,
    y_rows,
    y_cols,
    n_channels,
    n_outs,
    n_sources,
    height,
    dilation,
    pad_rows,
    HAS_BIAS: tl.constexpr, FILLS: tl.constexpr, OUTS: tl.constexpr, PAD_COLS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A tile of OUTS planes of y up to their diagonals, and zeros above; without FILLS nothing is said of that."""
    pid = tl.program_id(0).to(tl.int64)
    col_tiles = tl.cdiv(y_cols, BLOCK_COLS)
    first_col = (pid % col_tiles).to(tl.int32) * BLOCK_COLS
    pid = pid // col_tiles
    # the outs of a group one after the other: what they read is in L2
    turns = n_outs // OUTS
    out = pid % turns * OUTS
    pid = pid // turns
    row_tiles = tl.cdiv(y_rows, BLOCK_ROWS)
    first_row = (pid % row_tiles).to(tl.int32) * BLOCK_ROWS
    group = pid // row_tiles
    plane = group * n_outs + out
    channel = plane % n_channels

    y = tl.zeros((BLOCK_ROWS, OUTS * BLOCK_COLS), tl.float32)
    has_some = first_col < first_row + BLOCK_ROWS
    if has_some:
        x_ptr += group * n_sources * x_rows * x_cols
        bands_ptr += channel // OUTS * n_sources * height * CHUNKS * BLOCK_K * OUTS * BLOCK_COLS
        rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
        k = tl.arange(0, BLOCK_K)
        stack = tl.arange(0, OUTS * BLOCK_COLS)[None, :]
        for turn in tl.range(0, n_sources * height * CHUNKS, num_stages=STAGES):
            chunk = turn % CHUNKS
            source = turn // CHUNKS // height
            tap = turn // CHUNKS % height
            near = rows + (tap * dilation - pad_rows)
            offsets = (source.to(tl.int64) * x_rows + near) * x_cols
            x_at = first_col - PAD_COLS + chunk * BLOCK_K + k[None, :]
            x = _below(x_ptr, near, offsets, x_at, x_rows, x_cols)
            band = tl.load(bands_ptr + (turn * BLOCK_K + k[:, None]) * OUTS * BLOCK_COLS + stack)
            y += tl.dot(x, band)
    if FILLS or has_some:
        tile = tl.reshape(y, (BLOCK_ROWS, OUTS, BLOCK_COLS))
        outs = tl.arange(0, OUTS)[None, :, None]
        if HAS_BIAS:
            tile += tl.load(bias_ptr + channel + outs).to(tl.float32)
        y_row = first_row + tl.arange(0, BLOCK_ROWS)[:, None, None]
        y_col = first_col + tl.arange(0, BLOCK_COLS)[None, None, :]
        at = ((plane + outs) * y_rows + y_row) * y_cols + y_col
        tl.store(y_ptr + at, tl.where(y_col <= y_row, tile, 0.0), mask=(y_row < y_rows) & (y_col < y_cols))


@triton.jit
def _causal_conv_taps_kernel(
    x_ptr,  # [B, C / n_outs * S, x_rows, x_cols]
    dy_ptr,  # [B, C, y_rows, y_cols]
    parts_ptr,  # [P, C, S, blocks of taps, CHUNKS, TAPS * BLOCK_K, BLOCK_COLS] fp32
    dbias_ptr,  # [P, C, BLOCK_COLS] fp32
    n_batch,
    x_rows,
    x_cols,
    y_rows,
    y_cols,
    n_channels,
    n_outs,
    n_sources,
    height,
    dilation,
    pad_rows,
    WANTS_DBIAS: tl.constexpr, PAD_COLS: tl.constexpr, CHUNKS: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x^T dy over every P-th tile of rows, for TAPS rows of taps at once: the gradient of the banded matrices."""
    pid = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    chunk = pid % CHUNKS
    tap_blocks = tl.cdiv(height, TAPS)
    tap_block = pid // CHUNKS % tap_blocks
    pair = pid // CHUNKS // tap_blocks
    channel, source = pair // n_sources, pair % n_sources

    tap = tap_block.to(tl.int32) * TAPS + tl.arange(0, TAPS)[None, :, None]
    # taps past the last read no row
    x_row = tl.where(tap < height, tap * dilation - pad_rows, x_rows)
    x_col = chunk.to(tl.int32) * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :] - PAD_COLS
    taps = tl.zeros((TAPS * BLOCK_K, BLOCK_COLS), tl.float32)
    dbias = tl.zeros((BLOCK_COLS,), tl.float32)

    row_tiles = tl.cdiv(y_rows, BLOCK_ROWS)
    for item in range(part, n_batch * row_tiles, tl.num_programs(1)):
        batch = (item // row_tiles).to(tl.int64)
        first_row = item % row_tiles * BLOCK_ROWS
        rows = first_row + tl.arange(0, BLOCK_ROWS)[:, None]
        dy_offsets = ((batch * n_channels + channel) * y_rows + rows) * y_cols
        n_sets = n_channels // n_outs
        plane = (batch * n_sets + channel // n_outs) * n_sources + source
        near = rows[:, :, None] + x_row
        x_offsets = (plane * x_rows + near) * x_cols
        for first_col in tl.range(0, tl.minimum(first_row + BLOCK_ROWS, y_cols), BLOCK_COLS, num_stages=STAGES):
            cols = first_col + tl.arange(0, BLOCK_COLS)[None, :]
            dy = _below(dy_ptr, rows, dy_offsets, cols, y_rows, y_cols)
            x = _below(x_ptr, near, x_offsets, first_col + x_col, x_rows, x_cols)
            x = tl.reshape(x, (BLOCK_ROWS, TAPS * BLOCK_K))
            taps += tl.dot(tl.trans(x), dy)
            if WANTS_DBIAS:
                dbias += tl.sum(dy.to(tl.float32), axis=0)

    cols = tl.arange(0, BLOCK_COLS)[None, :]
    parts_ptr += (part * tl.num_programs(0).to(tl.int64) + pid) * TAPS * BLOCK_K * BLOCK_COLS
    tl.store(parts_ptr + tl.arange(0, TAPS * BLOCK_K)[:, None] * BLOCK_COLS + cols, taps)
    if WANTS_DBIAS and (source == 0) & (tap_block == 0) & (chunk == 0):
        tl.store(dbias_ptr + (part * n_channels + channel) * BLOCK_COLS + tl.arange(0, BLOCK_COLS), dbias)


@triton.jit(do_not_specialize=["n_parts"])
def _causal_conv_sums_kernel(
    parts_ptr,  # [P, C, S, blocks of taps, CHUNKS, TAPS * BLOCK_K, BLOCK_COLS] fp32
    dbias_parts_ptr,  # [P, C, BLOCK_COLS] fp32
    dweight_ptr,  # [C, S, height, width]
    dbias_ptr,  # [C]
    n_parts,
    part_size,  # elements
    n_channels,
    n_sources,
    height,
    width,
    dilation,
    shift,
    WANTS_DBIAS: tl.constexpr, CHUNKS: tl.constexpr, TAPS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_COLS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A row of taps: the sums along the diagonals of its matrix, over all parts."""
    pid = tl.program_id(0).to(tl.int64)
    tap = pid % height
    pair = pid // height
    col_tap = tl.arange(0, BLOCK_WIDTH)[:, None]
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    k = cols + col_tap * dilation + shift
    block = (pair * tl.cdiv(height, TAPS) + tap // TAPS) * CHUNKS + k // BLOCK_K
    place = (block * TAPS * BLOCK_K + tap % TAPS * BLOCK_K + k % BLOCK_K) * BLOCK_COLS + cols
    total = tl.zeros((BLOCK_WIDTH, BLOCK_COLS), tl.float32)
    for _ in range(n_parts):
        total += tl.load(parts_ptr + place, mask=col_tap < width, other=0.0)
        parts_ptr += part_size
    col_taps = tl.arange(0, BLOCK_WIDTH)
    tl.store(dweight_ptr + pid * width + col_taps, tl.sum(total, axis=1), mask=col_taps < width)

    if WANTS_DBIAS and (tap == 0) & (pair % n_sources == 0):
        channel = pair // n_sources
        sums = tl.zeros((BLOCK_COLS,), tl.float32)
        for part in range(n_parts):
            sums += tl.load(dbias_parts_ptr + (part * n_channels + channel) * BLOCK_COLS + tl.arange(0, BLOCK_COLS))
        tl.store(dbias_ptr + channel, tl.sum(sums))
