"""Tiles of logits: their sizes, their room, and the matrix products that make and use them.

Sizes: M tokens, V vocabulary, n rows of a slab.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd, inf

import torch
from torch import Tensor

from ds_fused.ops.common._options import check_numbers

# not yet measured. a side of a tile shorter than this starves the matrix products, whatever chunk_mb says
LEAST_SIDE = 2048
# sides are whole tiles of the matrix products
SIDE_STEP = 256
# elements that a product makes in one wave: tiles of 128 x 256 on the 132 multiprocessors of an H100. The same
# everywhere: the ranks of a job must cut alike
WAVE = 132 * 128 * 256
# a product has only slow kernels along a side that is no multiple of it (338 for 149 ms, benchmarks/notes.md)
PRODUCT_STEP = 8
# elements: rows of logits start on a cache line, so the softmax pass reads 16 bytes at a time for odd vocabularies too
ROW_STEP = 64
# n sums that grow as a random walk, each rounded, are sqrt(n / 2) times as far off as one rounding
MOST_ROUNDINGS = 8
# Slabs that a forward leaves gathered for its backward. That begins with them and one gradient, and holds two slabs and
# two gradients later: so these take no more
KEPT_SLABS = 3
ACCUMULATE = ("auto", "native", "fp32")


@dataclass(frozen=True)
class Tiling:
    """How the logits [M, V] are cut. A function of shapes and options alone: no rank may decide by its data."""

    tokens: int  # of a chunk
    rows: int  # of a slab
    kept: int  # tiles kept for backward: the last ones, slab by slab, for the first slab may be small
    kept_slabs: int = 0  # of a weight that comes in slabs, those whose rows are kept for backward: the last ones


def check_memory(op: str, chunk_mb: float, keep_mb: float) -> None:
    check_numbers(op, chunk_mb=chunk_mb, keep_mb=keep_mb)
    # NaN is neither
    if not (0 < chunk_mb < inf and 0 <= keep_mb < inf):
        raise ValueError(f"{op}: chunk_mb={chunk_mb} must be positive and keep_mb={keep_mb} not negative, both finite")


def check_accumulate(op: str, accumulate: str) -> None:
    if accumulate not in ACCUMULATE:
        raise ValueError(f"{op}: accumulate is {accumulate!r}; it must be 'auto', 'native' or 'fp32'")


def tiling(
    n_tokens: int,
    n_vocab: int,
    itemsize: int,
    chunk_bytes: int,
    keep_bytes: int,
    *,
    dx: bool,
    dweight: bool,
    casts: bool = False,  # the weight, slab by slab
    slab_rows: int | None = None,  # where the weight comes in slabs of its own: the most that any has
    n_slabs: int | None = None,  # and how many they are
    keeps_slabs: bool = False,
) -> Tiling:
    """Tiles of at most about `chunk_bytes`, cut so that little other scratch is needed: see two_pass.py."""
    tokens, rows = max(n_tokens, 1), slab_rows or n_vocab
    if slab_rows is not None:
        # slabs are cut for the products (engine/zero3/shards.py): so little more is worth no second chunk and sum of
        # dweight
        chunk_bytes += chunk_bytes // 32
    if slab_rows is not None or tokens * rows * itemsize > max(chunk_bytes, keep_bytes):
        if slab_rows is None and (dweight or casts) and (tokens < n_vocab or not dx):
            rows = side(n_vocab, chunk_bytes // (tokens * itemsize))
        tokens = side(tokens, chunk_bytes // (rows * itemsize))
    n_tiles = (n_slabs or -(-n_vocab // rows)) * -(-n_tokens // tokens)
    kept = min(n_tiles, keep_bytes // (tile_elements(tokens, rows) * itemsize))
    if n_slabs is not None and n_tokens * n_vocab * itemsize <= keep_bytes:
        # not all are as large
        kept = n_tiles
    return Tiling(tokens, rows, kept, KEPT_SLABS if keeps_slabs else 0)


def side(size: int, fits: int, ranks: int = 1, least: int | None = None) -> int:
    """Even parts of `size`, none above what fits: a small rest costs as many passes over the weight as a full part.

    ``ranks``: so many such parts, one of each rank, make a side together. ``least``: of one part, where it is not
    LEAST_SIDE of all ranks.
    """
    step = in_products(SIDE_STEP, ranks)
    if fits < step:
        # steps are for sides of many
        step = 1
    most = max(max(1, LEAST_SIDE // ranks) if least is None else least, fits // step * step)
    if size <= most:
        return size
    parts = -(-size // most)
    return -(-size // (parts * step)) * step


def rows_of_waves(fits: int, columns: int, ranks: int) -> int:
    """Rows of each rank, at most what fits, so that a product with so many columns over all ranks' is whole waves.

    0 where not even one fits.
    """
    wave = _wave(columns, ranks)
    return fits // wave * wave if wave else 0


def first_half(rows: int, columns: int, ranks: int) -> int:
    """Of a block with so many rows of each rank, cut in two for products as above, the larger half.

    All of them, where a half would be too small for products.
    """
    wave = _wave(columns, ranks)
    if wave and rows >= 2 * wave:
        return -(-(rows // wave) // 2) * wave
    return -(-rows // 2) if rows * ranks >= 2 * LEAST_SIDE else rows


def _wave(columns: int, ranks: int) -> int:
    return in_products(WAVE // columns // SIDE_STEP * SIDE_STEP, ranks) if columns * SIDE_STEP <= WAVE else 0


def in_products(size: int, ranks: int) -> int:
    """The largest part of a rank for which all ``ranks`` together have at most `size`, in whole PRODUCT_STEPs.

    Of less than a step for each as many as there are, at least 1.
    """
    step = PRODUCT_STEP // gcd(PRODUCT_STEP, ranks)
    return max(1, size // ranks // step * step or size // ranks)


def part(size: int, parts: int) -> int:
    """A side that cuts `size` into so many even parts, or fewer: whole steps."""
    return -(-size // (parts * SIDE_STEP)) * SIDE_STEP


def whole_rows(size: int, fits: int) -> int:
    """How many rows of `size` to keep where so many fit: all, or whole steps of them."""
    return size if fits >= size else fits // SIDE_STEP * SIDE_STEP


def _row_stride(rows: int) -> int:
    # torch.compile takes whole tensors only for the `out` of a product
    return rows if torch.compiler.is_compiling() else -(-rows // ROW_STEP) * ROW_STEP


def tile_elements(n_tokens: int, n_rows: int) -> int:
    """The room that a tile takes."""
    return n_tokens * _row_stride(n_rows)


def tile(room: Tensor, n_tokens: int, n_rows: int) -> Tensor:
    """[tokens, n] at the start of its room, rows strided; smaller ones of the last chunk and slab too."""
    stride = _row_stride(n_rows)
    return room[: n_tokens * stride].view(n_tokens, stride)[:, :n_rows]


def new_tile(room: Tensor, n_tokens: int, n_rows: int) -> Tensor:
    """A tile that is about to be written.

    On a CPU nothing lies between its rows that is no number: where rows are strided, oneDNN's products in bf16 read
    some of it, times 0, and of what was in memory before that would make NaN.
    """
    z = tile(room, n_tokens, n_rows)
    if room.device.type == "cpu" and n_rows < z.stride(0):
        room[: n_tokens * z.stride(0)].view(n_tokens, -1)[:, n_rows:].zero_()
    return z


def logits_of(room: Tensor, x: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """x @ rows.T + bias, written into the room of a tile."""
    z = new_tile(room, x.shape[0], rows.shape[0])
    if bias is None:
        torch.mm(x, rows.t(), out=z)
    else:
        torch.addmm(bias, x, rows.t(), out=z)
    return z


def of_chunk(whole: Tensor | None, chunk: slice) -> Tensor | None:
    """Of a tensor [..., M] that may not be there, what a chunk of tokens has."""
    return None if whole is None else whole[..., chunk]


def product(out: Tensor, a: Tensor, b: Tensor, *, add: bool = False, scale: float = 1.0) -> None:
    """out = scale * a @ b, or out += scale * a @ b: summed in fp32 and rounded once, to out's dtype."""
    if out.dtype != a.dtype and not (a.is_cuda and out.dtype == torch.float32):
        a, b = a.to(wide(a)), b.to(wide(b))  # no such product here: the operands are widened instead
    kind = {} if out.dtype == a.dtype else {"out_dtype": torch.float32}
    if kind and out.dtype != torch.float32:
        # autocast to the other half precision; what is summed is wide
        assert not add
        torch.mul(torch.mm(a, b), scale, out=out)
    elif add or scale != 1.0:
        torch.addmm(out, a, b, beta=int(add), alpha=scale, out=out, **kind)
    else:
        torch.mm(a, b, out=out, **kind)


def sum_dtype(weight: torch.dtype, x: Tensor, n_chunks: int, *, native: bool) -> torch.dtype:
    """What a gradient of that dtype is added up in over chunks of x; ``native``: in its own, where products have it."""
    return weight if n_chunks <= 1 or (native and weight == x.dtype) else wide(x)


def wide(x: Tensor) -> torch.dtype:
    """fp32; fp64 where plain PyTorch runs in it."""
    return torch.promote_types(x.dtype, torch.float32)
