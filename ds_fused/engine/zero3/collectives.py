"""``"collectives"``: whether ZeRO-3's weights and gradients travel by way of buffers, or from place to place.

How they come and go is in gathers.py and reductions.py; in here, for which engines. From place to place a step of
Llama-3-8B on four H100 takes the host 16 % less, and the device 5 % (benchmarks/notes.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed as dist

from ds_fused.engine.agreement import first_of, first_that_holds
from ds_fused.engine.zero3.collective_claim import CollectiveClaim
from ds_fused.engine.zero3.gathers import GatherClaim, sharded
from ds_fused.engine.zero3.leaf_modules import gathered_otherwise
from ds_fused.engine.zero3.reductions import ReductionClaim
from ds_fused.policies.report import Left

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

KEY = "collectives"


def claims_of(engine: DeepSpeedEngine, offload: DeepSpeedZeRoOffload) -> tuple[list[CollectiveClaim], list[Left]]:
    """What comes and goes in place of what this engine shards; and what does not, with the reason. All ranks ask."""
    if all(dist.get_world_size(p.ds_process_group) == 1 for p in sharded(offload)):
        return [], []
    reason = gathered_otherwise(engine) or _why_stock(engine, offload)
    if reason is not None:
        return [], [Left(KEY, 1, reason)]
    claims: list[CollectiveClaim] = [GatherClaim(offload, KEY)]
    left = []
    if _trains(engine):
        reason = _why_buckets(engine)
        if reason is None:
            claims.append(ReductionClaim(engine.optimizer, KEY))
        else:
            left.append(Left(KEY, 1, reason))
    proven = []
    for claim in claims:
        reason = first_of(claim.prove(engine.device, torch.float32), dist.group.WORLD)
        if reason is None:
            proven.append(claim)
        else:
            left.append(Left(KEY, 1, reason))
    return proven, left


def _trains(engine: DeepSpeedEngine) -> bool:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    # a subclass (SuperOffload's) may have ways of its own
    return type(engine.optimizer) is DeepSpeedZeroOptimizer_Stage3


def _why_stock(engine: DeepSpeedEngine, offload: DeepSpeedZeRoOffload) -> str | None:
    zero = engine._config.zero_config
    return first_that_holds(
        {
            "stage3_use_all_reduce_for_fetch_params has them added up": zero.use_all_reduce_for_fetch_params,
            "weights travel quantized (zero_quantized_weights)": engine.zero_quantized_weights(),
            "weights are partitioned a second time (zero_hpz_partition_size)": engine.zero_hpz_partition_size() > 1,
            "stage3_module_granularity_threshold has a way of its own": offload.fast_sharding_for_leaf_module,
            "they may be moved by AMD's DMA engines": torch.version.hip is not None,
        }
    )


def _why_buckets(engine: DeepSpeedEngine) -> str | None:
    return first_that_holds(
        {
            "gradients travel quantized (zero_quantized_gradients)": engine.zero_quantized_gradients(),
            "reduce_scatter is off": not engine.zero_reduce_scatter(),
            "Muon wants whole gradients": engine.optimizer.use_muon,
        }
    )
