"""What each way of computing a head's loss under ZeRO-3 costs, as a model: memory, bytes on the wire, time.

Time is a sum of four, each at a rate that was measured where the job runs (``rates.py``): FLOPs of the products; bytes
that the softmax passes move, and of sums that a product reads before it adds to them (what products read and write else
is in their rate); bytes on the wire; and so much for each collective, however small. The transfers run beside the
products, but they take multiprocessors and memory bandwidth from them: measured, the sum was nearer than the larger of
the two.
Over several nodes the wire's rate is the network's, and a collective takes longer the more ranks it has. What copy
engines transfer takes nothing from the products, nor does what adds it up (ops/common/_parts.py).

Sizes: M tokens of a rank (the most of any), V vocabulary, H hidden, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_fused.engine.zero3.shards import Shards
from ds_fused.engine.zero3.windows import TURNS
from ds_fused.ops.common._tiles import first_half, tile_elements, tiling
from ds_fused.ops.vocab.one_pass import cut
from ds_fused.ops.vocab.stationary import block_bytes, block_tokens

MOST_TOKENS = 2**24
# elements: DeepSpeed's default of stage3_max_reuse_distance
REUSE = 10**9


@dataclass(frozen=True)
class Rates:
    """Of the slowest rank."""

    flops: float  # a second
    memory: float  # bytes a second, read or written
    wire: float  # bytes a second that a rank takes in
    call: float  # seconds that a collective takes beside its bytes


@dataclass(frozen=True)
class HeadCosts:
    """A sharded weight [V, H], as far as its costs depend on it."""

    shards: Shards
    slabs: tuple[int, ...]  # rows of each, of all ranks
    itemsize: int = 2
    trains: bool = True
    offloaded: bool = False
    copied: bool = False  # slabs are moved by copy engines, both ways
    tokens_copied: bool = False  # so are, in mode "stationary", tokens and their gradients
    reuse: int = REUSE  # elements of a whole weight that DeepSpeed keeps from the forward to the backward, at most

    @classmethod
    def cut(cls, shards: Shards, slab_bytes: int, itemsize: int = 2, **facts: bool) -> HeadCosts:
        """As ZeroSlabs cuts it."""
        spans = shards.spans(shards.cuts(shards.hidden * itemsize, slab_bytes))
        return cls(shards, tuple(span.stop - span.start for span in spans), itemsize, **facts)

    @property
    def slab_rows(self) -> int:
        return max(self.slabs)

    @property
    def n_slabs(self) -> int:
        return len(self.slabs)

    @property
    def elements(self) -> int:
        return self.shards.n_vocab * self.shards.hidden


@dataclass(frozen=True)
class Figures:
    """Of a forward and a backward."""

    mode: str
    parts: str
    held: int  # bytes beside x, dx, and the gradient that DeepSpeed keeps anyway
    wire: int  # bytes that a rank takes in
    calls: int  # collectives
    traffic: int  # bytes of memory that are read or written outside the products
    flops: float
    beside: bool = False  # transfers take no time from the rest
    chunks: int = 1  # of tokens, of a whole weight

    def seconds(self, rates: Rates) -> float:
        transfers = 0.0 if self.beside else self.wire / rates.wire + self.calls * rates.call
        return self.flops / rates.flops + self.traffic / rates.memory + transfers

    def line(self, rates: Rates) -> str:
        held, wire, ms = self.held / 2**20, self.wire / 2**20, 1e3 * self.seconds(rates)
        return f"{self.mode} ({self.parts}, {held:,.0f} MiB held, {wire:,.0f} MiB on the wire, {ms:.3g} ms)"


def of_stream(head: HeadCosts, most: int, chunk_bytes: int, keep_bytes: int) -> Figures:
    n_vocab, hidden, ranks = head.shards.n_vocab, head.shards.hidden, head.shards.ranks
    itemsize, trains = head.itemsize, head.trains
    # a frozen head is done with in the forward, see ops/vocab/frozen_head.py
    keep_bytes = keep_bytes if trains else 0
    cut = tiling(
        most, n_vocab, itemsize, chunk_bytes, keep_bytes, dx=True, dweight=trains, slab_rows=head.slab_rows,
        n_slabs=head.n_slabs, keeps_slabs=trains,
    )  # fmt: skip
    chunks = -(-most // cut.tokens)
    n_tiles = head.n_slabs * chunks
    made_again = 2 * trains * (1 - min(1.0, cut.kept * cut.tokens * cut.rows / max(1, most * n_vocab)))
    flops = (4 + 2 * trains + made_again) * most * head.elements
    slab_bytes = head.slab_rows * hidden * itemsize
    # those that are kept, and one to work in
    tiles = (cut.kept + (cut.kept < n_tiles)) * tile_elements(cut.tokens, cut.rows)
    held = min(tiles, most * n_vocab) * itemsize
    if head.copied:
        # windows; dx in fp32, not yet rounded, or rounded too
        windows = 2 * TURNS + 1 if trains else TURNS
        held += windows * slab_bytes + most * hidden * (4 + (-itemsize if trains else itemsize))
    elif trains:
        # slabs, a rank's part of one, and of several dx in fp32, not yet rounded
        held += rows_at_once(head.slabs, cut.kept_slabs) * hidden * itemsize + slab_bytes // ranks
        held += (head.n_slabs > 1) * most * hidden * (4 - itemsize)
    else:
        held += min(2, head.n_slabs) * slab_bytes + most * hidden * (4 + itemsize)
    # of the logits two reads and a write; dx in fp32 read for each slab, and of a frozen head read and written before
    traffic = 3 * itemsize * most * n_vocab + (4 if trains else 12) * most * hidden * (head.n_slabs - 1)
    if trains and chunks > 1:
        # the gradient of a slab is added up in fp32
        held += 4 * head.slab_rows * hidden
        traffic += 4 * head.elements * (chunks - 1)
    # backward begins with the slabs that forward ended with
    whole, kept_slabs = head.elements * itemsize, min(cut.kept_slabs, head.n_slabs)
    if head.copied:
        kept_slabs = min(kept_slabs, TURNS)
        # a rank's own part of the weight is put in its place
        traffic += 2 * (1 + trains) * whole // ranks
    kept_bytes = sum(head.slabs[head.n_slabs - kept_slabs :]) * hidden * itemsize
    wire = (3 * whole - kept_bytes if trains else whole) * (ranks - 1) // ranks
    calls = 3 * head.n_slabs - kept_slabs if trains else head.n_slabs
    parts = f"{head.n_slabs} slabs{' by copy engines' if head.copied else ''}"
    return Figures("stream", parts, held, wire, calls, traffic, flops, beside=head.copied)


def rows_at_once(slabs: tuple[int, ...], kept: int) -> int:
    """Of the slabs of weight and of gradient that the backward of mode "stream" holds at a time, the most.

    It begins with the last slab, beside all that the forward has kept. Later it holds the slab that it works on and the
    one that comes, the gradient that is made and the one that leaves.
    """
    sizes = (0, *slabs, 0)
    later = (2 * sizes[k] + sizes[k - 1] + sizes[k + 1] for k in range(1, len(sizes) - 1))
    return max(sum(slabs[max(0, len(slabs) - kept) :]) + slabs[-1], *later)


def of_stationary(head: HeadCosts, most: int, chunk_bytes: int, block: int | None = None) -> Figures:
    """``block``: tokens of a rank in one, where it is not as the op has them."""
    n_vocab, hidden, ranks = head.shards.n_vocab, head.shards.hidden, head.shards.ranks
    itemsize, trains = head.itemsize, head.trains
    carried = head.tokens_copied
    block = block or block_tokens(most, n_vocab, hidden, ranks, itemsize, chunk_bytes, carried)
    blocks = -(-most // block)
    flops = (4 + 2 * trains) * most * head.elements
    held = block * block_bytes(n_vocab, hidden, ranks, itemsize, carried)
    larger = first_half(block, hidden, ranks)
    if carried:
        # of dx there is room for the larger half, twice, and not for a half
        held += 4 * ranks * (2 * larger - block) * hidden
    else:
        # dx of this rank's tokens comes back in fp32; a single block has none before or after it
        held += block * 4 * hidden - (blocks == 1) * ranks * block * hidden * itemsize
    held += head.shards.size * (4 * trains + itemsize * head.offloaded)
    # of the logits two reads and a write; x of all ranks comes, dx of all goes; dw in fp32 read for each further
    # product, of which a carried last block has one for each half
    halves = 1 + (larger < block)
    sums = blocks - 1 + carried * (halves - 1)
    traffic = 3 * itemsize * most * n_vocab + ranks * most * hidden * (itemsize + 4)
    traffic += 4 * trains * head.shards.size * max(0, sums)
    # x there, dx back in fp32, three numbers and a label
    wire = (ranks - 1) * most * (hidden * (itemsize + 4) + 20)
    # of each block x, dx and the numbers of two halves, carried of each half x and dx, too; the labels, and whether the
    # guess was right
    calls = (3 * halves if carried else 4) * blocks + 2
    parts = f"{blocks} blocks{' by copy engines' if carried else ''}"
    return Figures("stationary", parts, held, wire, calls, traffic, flops, carried)


def of_gather(head: HeadCosts, most: int, chunk_bytes: int, keep_bytes: int, in_forward: bool) -> Figures:
    """By ZeRO's hooks, in the head's own call. ``in_forward``: gradients are made there (ops/vocab/one_pass.py)."""
    n_vocab, hidden, ranks = head.shards.n_vocab, head.shards.hidden, head.shards.ranks
    itemsize, trains = head.itemsize, head.trains
    whole = head.elements * itemsize
    flops = (4 + 2 * trains) * most * head.elements
    traffic = 3 * itemsize * most * n_vocab
    # the weight and its gradient
    held = whole + trains * whole
    if in_forward:
        tokens, native = cut(most, n_vocab, hidden, itemsize, chunk_bytes, "auto", trains=trains)
        chunks = -(-most // tokens)
        held += tile_elements(min(tokens, most), n_vocab) * itemsize
        if trains and chunks > 1:
            # the gradient is added up over chunks, where that is in fp32 beside what it is rounded to
            held += 0 if native else 4 * head.elements
            traffic += (itemsize if native else 4) * head.elements * (chunks - 1)
    else:
        keep_bytes = keep_bytes if trains else 0
        tiles = tiling(most, n_vocab, itemsize, chunk_bytes, keep_bytes, dx=True, dweight=trains)
        slabs, chunks = -(-n_vocab // tiles.rows), -(-most // tiles.tokens)
        flops += 2 * trains * (1 - min(1.0, tiles.kept / (slabs * chunks))) * most * head.elements
        held += (tiles.kept + (tiles.kept < slabs * chunks)) * tile_elements(tiles.tokens, tiles.rows) * itemsize
        if slabs > 1:
            # dx in fp32
            held += 4 * most * hidden
            traffic += (4 if trains else 12) * most * hidden * (slabs - 1)
        if trains and chunks > 1:
            # the gradient of a slab is added up in fp32
            held += 4 * tiles.rows * hidden
            traffic += 4 * head.elements * (chunks - 1)
    # one collective each; too large to be kept for the backward, it is gathered once more
    calls = (1 + (head.elements > head.reuse) + trains) * (ranks > 1)
    # DeepSpeed copies what it gathers and reduces
    traffic += calls * 2 * whole
    wire = calls * whole * (ranks - 1) // ranks
    return Figures("gather", f"{chunks} chunks", held, wire, calls, traffic, flops, chunks=chunks)


def sharded(head: HeadCosts, most: int, chunk_bytes: int, keep_bytes: int, block: int | None = None) -> list[Figures]:
    """Of the modes in which the weight is never whole: stream, stationary."""
    return [of_stream(head, most, chunk_bytes, keep_bytes), of_stationary(head, most, chunk_bytes, block)]


def candidates(head: HeadCosts, most: int, chunk_bytes: int, keep_bytes: int, in_forward: bool) -> list[Figures]:
    """Of the modes that "auto" chooses from: those two and gather."""
    return [*sharded(head, most, chunk_bytes, keep_bytes), of_gather(head, most, chunk_bytes, keep_bytes, in_forward)]


def chosen(ways: list[Figures], free: float, rates: Rates) -> Figures:
    """The fastest of those that fit into the free bytes, of equal ones the smallest; if none fits, the smallest."""
    fitting = [way for way in ways if way.held <= free]
    if not fitting:
        return min(ways, key=lambda way: way.held)
    fastest = min(way.seconds(rates) for way in fitting)
    # closer than a model of this kind can tell apart, or of no matter to a step: so that what the rates were measured
    # beside does not choose anew in each run of a small model
    near = max(1.05 * fastest, fastest + 1e-3)
    return min((way for way in fitting if way.seconds(rates) <= near), key=lambda way: way.held)


def turning_point(ways: Callable[[int], list[Figures]], rates: Rates) -> int:
    """The largest number of tokens a rank for which stationary is chosen where memory is no matter."""
    low, high = 0, MOST_TOKENS
    while low < high:
        middle = (low + high + 1) // 2
        if chosen(ways(middle), float("inf"), rates).mode == "stationary":
            low = middle
        else:
            high = middle - 1
    return low
