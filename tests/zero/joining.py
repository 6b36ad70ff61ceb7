"""How a rank of tests/zero begins and ends."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

import ds_fused

# what a rank waits for another on a machine that has much else to do
PATIENCE = timedelta(minutes=5)


@contextmanager
def joined() -> Iterator[None]:
    """One of the ranks of this launch, on one core, until all are done."""
    torch.set_num_threads(1)
    deepspeed.init_distributed(get_accelerator().communication_backend_name(), timeout=PATIENCE)
    ds_fused.install()
    # ZeRO-3 collects garbage for each engine: of all that was imported there is none, and looking through it was 40 %
    # of the time of test_gathers
    gc.freeze()
    yield
    dist.barrier()
    dist.destroy_process_group()
