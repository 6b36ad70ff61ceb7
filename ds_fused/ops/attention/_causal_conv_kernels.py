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
def _causal_conv_tile(
    x_ptr, bands_ptr, x_rows, x_cols, first_row, first_col, n_sources, height, dilation, pad_rows,
    WHOLE: tl.constexpr, OUTS: tl.constexpr, PAD_COLS: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The products that a tile of y [BLOCK_ROWS, OUTS * BLOCK_COLS] is of. WHOLE: of x nothing above its diagonal."""
    y = tl.zeros((BLOCK_ROWS, OUTS * BLOCK_COLS), tl.float32)
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
        if WHOLE:
            # no element passes through a register
            inside = (near >= 0) & (near < x_rows) & (x_at >= 0) & (x_at < x_cols)
            x = tl.load(x_ptr + offsets + x_at, mask=inside, other=0.0)
        else:
            x = _below(x_ptr, near, offsets, x_at, x_rows, x_cols)
        band = tl.load(bands_ptr + (turn * BLOCK_K + k[:, None]) * OUTS * BLOCK_COLS + stack)
        y = tl.dot(x, band, y)
    return y


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

    x_ptr += group * n_sources * x_rows * x_cols
    bands_ptr += channel // OUTS * n_sources * height * CHUNKS * BLOCK_K * OUTS * BLOCK_COLS
    y = tl.zeros((BLOCK_ROWS, OUTS * BLOCK_COLS), tl.float32)
    has_some = first_col < first_row + BLOCK_ROWS
    if first_col + CHUNKS * BLOCK_K - PAD_COLS <= first_row - pad_rows + 1:
        y = _causal_conv_tile(
            x_ptr, bands_ptr, x_rows, x_cols, first_row, first_col, n_sources, height, dilation, pad_rows,
            True, OUTS, PAD_COLS, CHUNKS, BLOCK_ROWS, BLOCK_K, BLOCK_COLS, STAGES,
        )  # fmt: skip
    elif has_some:
        y = _causal_conv_tile(
            x_ptr, bands_ptr, x_rows, x_cols, first_row, first_col, n_sources, height, dilation, pad_rows,
            False, OUTS, PAD_COLS, CHUNKS, BLOCK_ROWS, BLOCK_K, BLOCK_COLS, STAGES,
        )  # fmt: skip
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
    parts_ptr,  # [P, C / OUTS, S, blocks of taps, OUTS, TAPS, width (+ 1 for dbias), BLOCK_COLS] fp32
    n_batch,
    x_rows,
    x_cols,
    y_rows,
    y_cols,
    n_channels,
    n_outs,
    n_sources,
    height,
    width,
    row_dilation,
    col_dilation,
    pad_rows,
    shift,
    WANTS_DBIAS: tl.constexpr, PAD_COLS: tl.constexpr, CHUNKS: tl.constexpr, OUTS: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_COLS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x^T dy over every P-th tile of rows: the gradient of the banded matrices, of OUTS channels and TAPS rows of taps
    at once, for each of which dy is moved against x. What is kept are the diagonals with taps.
    """
    pid = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    chunk = (pid % CHUNKS).to(tl.int32)
    tap_blocks = tl.cdiv(height, TAPS)
    first_tap = (pid // CHUNKS % tap_blocks).to(tl.int32) * TAPS
    pair = pid // CHUNKS // tap_blocks
    channel, source = pair // n_sources * OUTS, pair % n_sources

    k = chunk * BLOCK_K + tl.arange(0, BLOCK_K)[None, :] - PAD_COLS
    stack = tl.arange(0, OUTS * TAPS * BLOCK_COLS)[None, :]
    col = stack % BLOCK_COLS
    sixteen = stack // 16 * 16 % BLOCK_COLS
    tap = first_tap + stack // BLOCK_COLS % TAPS
    out = (stack // BLOCK_COLS // TAPS).to(tl.int64)
    # taps past the last read no row
    down = tl.where(tap < height, tap * row_dilation, x_rows + y_rows)
    taps = tl.zeros((BLOCK_K, OUTS * TAPS * BLOCK_COLS), tl.float32)
    # a column of x that no tap meets
    is_last = k == CHUNKS * BLOCK_K - PAD_COLS - 1
    one = tl.full((1, 1), 1.0, tl.float32).to(x_ptr.dtype.element_ty)

    # rows of x with what it is padded by: for the first tap all rows of dy
    row_tiles = tl.cdiv(y_rows + (height - 1) * row_dilation, BLOCK_ROWS)
    for item in range(part, n_batch * row_tiles, tl.num_programs(1)):
        batch = (item // row_tiles).to(tl.int64)
        first_row = item % row_tiles * BLOCK_ROWS
        plane = (batch * (n_channels // n_outs) + channel // n_outs) * n_sources + source
        x_row = first_row - pad_rows + tl.arange(0, BLOCK_ROWS)[:, None]
        x_offset = x_row.to(tl.int64) * x_cols
        x_plane = x_ptr + plane * x_rows * x_cols
        dy_row = first_row + tl.arange(0, BLOCK_ROWS)[:, None] - down
        dy_offset = (out * y_rows + dy_row) * y_cols
        dy_plane = dy_ptr + (batch * n_channels + channel) * y_rows * y_cols
        has_x = (x_row >= 0) & (x_row < x_rows)
        has_dy = (dy_row >= 0) & (dy_row < y_rows)
        end = tl.minimum(first_row + BLOCK_ROWS, y_cols)
        # tiles of dy and of x all of which lies below the diagonal
        whole = tl.minimum(
            first_row + 1 - (height - 1) * row_dilation,
            first_row + 1 - pad_rows + PAD_COLS - (chunk + 1) * BLOCK_K + BLOCK_COLS,
        )
        whole = tl.maximum(tl.minimum(whole, end), 0) // BLOCK_COLS * BLOCK_COLS
        for first_col in tl.range(0, whole, BLOCK_COLS, num_stages=STAGES):
            x_col = first_col + k
            dy = tl.load(dy_plane + first_col + (dy_offset + col), mask=has_dy & (first_col + col < y_cols), other=0.0)
            x = tl.load(x_plane + first_col + (x_offset + k), mask=has_x & (x_col >= 0) & (x_col < x_cols), other=0.0)
            if WANTS_DBIAS:
                x = tl.where(is_last, one, x)
            taps = tl.dot(tl.trans(x), dy, taps)
        for first_col in range(whole, end, BLOCK_COLS):
            # as _below has it, which doesn't see that 16 columns share an answer
            reaches = has_dy & (first_col + col < y_cols) & (first_col + sixteen <= dy_row)
            dy = tl.load(dy_plane + first_col + (dy_offset + col), mask=reaches, other=0.0)
            dy = tl.where(first_col + col <= dy_row, dy, 0.0)
            x = _below(x_plane, x_row, x_offset, first_col + k, x_rows, x_cols)
            if WANTS_DBIAS:
                x = tl.where(is_last, one, x)
            taps = tl.dot(tl.trans(x), dy, taps)

    # the chunks of a row of taps have diagonals of one room
    n_diagonals = width + WANTS_DBIAS
    parts_ptr += (part * (tl.num_programs(0) // CHUNKS).to(tl.int64) + pid // CHUNKS) * (
        OUTS * TAPS * n_diagonals * BLOCK_COLS
    )
    place = tl.trans(k + PAD_COLS - shift) - col
    diagonal = place // col_dilation
    is_kept = (place >= 0) & (place % col_dilation == 0) & (diagonal < width)
    if WANTS_DBIAS:
        is_dbias = tl.trans(is_last)
        diagonal = tl.where(is_dbias, width, diagonal)
        is_kept = is_kept | is_dbias
    tl.store(parts_ptr + (stack // BLOCK_COLS * n_diagonals + diagonal) * BLOCK_COLS + col, taps, mask=is_kept)


@triton.jit(do_not_specialize=["n_parts"])
def _causal_conv_sums_kernel(
    parts_ptr,  # [P, C / OUTS, S, blocks of taps, OUTS, TAPS, width (+ 1 for dbias), BLOCK_COLS] fp32
    dweight_ptr,  # [C, S, height, width]
    dbias_ptr,  # [C]
    n_parts,
    part_size,  # elements
    n_sources,
    height,
    width,
    WANTS_DBIAS: tl.constexpr, OUTS: tl.constexpr, TAPS: tl.constexpr, BLOCK_COLS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A row of taps: the sums along the diagonals of its matrix, over all parts; after them that of dbias."""
    pid = tl.program_id(0).to(tl.int64)
    tap = pid % height
    channel, source = pid // height // n_sources, pid // height % n_sources
    block = (channel // OUTS * n_sources + source) * tl.cdiv(height, TAPS) + tap // TAPS
    n_diagonals = width + WANTS_DBIAS
    parts_ptr += ((block * OUTS + channel % OUTS) * TAPS + tap % TAPS) * n_diagonals * BLOCK_COLS
    diagonal = tl.arange(0, BLOCK_WIDTH)
    cols = tl.arange(0, BLOCK_COLS)[None, :]
    total = tl.zeros((BLOCK_WIDTH, BLOCK_COLS), tl.float32)
    for _ in range(n_parts):
        at = parts_ptr + diagonal[:, None] * BLOCK_COLS + cols
        total += tl.load(at, mask=diagonal[:, None] < n_diagonals, other=0.0)
        parts_ptr += part_size
    sums = tl.sum(total, axis=1)
    tl.store(dweight_ptr + pid * width + diagonal, sums, mask=diagonal < width)
    if WANTS_DBIAS and (tap == 0) & (source == 0):
        tl.store(dbias_ptr + channel + diagonal * 0, sums, mask=diagonal == width)
