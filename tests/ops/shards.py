"""Ranks that are threads, each with some rows of a weight; collectives, or a carrier, move their tokens."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ds_fused.ops.vocab.vocab_shard import VocabShard


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

    def __init__(
        self, weight: Tensor, first: int, end: int, rank: int = 0, all_ranks: Round | None = None, carried: bool = False
    ) -> None:
        self.weight, self.rank, self.round = weight, rank, all_ranks or Round(1)
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.requires_grad = weight.requires_grad
        self.ranks = len(self.round.shown)
        self.first_id, self.n_rows = first, end - first
        self.collectives: list[tuple[str, tuple[int, ...]]] = []
        self.carrier = Carrier(self) if carried else None

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


class Carrier:
    """Its memory is one piece for each use, as if all were always on its way: what is used too early or too late is
    NaN, or another's.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._memory: dict[str, Tensor] = {}
        self._leaving = 0

    def _room(self, what: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        # views of what was there before see the loss of it
        if what in self._memory:
            self._memory[what].fill_(float("nan"))
        self._memory[what] = torch.full(shape, float("nan"), dtype=dtype, device=self._shard.device)
        return self._memory[what]

    def room(self, n: int, like: Tensor) -> Tensor:
        return self._room("tokens", (n, like.shape[1]), like.dtype)

    def bring(self, mine: Tensor, everyones: Tensor) -> Later:
        came = self._shard.gather(mine).result
        return Later(lambda: everyones.copy_(came))

    def parts(self, n: int, like: Tensor) -> Tensor:
        assert not self._leaving, "what was sent before is still on its way"
        return self._room("parts", (n, like.shape[1]), torch.promote_types(like.dtype, torch.float32))

    def send_home(self, parts: Tensor, out: Tensor) -> Later:
        self._leaving += 1
        # a copy: other ranks may look at it when this memory has become another's
        came = self._shard.reduce_scatter(parts.clone()).result

        def arrive() -> Tensor:
            self._leaving -= 1
            return out.copy_(came[: len(out)])

        return Later(arrive)


class Later:
    """What is not there before somebody waits for it."""

    def __init__(self, arrive: Callable[[], Tensor]) -> None:
        self._arrive = arrive

    def land(self) -> Tensor:
        return self._arrive()


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
