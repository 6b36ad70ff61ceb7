"""The rates that ``figures.py`` computes with, measured where the job runs: of a product, a copy and two gathers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from deepspeed.accelerator import get_accelerator

from ds_fused.engine.zero3.figures import Rates

if TYPE_CHECKING:
    from ds_fused.engine.zero3.slabs import ZeroSlabs
    from ds_fused.engine.zero3.stationary import ZeroShard

# each is run so often, after one run that doesn't count
ROUNDS = 3
# tokens of the product that is timed; a CPU would take seconds for as many
TOKENS, TOKENS_OF_CPU = 2048, 64


def measured(slabs: ZeroSlabs, shard: ZeroShard) -> Rates:
    """Rates of this rank. Every rank must call it at the same place; the slowest counts for all, see `Choice`."""
    # the first may be the rows that ranks share, which are few
    some = min(1, len(slabs) - 1)
    slabs.prefetch(some)
    rows = slabs.gather(some)
    tokens = TOKENS_OF_CPU if slabs.device.type == "cpu" else TOKENS
    x = torch.zeros(tokens, slabs.shape[1], dtype=slabs.dtype, device=slabs.device)
    product = _seconds(lambda: x @ rows.t())
    copy = _seconds(lambda: torch.empty_like(rows).copy_(rows))
    taken = rows.numel() * rows.element_size() * (slabs.ranks - 1) / slabs.ranks
    gather = _seconds(lambda: (slabs.prefetch(some), slabs.gather(some)))
    call = _seconds(lambda: shard.gather(x[0, :1]).land())
    # where the slab is so small that its bytes are lost in the noise of a call, they took a tenth
    bytes_alone = max(gather - call, gather / 10)
    return Rates(
        flops=2 * x.numel() * rows.shape[0] / product,
        memory=2 * rows.numel() * rows.element_size() / copy,
        wire=taken / bytes_alone if taken else float("inf"),
        call=call if taken else 0.0,
    )


def _seconds(run: Callable[[], object]) -> float:
    accelerator = get_accelerator()
    run()
    accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        run()
    accelerator.synchronize()
    return (time.perf_counter() - began) / ROUNDS
