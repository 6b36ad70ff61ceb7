"""benchmarks/zero3_head.py with ways that are wrong or fail; it takes the same arguments, and its ranks are this file.

half    a loss and gradients that are wrong by a factor of two
pair    raises on all ranks
lone    raises on the last rank alone, in its third call, while the others are in a collective
"""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

# benchmarks/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import head_job, zero3_head
from benchmarks.head_ways import WAYS, Loss, Sharded


def stock(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model.lm_head(x).float(), labels)


def half() -> Loss:
    return lambda model, x, labels: 0.5 * stock(model, x, labels)


def pair() -> Loss:
    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        raise MemoryError("on all ranks")

    return loss


def lone() -> Loss:
    calls = []

    def loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] != "0":
            raise MemoryError("on one rank")
        return stock(model, x, labels)

    return loss


WAYS.update({"half": Sharded(loss=half), "pair": Sharded(loss=pair), "lone": Sharded(loss=lone)})
zero3_head.JOB = Path(__file__)
head_job.PATIENCE = timedelta(seconds=20)
# no time of a CPU means anything
head_job.WARM_UP, head_job.ITERATIONS = 1, 2

if __name__ == "__main__":
    if "RANK" in os.environ:
        head_job.main([tuple(case) for case in json.loads(sys.argv[1])])
    else:
        sys.exit(zero3_head.main())
