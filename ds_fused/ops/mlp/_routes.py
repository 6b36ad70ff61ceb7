"""Which rows each expert works on: the (token, choice) pairs of top-k routing, sorted by expert.

A counting sort, stable and without atomics: chunks of CHUNK pairs count how many of each expert they have; the running
sum of these counts, expert by expert and chunk by chunk, says where the pairs of each expert and chunk end; and each
pair's place is that less how many of its chunk come behind it. The host learns none of it.

Sizes: N pairs, T tokens, k choices of a token (N = T k), E experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, power_of_2

# pairs of a chunk, all of which are compared with each other, and experts that a program counts
CHUNK, COUNTED = 128, 64
# tiles whose experts a program finds, each of which it compares with all experts
FOUND = 16


class Routes(NamedTuple):
    """All int32. The places of an expert's pairs follow each other, in the order of its tokens."""

    pairs: Tensor  # [N] of each place: its pair, token * k + choice; unwritten behind the last place
    tokens: Tensor  # [N] of each place: its token; unwritten behind the last place
    places: Tensor  # [N] of each pair: its place; -1 of nobody's
    ends: Tensor  # [E, chunks]: the last of each expert's is where its places end, the last of all the last place
    tile_experts: Tensor  # [tiles]; E where there are fewer tiles
    tile_rows: Tensor  # [tiles]: the first place of each
    n_tiles: Tensor  # [1]: how many there are
    bounds: Tensor  # [E + 1]: 0 and where the places of each expert end


@triton.jit(do_not_specialize=["n_pairs", "n_chunks"])
def _count_kernel(
    ids_ptr,  # [N]
    counts_ptr,  # [E, chunks]
    n_pairs,
    n_experts,
    n_chunks,
    CHUNK: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0).to(tl.int64)
    experts = tl.program_id(1) * COUNTED + tl.arange(0, COUNTED)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pairs, mask=pairs < n_pairs, other=-1)
    counts = tl.sum((experts[:, None] == ids[None, :]).to(tl.int32), axis=1)
    tl.store(counts_ptr + experts.to(tl.int64) * n_chunks + chunk, counts, mask=experts < n_experts)


@triton.jit(do_not_specialize=["n_pairs", "n_chunks"])
def _place_kernel(
    ids_ptr,  # [N]
    ends_ptr,  # [E, chunks]
    pairs_ptr,  # [N]
    tokens_ptr,  # [N]
    places_ptr,  # [N]
    n_pairs,
    n_experts,
    n_chunks,
    n_choices,
    CHUNK: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    here = tl.arange(0, CHUNK)
    pairs = chunk * CHUNK + here
    mask = pairs < n_pairs
    ids = tl.load(ids_ptr + pairs, mask=mask, other=-1).to(tl.int64)
    # loaded again: to lay it along another axis would take shared memory and a barrier
    others = tl.load(ids_ptr + pairs, mask=mask, other=-1).to(tl.int64)
    from_here_on = tl.sum(((ids[:, None] == others[None, :]) & (here[:, None] <= here[None, :])).to(tl.int32), axis=1)
    is_ones = mask & (ids < n_experts)
    places = tl.load(ends_ptr + ids * n_chunks + chunk, mask=is_ones, other=0) - from_here_on
    tl.store(places_ptr + pairs, tl.where(is_ones, places, -1), mask=mask)
    tl.store(pairs_ptr + places, pairs.to(tl.int32), mask=is_ones)
    tl.store(tokens_ptr + places, (pairs // n_choices).to(tl.int32), mask=is_ones)


@triton.jit(do_not_specialize=["n_tiles", "n_chunks"])
def _tile_kernel(
    ends_ptr,  # [E, chunks]
    tile_experts_ptr,  # [tiles]
    tile_rows_ptr,  # [tiles]
    n_tiles_ptr,  # [1]
    bounds_ptr,  # [E + 1]
    n_tiles,
    n_experts,
    n_chunks,
    ROWS: tl.constexpr, FOUND: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Tiles of ROWS places, each of one expert."""
    tiles = tl.program_id(0) * FOUND + tl.arange(0, FOUND)
    experts = tl.arange(0, EXPERTS)
    mask = experts < n_experts
    last = ends_ptr + (experts.to(tl.int64) + 1) * n_chunks - 1
    end = tl.load(last, mask=mask, other=0)
    begin = tl.load(last - n_chunks, mask=mask & (experts > 0), other=0)
    count = tl.where(mask, (end - begin + ROWS - 1) // ROWS, 0)
    behind = tl.cumsum(count, 0)
    # the expert of a tile is the first whose tiles do not all lie before it
    before = (behind[None, :] <= tiles[:, None]) & mask[None, :]
    expert = tl.sum(before.to(tl.int32), axis=1)
    is_its = experts[None, :] == expert[:, None]
    row = tl.sum(tl.where(is_its, begin[None, :] + (tiles[:, None] - (behind - count)[None, :]) * ROWS, 0), axis=1)
    tl.store(tile_experts_ptr + tiles, expert, mask=tiles < n_tiles)
    tl.store(tile_rows_ptr + tiles, row, mask=tiles < n_tiles)
    if tl.program_id(0) == 0:
        tl.store(n_tiles_ptr, tl.sum(count, axis=0))
        tl.store(bounds_ptr, 0)
        tl.store(bounds_ptr + 1 + experts, end, mask=mask)


def routes_of(ids: Tensor, n_choices: int, n_experts: int, tile_rows: int) -> Routes:
    """ids [N], each in [0, E]; N and E are positive."""
    n = ids.shape[0]
    chunks = cdiv(n, CHUNK)
    # as many as there can be, since the host doesn't know: each expert's last tile may be short
    n_tiles = n // tile_rows + min(n, n_experts)
    counts = torch.empty((n_experts, chunks), dtype=torch.int32, device=ids.device)
    launch(
        _count_kernel, (chunks, cdiv(n_experts, COUNTED)),
        ids, counts, n, n_experts, chunks,
        CHUNK=CHUNK, COUNTED=COUNTED,
    )  # fmt: skip
    ends = counts.view(-1).cumsum(0, dtype=torch.int32).view(n_experts, chunks)
    pairs, tokens, places = (torch.empty(n, dtype=torch.int32, device=ids.device) for _ in range(3))
    launch(_place_kernel, (chunks,), ids, ends, pairs, tokens, places, n, n_experts, chunks, n_choices, CHUNK=CHUNK)
    tile_experts, tile_firsts = (torch.empty(n_tiles, dtype=torch.int32, device=ids.device) for _ in range(2))
    found, bounds = (torch.empty(size, dtype=torch.int32, device=ids.device) for size in (1, n_experts + 1))
    launch(
        _tile_kernel, (cdiv(n_tiles, FOUND),),
        ends, tile_experts, tile_firsts, found, bounds, n_tiles, n_experts, chunks,
        ROWS=tile_rows, FOUND=FOUND, EXPERTS=power_of_2(n_experts),
    )  # fmt: skip
    return Routes(pairs, tokens, places, ends, tile_experts, tile_firsts, found, bounds)
