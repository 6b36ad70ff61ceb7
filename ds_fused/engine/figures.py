"""What each way of computing a head's loss under ZeRO-3 costs, as a model: memory, bytes on the wire, time.

Time is FLOPs over the measured rate of a product of this head, plus bytes over the measured rate of an all-gather. The
transfers run beside the products, but they take multiprocessors and memory bandwidth from them: measured, the sum was
nearer than the larger of the two.

Sizes: M tokens of a rank (the most of any), V vocabulary, H hidden, W ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator

from ds_fused.engine.stationary import ZeroShard
from ds_fused.engine.zero_slabs import ZeroSlabs
from ds_fused.ops._tiles import tile_elements, tiling
from ds_fused.ops.stationary import block_bytes, block_tokens

# each is run so often, after one run that doesn't count
ROUNDS = 3
# tokens of the product that is timed; a CPU would take seconds for as many
TOKENS, TOKENS_OF_CPU = 2048, 64


@dataclass(frozen=True)
class Rates:
    """Of the slowest rank."""

    flops: float  # a second
    wire: float  # bytes a second that a rank takes in


@dataclass(frozen=True)
class Figures:
    """Of a forward and a backward."""

    mode: str
    parts: str
    held: int  # bytes beside x, dx, and the gradient that DeepSpeed keeps anyway
    wire: int  # bytes that a rank takes in
    seconds: float

    def __str__(self) -> str:
        held, wire, ms = self.held / 2**20, self.wire / 2**20, 1e3 * self.seconds
        return f"{self.mode} ({self.parts}, {held:,.0f} MiB held, {wire:,.0f} MiB on the wire, {ms:.3g} ms)"


def of_stream(slabs: ZeroSlabs, most: int, chunk_bytes: int, keep_bytes: int, rates: Rates) -> Figures:
    n_vocab, hidden = slabs.shape
    itemsize = slabs.dtype.itemsize
    trains = slabs.requires_grad
    # a frozen head is done with in the forward, see ops/frozen_head.py
    keep_bytes = keep_bytes if trains else 0
    cut = tiling(most, n_vocab, itemsize, chunk_bytes, keep_bytes, dx=True, dweight=trains, slab_rows=slabs.slab_rows)
    n_tiles = len(slabs) * -(-most // cut.tokens)
    tile_bytes = tile_elements(cut.tokens, cut.rows) * itemsize
    made_again = 2 * trains * (1 - min(1.0, cut.kept / max(1, n_tiles)))
    flops = (4 + 2 * trains + made_again) * most * n_vocab * hidden
    slab_bytes = slabs.slab_rows * hidden * itemsize
    held = (
        (2 + 2 * trains) * slab_bytes + max(1, cut.kept) * tile_bytes + most * hidden * (4 if trains else 4 + itemsize)
    )
    # backward begins with the slab that forward ended with
    whole = n_vocab * hidden * itemsize
    wire = (3 * whole - slab_bytes if trains else whole) * (slabs.ranks - 1) // slabs.ranks
    return Figures("stream", f"{len(slabs)} slabs", held, wire, flops / rates.flops + wire / rates.wire)


def of_stationary(shard: ZeroShard, most: int, chunk_bytes: int, rates: Rates) -> Figures:
    n_vocab, hidden = shard.shape
    itemsize = shard.dtype.itemsize
    block = block_tokens(most, n_vocab, hidden, shard.ranks, itemsize, chunk_bytes)
    blocks = -(-most // block)
    flops = (4 + 2 * shard.requires_grad) * most * n_vocab * hidden
    held = block * block_bytes(n_vocab, hidden, shard.ranks, itemsize)
    held += shard.shards.size * (4 * shard.requires_grad + itemsize * shard.is_offloaded)
    # x there, dx back in fp32, three numbers and a label
    wire = (shard.ranks - 1) * most * (hidden * (itemsize + 4) + 20)
    return Figures("stationary", f"{blocks} blocks", held, wire, flops / rates.flops + wire / rates.wire)


def chosen(ways: list[Figures], free: float) -> Figures:
    """The fastest of those that fit into the free bytes, of equal ones the smallest; if none fits, the smallest."""
    fitting = [way for way in ways if way.held <= free]
    if not fitting:
        return min(ways, key=lambda way: way.held)
    fastest = min(way.seconds for way in fitting)
    # closer than a model of this kind can tell apart
    return min((way for way in fitting if way.seconds <= 1.05 * fastest), key=lambda way: way.held)


def measured(slabs: ZeroSlabs) -> Rates:
    """Rates of this rank. Every rank must call it at the same place; the slowest counts for all, see `slowest`."""
    slabs.prefetch(0)
    rows = slabs.gather(0)
    tokens = TOKENS_OF_CPU if slabs.device.type == "cpu" else TOKENS
    x = torch.zeros(tokens, slabs.shape[1], dtype=slabs.dtype, device=slabs.device)
    product = _seconds(lambda: x @ rows.t())
    taken = rows.numel() * rows.element_size() * (slabs.ranks - 1) / slabs.ranks
    gather = _seconds(lambda: (slabs.prefetch(0), slabs.gather(0)))
    return Rates(2 * x.numel() * rows.shape[0] / product, taken / gather if taken else float("inf"))


def _seconds(run: Callable[[], object]) -> float:
    accelerator = get_accelerator()
    run()
    accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        run()
    accelerator.synchronize()
    return (time.perf_counter() - began) / ROUNDS
