"""A weight under ZeRO-3, gathered slab by slab from the shards; its gradient goes back slab by slab.

What fused loss and embedding need of a weight (``ds_fused.ops.vocab.slabs.WeightSlabs``), without the whole weight or
its whole gradient ever being there. The result is stock's: gradients are averaged over the ranks as DeepSpeed averages
them, in its dtype, and handed to its optimizer as the partition that its own reduce-scatter would have made;
accumulation, clipping, overflow check, loss scale and offload are the optimizer's from there.

Collectives: an all-gather a slab, in forward and (for a head, but for the slabs that forward has left) in backward, and
a reduce-scatter a slab in backward. Their number, order and sizes follow from (V, H, W, slab size) alone, never from
tokens or labels: no rank can wait for another that had nothing to do. The gather of a slab is under way while the slab
before is computed, and so is its reduce-scatter while the next one is.

Memory: two slabs of weight, between a forward and its backward three; in backward two of gradient, too. What comes of
it is written where the optimizer keeps this rank's part of the gradient; offloaded to the CPU, that part is held here
until it is complete.

With copy engines (copy_engines.py) slabs lie in windows, which stay: two of weight, in which a forward leaves its last
two slabs for its backward; two of gradient, and one into which ranks send one another their parts of it, to be added up
there. That is a reduce-scatter whose sum is rounded once.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor

from ds_fused.engine.zero3.delivery import Delivery, Place
from ds_fused.engine.zero3.shards import Shards
from ds_fused.engine.zero3.windows import Flight, SlabWindows

if TYPE_CHECKING:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    from ds_fused.engine.zero3.copy_engines import CopyEngines


class ZeroSlabs:
    """One sharded weight. Every rank of its group calls the same methods in the same order."""

    def __init__(self, delivery: Delivery, slab_bytes: int, engines: CopyEngines | None = None) -> None:
        self.param = param = delivery.param
        self.group = param.ds_process_group
        self.shape = (param.ds_shape[0], param.ds_shape[1])
        self.dtype = param.ds_tensor.dtype
        self.device = torch.device(get_accelerator().current_device_name())
        self._delivery, self._slab_bytes = delivery, slab_bytes
        self._rank = dist.get_rank(self.group)
        self.ranks = dist.get_world_size(self.group)
        self._shards = Shards(*self.shape, self.ranks)
        self._cuts = self._shards.cuts(self.shape[1] * param.ds_tensor.element_size(), slab_bytes)
        self._spans = self._shards.spans(self._cuts)
        # the seam comes first: at the last one a backward begins, where a large one is to be here already
        self._seams = int(self._shards.seam_rows > 0)
        self.slab_rows = max(span.stop - span.start for span in self._spans)
        self.share = 1 / self.ranks
        self._windows = None if engines is None else SlabWindows(engines, self.slab_rows * self.shape[1], self.dtype)
        self._coming: Flight | None = None
        self._leaving: tuple[int, Flight] | None = None
        # in a backward
        self._kept: Place | None = None
        self._partition: Tensor | None = None

    # made once: to bring numbers to a GPU makes the host wait for it

    @cached_property
    def ids(self) -> Tensor:
        return self._shards.ids(self._cuts).to(self.device)

    @cached_property
    def places(self) -> Tensor:
        return torch.empty_like(self.ids).scatter_(0, self.ids, torch.arange(len(self.ids), device=self.device))

    @property
    def requires_grad(self) -> bool:
        return self._delivery.requires_grad

    @property
    def whole(self) -> Tensor | None:
        """The weight, where somebody has gathered it and no gradient is wanted: a rank may go its own way then.

        As generation does over ``GatheredParameters``. To gather is a collective, so all ranks find the same.
        """
        is_here = self.param.ds_status == ZeroParamStatus.AVAILABLE
        return self.param.data if is_here and not torch.is_grad_enabled() else None

    def __len__(self) -> int:
        return len(self._spans)

    def __str__(self) -> str:
        slab = self.slab_rows * self.shape[1] * self.param.ds_tensor.element_size()
        how = "" if self._windows is None else ", by copy engines"
        if how and self.requires_grad and not self.is_copied:
            how += f", but for its gradient, which travels in {self._comm_dtype}"
        return f"its weight in {len(self)} slabs of at most {slab / 2**20:.1f} MiB over {self._shards.ranks} ranks{how}"

    @property
    def is_copied(self) -> bool:
        """Whether copy engines move the slabs both ways."""
        return self._windows is not None and not (self.requires_grad and self._comm_dtype != self.dtype)

    def by_collectives(self) -> ZeroSlabs:
        """The same slabs, moved without copy engines."""
        return ZeroSlabs(self._delivery, self._slab_bytes)

    @property
    def window_bytes(self) -> int:
        """Of memory that stays and that PyTorch's allocator does not count."""
        return 0 if self._windows is None else self._windows.n_bytes

    def close(self) -> None:
        """Let go of that memory; no pass follows."""
        self._coming = self._leaving = None
        if self._windows is not None:
            self._windows.close()

    # the weight comes

    def prefetch(self, k: int) -> None:
        """What a pass that was broken off has left on its way is let go."""
        if self._coming is not None:
            self._coming.land()
        self._coming = self._start_gather(k)

    def gather(self, k: int) -> Tensor:
        coming, self._coming = self._coming, None
        gathered = coming.land()
        rows = self._seam_of(gathered) if self._is_seam(k) else gathered.view(-1, self.shape[1])
        if self._windows is not None:
            self._windows.gave(k, rows)
        return rows

    def holds(self, rows: Tensor) -> bool:
        return self._windows is None or self._windows.holds(rows)

    def _is_seam(self, k: int) -> bool:
        return k < self._seams

    def span(self, k: int) -> slice:
        return self._spans[k]

    def _place(self, k: int) -> slice:
        """Slab k in this rank's shard."""
        cut, columns = self._cuts[k - self._seams], self.shape[1]
        begin = self._shards.start(self._rank)
        return slice(begin + cut.start * columns, begin + cut.stop * columns)

    def _start_gather(self, k: int) -> Flight:
        shard = self.param.ds_tensor.data
        if self._is_seam(k):
            mine = self._seam_room()
            for room, place in self._seam_places(self._rank):
                mine[room] = shard[place]
        elif self._windows is not None:
            mine = shard[self._place(k)]
            everyones = self._windows.room(k, self.ranks * mine.numel())
            # offloaded shards lie on the CPU. Not beside what is computed: as a kernel it would wait for its end
            everyones.view(self.ranks, -1)[self._rank].copy_(mine, non_blocking=True)
            return Flight(self._windows.engines.gather(everyones), everyones)
        else:
            mine = shard[self._place(k)].to(self.device, non_blocking=True)
        everyones = torch.empty(self._shards.ranks * mine.numel(), dtype=self.dtype, device=self.device)
        work = dist.all_gather_into_tensor(everyones, mine, group=self.group, async_op=True)
        return Flight(work, everyones)

    # the gradient goes

    def gradient(self, k: int) -> Tensor:
        span = self.span(k)
        if self._exchanges(k):
            return self._windows.parts(k, (span.stop - span.start) * self.shape[1]).view(-1, self.shape[1])
        return torch.empty(span.stop - span.start, self.shape[1], dtype=self.dtype, device=self.device)

    def _exchanges(self, k: int) -> bool:
        """Whether the gradient of slab k goes through windows; they have the weight's dtype."""
        return self._windows is not None and not self._is_seam(k) and self._comm_dtype == self.dtype

    def scatter(self, k: int, dw: Tensor) -> None:
        """Start the reduce-scatter of slab k, and take in what the one before has brought."""
        if k == len(self) - 1:
            self._open()
        self._take_in()
        if self._exchanges(k):
            self._exchange(k, dw.view(-1))
            return
        parts = self._seam_parts(dw) if self._is_seam(k) else dw.view(-1)
        parts = parts.to(self._comm_dtype)
        mine = torch.empty(parts.numel() // self._shards.ranks, dtype=parts.dtype, device=self.device)
        work = dist.reduce_scatter_tensor(mine, parts, group=self.group, async_op=True)
        self._leaving = (k, Flight(work, mine))

    def _open(self) -> None:
        """A backward begins. What one that was broken off has left on its way is let go."""
        if self._leaving is not None:
            self._leaving[1].land()
        if self._windows is not None:
            self._windows.join()
        self._leaving = self._partition = None
        self._kept = self._delivery.open()
        if self._kept is None:
            # zeros: padding at the end of the last shard takes part in norms
            dtype = self._optimizer.gradient_accumulation_dtype
            self._partition = torch.zeros(self._shards.size, dtype=dtype, device=self.device)
            self._kept = Place(self._partition, adds=False)

    def _exchange(self, k: int, dw: Tensor) -> None:
        """All ranks' parts of the slab that are this rank's come, and go where their sum belongs."""
        windows, engines = self._windows, self._windows.engines
        received = windows.received(dw.numel())
        with engines.beside():
            work = engines.exchange(received, dw)
            windows.sent(k, work)
            work.wait()
            self._kept.put_sum(self._place(k), received.view(self.ranks, -1))

    def _take_in(self) -> None:
        """Put this rank's part of the slab that left last where it belongs in the partition."""
        if self._leaving is None:
            return
        (k, flight), self._leaving = self._leaving, None
        mine = flight.land()
        if self._is_seam(k):
            for room, place in self._seam_places(self._rank):
                self._kept.put(place, mine[room])
        else:
            self._kept.put(self._place(k), mine)

    def finish(self) -> None:
        self._take_in()
        if self._windows is not None:
            self._windows.join()
        partition, self._kept, self._partition = self._partition, None, None
        if partition is None:
            self._delivery.close()
        else:
            self._delivery.give(partition)

    @property
    def _comm_dtype(self) -> torch.dtype:
        return self._optimizer.get_param_comm_dtype(self.param)

    @property
    def _optimizer(self) -> DeepSpeedZeroOptimizer_Stage3:
        return self._delivery.engine.optimizer

    # the seam: each rank gives the head and the tail of its shard, in a room of H and one of 2H elements

    def _seam_room(self, ranks: int = 1) -> Tensor:
        return torch.zeros(ranks * 3 * self.shape[1], dtype=self.dtype, device=self.device)

    def _seam_places(self, rank: int) -> list[tuple[slice, slice]]:
        """(in the rank's room, in its shard) of head and tail."""
        head, tail = self._shards.head(rank), self._shards.tail(rank)
        behind = self.shape[1]
        return [(head, head), (slice(behind, behind + tail.stop - tail.start), tail)]

    def _seam_pieces(self, everyones: Tensor) -> list[Tensor]:
        """Views of all heads and tails, in the order of the vocabulary."""
        rooms = everyones.view(self._shards.ranks, -1)
        return [rooms[rank, room] for rank in range(self._shards.ranks) for room, _ in self._seam_places(rank)]

    def _seam_of(self, everyones: Tensor) -> Tensor:
        return torch.cat(self._seam_pieces(everyones)).view(-1, self.shape[1])

    def _seam_parts(self, dw: Tensor) -> Tensor:
        rooms, flat, begin = self._seam_room(self._shards.ranks), dw.view(-1), 0
        for piece in self._seam_pieces(rooms):
            piece.copy_(flat[begin : begin + piece.numel()])
            begin += piece.numel()
        return rooms
