"""One rank of several; the second one dies in its second step, between two slabs or blocks of the head.

dying_rank.py MODE
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import deepspeed
import special
import torch.distributed as dist

import ds_fused
from ds_fused.engine.zero3.slabs import ZeroSlabs
from ds_fused.engine.zero3.stationary import ZeroShard
from ds_fused.ops.vocab import stationary


def main(mode: str) -> None:
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    ds_fused.install()
    block = {"fused_linear_cross_entropy": {"mode": mode, "slab_mb": 0}}
    # of a rank; otherwise all would be one block
    stationary.block_tokens = lambda *sizes: 1
    engine = special.engine_of(special.model_of(), 3, block)
    special.train(engine, special.mine()[:1])
    part = {"stream": ZeroSlabs, "stationary": ZeroShard}[mode]
    gather, gathered = part.gather, []

    def dying(self: ZeroSlabs | ZeroShard, *args: object) -> object:
        gathered.append(args)
        if len(gathered) == 6 and dist.get_rank() == 1:
            os._exit(17)
        return gather(self, *args)

    part.gather = dying
    special.train(engine, special.mine()[1:])


if __name__ == "__main__":
    main(sys.argv[1])
