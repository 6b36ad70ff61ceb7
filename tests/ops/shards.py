"""Ranks that are threads, each with some rows of a weight."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ds_fused.ops.vocab_shard import VocabShard


class Landed:
    def __init__(self, result: Tensor) -> None:
        self.result = result

    def land(self) -> Tensor:
        return self.result


class Round:
    """Ranks that are threads: each shows what it has, then sees what all have."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.shown: list = [None] * ranks

    def __call__(self, rank: int, mine: object) -> list:
        self.shown[rank] = mine
        self.barrier.wait()
        everyones = list(self.shown)
        self.barrier.wait()
        return everyones


class Shard(VocabShard):
    """Rows [first, end) of a weight; the last of them is a piece for itself. Its gradient goes into weight.grad."""

    def __init__(self, weight: Tensor, first: int, end: int, rank: int = 0, all_ranks: Round | None = None) -> None:
        self.weight, self.rank, self.round = weight, rank, all_ranks or Round(1)
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.requires_grad = weight.requires_grad
        self.ranks = len(self.round.shown)
        self.first_id, self.n_rows = first, end - first
        self.collectives: list[tuple[str, tuple[int, ...]]] = []

    def rows(self) -> tuple[Tensor, ...]:
        mine = self.weight.detach()[self.first_id : self.first_id + self.n_rows]
        return mine[:-1], mine[-1:]

    def most(self, n: int) -> int:
        return max(self.round(self.rank, n))

    def gather(self, mine: Tensor) -> Landed:
        self.collectives.append(("gather", tuple(mine.shape)))
        return Landed(torch.stack(self.round(self.rank, mine)))

    def reduce_scatter(self, parts: Tensor) -> Landed:
        self.collectives.append(("reduce_scatter", tuple(parts.shape)))
        return Landed(torch.stack([part[self.rank] for part in self.round(self.rank, parts)]).sum(0))

    def gradient(self, dtype: torch.dtype = torch.float32) -> Gradient:
        self.room = Gradient(self, dtype)
        return self.room


class Gradient:
    def __init__(self, shard: Shard, dtype: torch.dtype) -> None:
        self.shard = shard
        self.rows = torch.full((shard.n_rows, shard.shape[1]), float("nan"), dtype=dtype, device=shard.device)

    def give(self, factor: float) -> None:
        shard = self.shard
        if shard.weight.grad is None:
            shard.weight.grad = torch.zeros_like(shard.weight)
        shard.weight.grad[shard.first_id : shard.first_id + shard.n_rows] = (factor * self.rows).to(shard.dtype)


def on_ranks(all_ranks: Round, run: Callable[[int], None]) -> None:
    """run(rank) in a thread for each rank; what one raises ends all."""
    problems: list[Exception] = []

    def rank_of(rank: int) -> None:
        try:
            run(rank)
        except Exception as error:
            problems.append(error)
            all_ranks.barrier.abort()

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(len(all_ranks.shown))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
