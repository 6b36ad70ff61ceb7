"""A convolution of planes of which only what does not lie above the diagonal counts, before it and after it.

``y = tril(conv2d(tril(x), weight, bias))`` with a stride of 1, in 16 bits. x, y and their gradients are read and
written up to the diagonal alone (y gets its zeros), which is half of what a library's convolution moves, and products
run on the tensor cores where a library has none for few channels: see _causal_conv_kernels.py. Sums are fp32.

Each part of dweight and dbias is written by one program, and they are added up in a fixed order (no atomics: same
input, same bits).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.attention._causal_conv_kernels import (
    _causal_conv_bands_kernel,
    _causal_conv_kernel,
    _causal_conv_sums_kernel,
    _causal_conv_taps_kernel,
)
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, power_of_2, resident

# A tile of y, and columns of x that are multiplied at a time. Tiles of 64 rows, or of 64 columns in chunks of 32, come
# to the same; 8 warps take 1.3 times as long (H100, L = 2048, 5x11 taps a head: 347 us)
ROWS, COLS, K = 128, 32, 64
WARPS, STAGES = 4, 3
MOST_OUTS = 4
# a tile of rows for the gradient of the taps, rows of taps that share its product at most, and those of all channels.
# 64 rows, 8 warps or 2 stages take 1.2 to 1.5 times as long (same case: 268 us)
TAP_ROWS, TAPS, MOST_TAPS = 32, 8, 8
TAP_WARPS, TAP_STAGES = 4, 3
# where the columns of a plane are no multiple of 16 each element is loaded by itself, from an address of its own, for
# more of which the registers of fewer threads don't suffice
RAGGED_TAP_ROWS, RAGGED_WARPS = 16, 8
WARPS_PER_MULTIPROCESSOR = 16
# a library's convolution multiplies what is masked, but no zeros of a band: where an element of y takes more products
# than this, it is taken for the faster one
MOST_PRODUCTS = 2048


class Window(NamedTuple):
    """Taps [height, width] with dilation and padding, and between how many channels of a group."""

    n_outs: int
    n_sources: int
    height: int
    width: int
    dilation: tuple[int, int]
    padding: tuple[int, int]

    @property
    def back(self) -> Window:
        """Of the convolution that makes dx of dy."""
        padding = [d * (n - 1) - p for d, n, p in zip(self.dilation, self[2:4], self.padding, strict=True)]
        return self._replace(n_outs=self.n_sources, n_sources=self.n_outs, padding=tuple(padding))

    @property
    def pad_cols(self) -> int:
        """Columns of x before y's: as the padding has it, but whole sixteens."""
        return cdiv(self.padding[1], 16) * 16

    @property
    def shift(self) -> int:
        return self.pad_cols - self.padding[1]

    @property
    def chunks(self) -> int:
        return cdiv(COLS + (self.width - 1) * self.dilation[1] + self.shift, K)

    @property
    def tap_chunks(self) -> int:
        """With one column more, for dbias."""
        return cdiv(COLS + (self.width - 1) * self.dilation[1] + self.shift + 1, K)

    @property
    def outs(self) -> int:
        """Channels of y that share the tiles of x."""
        return math.gcd(self.n_outs, MOST_OUTS)

    @property
    def products(self) -> int:
        """That an element of y takes."""
        return self.n_sources * self.height * self.chunks * K

    def size(self, rows: int, cols: int) -> tuple[int, int]:
        """Of a plane of y, from that of x."""
        taps = zip((rows, cols), self[2:4], self.dilation, self.padding, strict=True)
        rows, cols = (size + 2 * p - d * (n - 1) for size, n, d, p in taps)
        return rows, cols


def fits(window: Window, x: Tensor) -> bool:
    """Whether this, and not a library's, is the convolution to take."""
    return x.itemsize == 2 and max(window.products, window.back.products) <= MOST_PRODUCTS


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, window: Window, *, flipped: bool = False
) -> Tensor:
    """x [B, C_in, ., .] without gaps, weight [C_out, C_in of a group, ., .] -> y [B, C_out, ., .], up to its diagonal.

    y gets zeros above. ``flipped``: dy [B, C_out, ., .] -> dx [B, C_in, ., .] of that convolution, whose ``back`` the
    window is; there nothing is said of what lies above.
    """
    batch, n_channels, y_rows, y_cols = y.shape
    n_pairs = n_channels * window.n_sources
    ragged = _is_ragged(x, y)
    bands = x.new_empty(n_pairs * window.height * window.chunks * K * COLS)
    launch(
        _causal_conv_bands_kernel, (n_pairs * window.height, window.chunks),
        weight, bands, window.n_outs, window.n_sources, window.height, window.width, window.dilation[1], window.shift,
        FLIPPED=flipped, OUTS=window.outs, BLOCK_K=K, BLOCK_COLS=COLS, num_warps=4,
    )  # fmt: skip
    launch(
        _causal_conv_kernel, (batch * n_channels // window.outs * cdiv(y_rows, ROWS) * cdiv(y_cols, COLS),),
        x, bands, bias, y, *x.shape[2:], y_rows, y_cols, n_channels, window.n_outs, window.n_sources, window.height,
        window.dilation[0], window.padding[0],
        HAS_BIAS=bias is not None, FILLS=not flipped, OUTS=window.outs, PAD_COLS=window.pad_cols, CHUNKS=window.chunks,
        BLOCK_ROWS=ROWS, BLOCK_K=K, BLOCK_COLS=COLS, STAGES=1 if ragged else STAGES,
        num_warps=RAGGED_WARPS if ragged else WARPS,
    )  # fmt: skip
    return y


def _is_ragged(x: Tensor, y: Tensor) -> bool:
    """Whether elements of the planes [., ., rows, cols] are loaded one by one."""
    return bool(x.shape[3] % 16 or y.shape[3] % 16)


def causal_conv_taps(dy: Tensor, x: Tensor, dweight: Tensor, dbias: Tensor | None, window: Window) -> None:
    """Fills dweight [C_out, C_in of a group, height, width] and dbias [C_out] from dy and x without gaps."""
    batch, n_channels, y_rows, y_cols = dy.shape
    taps = min(TAPS, power_of_2(window.height))
    outs = min(window.outs, max(1, MOST_TAPS // taps))
    ragged = _is_ragged(x, dy)
    tile_rows, warps = (RAGGED_TAP_ROWS, RAGGED_WARPS) if ragged else (TAP_ROWS, TAP_WARPS)
    blocks = n_channels // outs * window.n_sources * cdiv(window.height, taps)
    programs = blocks * window.tap_chunks
    row_tiles = batch * cdiv(y_rows + (window.height - 1) * window.dilation[0], tile_rows)
    parts = max(1, min(row_tiles, resident(x, WARPS_PER_MULTIPROCESSOR, warps) // programs))
    part_size = blocks * outs * taps * (window.width + (dbias is not None)) * COLS
    room = torch.empty(parts * part_size, dtype=torch.float32, device=x.device)
    constants = {"WANTS_DBIAS": dbias is not None, "OUTS": outs, "TAPS": taps, "BLOCK_COLS": COLS}
    launch(
        _causal_conv_taps_kernel, (programs, parts),
        x, dy, room, batch, *x.shape[2:], y_rows, y_cols, n_channels, window.n_outs, window.n_sources,
        window.height, window.width, *window.dilation, window.padding[0], window.shift,
        PAD_COLS=window.pad_cols, CHUNKS=window.tap_chunks, BLOCK_ROWS=tile_rows, BLOCK_K=K,
        STAGES=1 if ragged else TAP_STAGES, num_warps=warps, **constants,
    )  # fmt: skip
    launch(
        _causal_conv_sums_kernel, (n_channels * window.n_sources * window.height,),
        room, dweight, dbias, parts, part_size, window.n_sources, window.height, window.width,
        BLOCK_WIDTH=power_of_2(window.width + 1), num_warps=4, **constants,
    )  # fmt: skip
