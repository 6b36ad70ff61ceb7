"""How the weight of a head comes to the loss under ZeRO-3: gathered whole by DeepSpeed's hooks, or in slabs.

Decided when ``deepspeed.initialize`` is done, when all is known that it depends on: the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from ds_fused.engine.head_slabs import NEEDED, HeadSlabs, merge_gradients
from ds_fused.engine.shards import Shards

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine


class HeadMode:
    """For the heads of one engine: their weights in slabs, where that was asked for and can be."""

    def __init__(self, options: Mapping[str, object]) -> None:
        self._options = options
        self._slabs: dict[nn.Module, HeadSlabs] = {}

    def slabs(self, head: nn.Module) -> HeadSlabs | None:
        return self._slabs.get(head)

    def decide(self, engine: DeepSpeedEngine, head: nn.Module) -> str | None:
        """Take ``head`` in slabs; or why its weight is gathered although slabs were asked for. None otherwise."""
        if self._options["mode"] != "stream":
            return None
        reason = why_gather(engine, head)
        if reason is None:
            self._slabs[head] = slabs = HeadSlabs(head.weight, engine, self._options["slab_mb"] * 2**20)
            merge_gradients(slabs, engine)
        return reason


def why_gather(engine: DeepSpeedEngine, head: nn.Module) -> str | None:
    """Why the head's weight can't come in slabs; None when it can."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if not engine.zero_optimization_partition_weights():
        return f"ZeRO stage {engine.zero_optimization_stage()} shards no weights"
    optimizer, param = engine.optimizer, head.weight
    if type(optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        return f"the optimizer is {type(optimizer).__name__}"
    missing = [name for name in NEEDED if not hasattr(optimizer, name)]
    if missing:
        return f"this version of DeepSpeed has no {missing[0]} in its ZeRO-3 optimizer"
    reasons = {
        "its parameters are partitioned a second time (zero_hpz_partition_size)": engine.zero_hpz_partition_size() > 1,
        "weights travel quantized (zero_quantized_weights)": engine.zero_quantized_weights(),
        "frozen weights are quantized": engine.zero_quantized_nontrainable_weights(),
        "gradients travel quantized (zero_quantized_gradients)": engine.zero_quantized_gradients(),
        "reduce_scatter is off": not engine.zero_reduce_scatter(),
        "parameters are offloaded to NVMe": _offloaded_to_nvme(engine),
        "DeepCompile arranges the gathering": engine.is_deepcompile_enabled(),
        "ZenFlow updates a part of the gradient": bool(optimizer.zenflow),
        "Muon wants whole gradients": optimizer.use_muon,
        "tensor parallelism splits the layers": engine.autotp_size() > 1,
        "it has a bias, which DeepSpeed gathers in the layer's call": head.bias is not None,
        "it is small enough to stay whole on every rank (stage3_param_persistence_threshold)": param.ds_persist,
        "it is part of a ZeRO-3 leaf module, which is gathered as one": hasattr(param, "ds_z3_leaf_module"),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is not None:
        return found
    from deepspeed import comm as dist

    shards = Shards(*param.ds_shape, dist.get_world_size(param.ds_process_group))
    if param.ds_tensor.ds_numel != shards.size:
        return f"its shard has {param.ds_tensor.ds_numel} elements where {shards.size} were expected"
    return shards.why_not()


def _offloaded_to_nvme(engine: DeepSpeedEngine) -> bool:
    offload = engine.zero_offload_param()
    return offload is not None and str(offload.device).endswith("nvme")
