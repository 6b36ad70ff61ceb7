"""A weight under ZeRO-3 whose rows stay on their ranks: what a head's loss or a lookup needs to send the tokens round.

A rank's rows are those that begin in its shard: neighbours, read where they lie. The last one may end on the next rank,
which sends its piece before a forward and gets the gradient of it after a backward: one small all-gather each.

The gradient needs no reduction: a rank sees all tokens, and it is written where its shard has the rows.

With copy engines (copy_engines.py) tokens and parts of their gradients lie in windows, which stay: the tokens of a
block, the parts that leave and those that come, which are added up there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from ds_fused.engine.hosts import Hosts
from ds_fused.engine.zero3.delivery import Delivery
from ds_fused.engine.zero3.shards import Shards
from ds_fused.engine.zero3.windows import Flight, TokenWindows
from ds_fused.ops.vocab.vocab_shard import VocabShard

if TYPE_CHECKING:
    from ds_fused.engine.zero3.copy_engines import CopyEngines


class ZeroShard(VocabShard):
    """One sharded weight."""

    def __init__(self, delivery: Delivery, engines: CopyEngines | None = None) -> None:
        self.param = param = delivery.param
        self.group = param.ds_process_group
        self.shape = (param.ds_shape[0], param.ds_shape[1])
        self.dtype = param.ds_tensor.dtype
        self.device = torch.device(get_accelerator().current_device_name())
        self.ranks, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.delivery = delivery
        self.shards = shards = Shards(*self.shape, self.ranks)
        self.first_id, after = shards.first_rows[self.rank : self.rank + 2]
        self.n_rows = after - self.first_id
        self.hosts = Hosts(self.group)
        self.carrier = None if engines is None else TokenWindows(engines, self.ranks, self.rank)

    @property
    def requires_grad(self) -> bool:
        return self.delivery.requires_grad

    def __str__(self) -> str:
        how = "" if self.carrier is None else " by copy engines"
        return f"its rows stay on {self.ranks} ranks, to which the tokens travel{how}"

    @property
    def window_bytes(self) -> int:
        """Of memory that stays and that PyTorch's allocator does not count."""
        return 0 if self.carrier is None else self.carrier.n_bytes

    def close(self) -> None:
        """Let go of that memory; no pass follows."""
        if self.carrier is not None:
            self.carrier.close()

    def rows(self) -> tuple[Tensor, ...]:
        # offloaded shards lie on the CPU
        shard = self.param.ds_tensor.data.to(self.device, non_blocking=True)
        columns, shards = self.shape[1], self.shards
        begin = shards.start(self.rank)
        if not shards.splits_rows:
            return (shard[begin : begin + self.n_rows * columns].view(-1, columns),)
        n_whole = self.n_rows - (shards.beyond(self.rank) > 0)
        whole_end = begin + n_whole * columns
        heads = self.exchange(shard[:begin])
        whole = shard[begin:whole_end].view(-1, columns)
        if n_whole == self.n_rows:
            return (whole,)
        last = torch.cat([shard[whole_end:], heads[self.rank + 1, : shards.beyond(self.rank)]])
        return whole, last.view(1, columns)

    def exchange(self, piece: Tensor) -> Tensor:
        """Each rank's piece of a row, at most H elements -> [W, H]."""
        room = piece.new_zeros(self.shape[1])
        room[: piece.numel()] = piece
        return self.gather(room).land()

    @property
    def is_offloaded(self) -> bool:
        return self.param.ds_tensor.device.type != self.device.type

    def most(self, n: int) -> int:
        return self.hosts.most(n)

    def gather(self, mine: Tensor) -> Flight:
        everyones = mine.new_empty(self.ranks, *mine.shape)
        # flat: on a CPU it takes no other shapes
        work = dist.all_gather_into_tensor(everyones.view(-1), mine.view(-1), group=self.group, async_op=True)
        return Flight(work, everyones)

    def reduce_scatter(self, parts: Tensor) -> Flight:
        mine = parts.new_empty(parts.shape[1:])
        work = dist.reduce_scatter_tensor(mine.view(-1), parts.view(-1), group=self.group, async_op=True)
        return Flight(work, mine)

    def gradient(self, dtype: torch.dtype = torch.float32) -> OwnGradient:
        return OwnGradient(self, dtype)


class OwnGradient:
    """Room for this rank's part of the gradient, and behind it for what lies on the next rank."""

    def __init__(self, shard: ZeroShard, dtype: torch.dtype) -> None:
        self._shard = shard
        shards, rank = shard.shards, shard.rank
        begin = shards.start(rank)
        end = begin + shard.n_rows * shards.hidden
        self._all = torch.empty(max(end, shards.size), dtype=dtype, device=shard.device)
        # padding at the end of the last shard takes part in norms
        self._all[end:] = 0
        self.rows = self._all[begin:end].view(-1, shards.hidden)

    def give(self, factor: float) -> None:
        shard, shards = self._shard, self._shard.shards
        # the mean over ranks, as of any gradient
        factor /= shard.ranks
        partition = self._all[: shards.size]
        if shards.splits_rows:
            begin = shards.start(shard.rank)
            beyond = shard.exchange(self._all[shards.size : shards.size + shards.beyond(shard.rank)])
            if begin:
                partition[:begin] = beyond[shard.rank - 1, :begin]
        kept = shard.delivery.open()
        if kept is None:
            shard.delivery.give(partition.mul_(factor))
        else:
            kept.put(slice(None), partition, factor)
            shard.delivery.close()
