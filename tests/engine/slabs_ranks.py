"""One rank of test_zero_slabs.py: a head alone under ZeRO-3, its loss over slabs and as plain PyTorch.

    slabs_ranks.py OUT [all]

OUT.RANK.json holds a row for each weight: for those that differ in kind on three ranks, or for all.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_engines import GlooEngines
from torch import nn

import ds_fused
from ds_fused.engine.zero3 import slabs as zero_slabs
from ds_fused.engine.zero3 import stationary
from ds_fused.engine.zero3.delivery import Delivery
from ds_fused.engine.zero3.slabs import ZeroSlabs
from ds_fused.engine.zero3.stationary import ZeroShard
from ds_fused.ops.common import _tiles

# V, H, slab bytes: rows whole on every rank or split between two, the last shard padded or not, one slab or many
QUICK = [(67, 8, 10**6), (50, 12, 400), (13, 8, 0), (101, 9, 1000)]
WEIGHTS = [*QUICK, (64, 8, 0), (67, 8, 0), (257, 5, 300)]
STEPS = 3


class Model(nn.Module):
    def __init__(self, n_vocab: int, hidden: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, n_vocab, bias=False)
        self.slabs: ZeroSlabs | ZeroShard | None = None
        self.loss_of = loss

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        if self.slabs is None:
            return F.cross_entropy(self.head(x), labels, reduction="sum")
        return self.loss_of(x, self.slabs, labels)


def loss(x: torch.Tensor, slabs: ZeroSlabs | ZeroShard, labels: torch.Tensor) -> torch.Tensor:
    return ds_fused.linear_cross_entropy(x, slabs, labels, reduction="sum", chunk_mb=2**-20, keep_mb=0)


def policy_loss(x: torch.Tensor, slabs: ZeroShard, labels: torch.Tensor) -> torch.Tensor:
    log_probs, entropies = ds_fused.linear_log_probs(x, slabs, labels, entropy=True, chunk_mb=2**-20)
    return -(log_probs + 0.1 * entropies).sum()


def weighted_loss(x: torch.Tensor, slabs: ZeroShard, labels: torch.Tensor) -> torch.Tensor:
    weight = torch.linspace(0.5, 1.5, slabs.shape[0])
    options = {"label_smoothing": 0.1, "reduction": "sum", "chunk_mb": 2**-20}
    return ds_fused.linear_cross_entropy(x, slabs, labels, class_weight=weight, **options)


def engine_of(model: Model) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-2), config=config)[0]


def batch(step: int, n_vocab: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Another number of tokens on each rank, none on the last in the last step; in the second nobody has a label."""
    rank = dist.get_rank()
    empty = step == STEPS - 1 and rank == dist.get_world_size() - 1 > 0
    n = 0 if empty else 3 + 2 * rank + step
    draw = torch.Generator().manual_seed(100 * step + rank)
    labels = torch.randint(n_vocab, (n,), generator=draw)
    return torch.randn(n, hidden, generator=draw), torch.full_like(labels, -100) if step == 1 else labels


class Engines(GlooEngines):
    """Whose gathers are counted with the others."""

    def gather(self, everyones: torch.Tensor) -> object:
        zero_slabs.dist.seen.append(("all_gather_into_tensor", everyones.numel() // dist.get_world_size()))
        return super().gather(everyones)


def two_losses(x: torch.Tensor, slabs: ZeroSlabs | ZeroShard, labels: torch.Tensor) -> torch.Tensor:
    """The backward of the second comes first, and leaves other slabs than the first one's forward."""
    return 0.5 * (loss(x, slabs, labels) + loss(x, slabs, labels))


class Broken(Exception):
    """A pass that does not come to its end."""


def break_off(slabs: ZeroSlabs, x: torch.Tensor, labels: torch.Tensor) -> int:
    """A forward, then a backward that end early on every rank, with slabs on their way: how many did."""
    zero_slabs.dist = Collectives()
    broken = 0
    for name, last in (("gather", len(slabs) - 1), ("gradient", 0)):
        method = getattr(slabs, name)

        def until(k: int, method: Callable = method, last: int = last) -> torch.Tensor:
            if k == last:
                raise Broken
            return method(k)

        setattr(slabs, name, until)
        try:
            loss(x.clone().requires_grad_(), slabs, labels).backward()
        except Broken:
            broken += 1
        delattr(slabs, name)
    zero_slabs.dist = deepspeed.comm
    return broken


class Collectives:
    """Stands for deepspeed.comm in the module under test and notes what is started there."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def __getattr__(self, name: str) -> object:
        function = getattr(deepspeed.comm, name)
        if name not in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            return function

        def counted(result: torch.Tensor, given: torch.Tensor, **options: object) -> object:
            self.seen.append((name, given.numel()))
            return function(result, given, **options)

        return counted


def train(model: Model, engine: deepspeed.DeepSpeedEngine, n_vocab: int, hidden: int) -> dict:
    losses, collectives = [], []
    for step in range(STEPS):
        zero_slabs.dist = stationary.dist = Collectives()
        loss = engine(*batch(step, n_vocab, hidden))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        collectives.append(zero_slabs.dist.seen)
        zero_slabs.dist = stationary.dist = deepspeed.comm
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = [w.detach().flatten().tolist() for w in model.parameters()]
    return {"losses": losses, "weights": weights, "collectives": collectives}


def rows_of(slabs: ZeroSlabs) -> tuple[list[int], torch.Tensor]:
    """All ids in the order of the slabs, and their rows."""
    ids, rows = [], []
    for k in range(len(slabs)):
        slabs.prefetch(k)
        part, there = slabs.gather(k), slabs.ids[slabs.span(k)]
        assert len(part) == len(there) and torch.equal(slabs.places[there].diff(), torch.ones(len(there) - 1))
        ids += there.tolist()
        rows.append(part.clone())
    return ids, torch.cat(rows)


def main(out: str, which: str = "quick") -> None:
    torch.set_num_threads(1)
    _tiles.LEAST_SIDE, _tiles.SIDE_STEP = 4, 2  # blocks of few tokens
    deepspeed.init_distributed("gloo", timeout=timedelta(minutes=5))
    # ZeRO-3 collects garbage for each engine, and of all that was imported there is none
    gc.freeze()
    results = []
    for n_vocab, hidden, slab_bytes in WEIGHTS if which == "all" else QUICK:
        stock, fused, still, copied, carried = models = [Model(n_vocab, hidden) for _ in range(5)]
        weight = stock.head.weight.detach().clone()
        engines = [engine_of(model) for model in models]
        copied.slabs, copied.loss_of = (
            ZeroSlabs(Delivery(copied.head.weight, engines[3]), slab_bytes, Engines()),
            two_losses,
        )
        fused.slabs = ZeroSlabs(Delivery(fused.head.weight, engines[1]), slab_bytes)
        still.slabs = shard = ZeroShard(Delivery(still.head.weight, engines[2]))
        carried.slabs = ZeroShard(Delivery(carried.head.weight, engines[4]), Engines())
        ids, rows = rows_of(fused.slabs)
        own = slice(shard.first_id, shard.first_id + shard.n_rows)
        broken = [break_off(made, *batch(0, n_vocab, hidden)) for made in (fused.slabs, copied.slabs)]
        result = {
            "broken off": broken,
            "weight": [n_vocab, hidden, slab_bytes],
            "slabs": len(fused.slabs),
            "largest": fused.slabs.slab_rows * hidden * weight.element_size(),
            "ids": sorted(ids) == list(range(n_vocab)),
            "rows": torch.equal(rows, weight[ids]),
            "own_rows": torch.equal(torch.cat(shard.rows()), weight[own]),
            "stock": train(stock, engines[0], n_vocab, hidden),
            "fused": train(fused, engines[1], n_vocab, hidden),
            "stationary": train(still, engines[2], n_vocab, hidden),
            "copied": train(copied, engines[3], n_vocab, hidden),
            "carried": train(carried, engines[4], n_vocab, hidden),
            "windows": [copied.slabs.window_bytes, fused.slabs.window_bytes, still.slabs.window_bytes],
            "blocks carried": carried.slabs.window_bytes // (12 * dist.get_world_size() * hidden),
        }
        for name, still.loss_of in (("entropies", policy_loss), ("class weights", weighted_loss)):
            result[name] = train(still, engines[2], n_vocab, hidden)
        results.append(result)
        for engine in engines:
            engine.destroy()
    with open(f"{out}.{dist.get_rank()}.json", "w") as file:
        json.dump(results, file)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
