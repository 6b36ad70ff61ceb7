"""One rank of two; the second one dies in its second step, between two slabs of the head."""

from __future__ import annotations

import os
from datetime import timedelta

import deepspeed
import special
import torch.distributed as dist

import ds_fused
from ds_fused.engine.zero_slabs import ZeroSlabs


def main() -> None:
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=15))
    ds_fused.install()
    engine = special.engine_of(special.model_of(), 3, special.STREAM)
    special.train(engine, special.mine()[:1])
    gather = ZeroSlabs.gather

    def dying(self: ZeroSlabs, k: int):
        if k == 5 and dist.get_rank() == 1:
            os._exit(17)
        return gather(self, k)

    ZeroSlabs.gather = dying
    special.train(engine, special.mine()[1:])


if __name__ == "__main__":
    main()
