"""How a weight with a row for each word comes to its layer under ZeRO-3: whole, by DeepSpeed's hooks, or in slabs.

Decided when ``deepspeed.initialize`` is done, when all is known that it depends on: the same on every rank. Heads were
claimed before (``policies.loss``) and ask ``SlabMode.slabs`` at each loss; embeddings are claimed here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ds_fused.engine.auto import Auto
from ds_fused.engine.config import HEAD, OP_OPTIONS, Config
from ds_fused.engine.delivery import NEEDED, Delivery
from ds_fused.engine.shards import Shards
from ds_fused.engine.stationary import ZeroShard, hosts_of
from ds_fused.engine.zero_slabs import ZeroSlabs
from ds_fused.modules.embedding import slab_embedding_of
from ds_fused.modules.swap import is_fused, original_class, swap, unswap, why_not
from ds_fused.policies.loss import LinearClaim
from ds_fused.policies.report import Left

if TYPE_CHECKING:
    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_fused.policies.report import Report


log = logging.getLogger("ds_fused")


@dataclass(eq=False)
class EmbeddingClaim:
    """An embedding whose table comes in slabs."""

    module: nn.Embedding
    paths: tuple[str, ...]
    slabs: ZeroSlabs
    key: str = "embedding"

    @property
    def original(self) -> str:
        cls = original_class(self.module)
        return f"{cls.__module__}.{cls.__qualname__}"

    @property
    def replacement(self) -> str:
        return f"embedding; {self.slabs}"

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None  # rows are picked, not computed

    def commit(self) -> None:
        swap(self.module, slab_embedding_of(type(self.module)), _ds_fused_slabs=self.slabs)

    def restore(self) -> None:
        unswap(self.module)

    def in_place(self) -> bool:
        return is_fused(self.module) and "forward" not in vars(self.module)

    def watched(self) -> tuple[type, ...]:
        return ()


class SlabMode:
    """For one engine: which of its weights come in slabs, where that was asked for and can be."""

    def __init__(self, config: Config) -> None:
        self._mode = config.head["mode"]
        self._slab_bytes = config.head["slab_mb"] * 2**20
        self._embeddings = config.embedding
        self._heads: dict[nn.Module, ZeroSlabs | ZeroShard | Auto] = {}
        self._deliveries: dict[nn.Parameter, Delivery] = {}

    def slabs(self, head: nn.Module, n_tokens: int) -> ZeroSlabs | ZeroShard | None:
        """The weight of a head whose loss is to be computed without the whole of it."""
        weight = self._heads.get(head)
        return weight.of(n_tokens) if isinstance(weight, Auto) else weight

    def decide(self, engine: DeepSpeedEngine, report: Report) -> None:
        """Heads and embeddings of the engine's model; what came of it goes into the report."""
        if self._mode == "gather":
            return
        heads = [claim for claim in report.claims if isinstance(claim, LinearClaim)]
        for claim in heads:
            head = claim.site.head
            reason = why_gather(engine, head)
            if reason is None:
                delivery = self._delivery(engine, head.weight)
                self._heads[head] = weight = self._weight(engine, claim, delivery)
                claim.replacement = f"{claim.replacement}; {weight}"
            else:
                report.left = (*report.left, self._gathered(f"head {claim.paths[0]}", reason))
        for path, module in self._tables(engine.module, [claim.site.head for claim in heads]):
            reason = why_not_looked_up(module) or why_gather(engine, module)
            if reason is None:
                slabs = ZeroSlabs(self._delivery(engine, module.weight), self._slab_bytes)
                claim = EmbeddingClaim(module, (path,), slabs)
                claim.commit()
                report.claims = (*report.claims, claim)
            else:
                report.left = (*report.left, self._gathered(f"embedding {path}", reason))

    def _weight(self, engine: DeepSpeedEngine, claim: LinearClaim, delivery: Delivery) -> ZeroSlabs | ZeroShard | Auto:
        if self._mode == "stream":
            return ZeroSlabs(delivery, self._slab_bytes)
        shard = ZeroShard(delivery, hosts_of(delivery.param.ds_process_group))
        if self._mode == "stationary":
            return shard
        replacement = claim.replacement

        def tell(line: str) -> None:
            claim.replacement = f"{replacement}; {line}"
            if engine.global_rank == 0:
                log.warning("ds_fused: head %s: %s", claim.paths[0], line)

        options = {name: option.default for name, option in OP_OPTIONS[HEAD].items()} | dict(claim.options)
        return Auto(ZeroSlabs(delivery, self._slab_bytes), shard, options["chunk_mb"], options["keep_mb"], tell)

    def _delivery(self, engine: DeepSpeedEngine, param: nn.Parameter) -> Delivery:
        # a head and an embedding that share a weight share it
        if param not in self._deliveries:
            self._deliveries[param] = Delivery(param, engine)
        return self._deliveries[param]

    def _gathered(self, what: str, reason: str) -> Left:
        return Left(what, 1, f'mode "{self._mode}": its weight is gathered whole, since {reason}')

    def _tables(self, model: nn.Module, heads: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """The embeddings that are tied to a head in slabs, and with ``"embedding": true`` those of the input too."""
        tied = {id(head.weight) for head in heads if head in self._heads}
        inputs = {
            id(module.get_input_embeddings())
            for module in model.modules()
            if self._embeddings and hasattr(type(module), "get_input_embeddings")
        }
        for path, module in model.named_modules():
            if isinstance(module, nn.Embedding) and (id(module) in inputs or id(module.weight) in tied):
                yield path, module


def why_not_looked_up(module: nn.Embedding) -> str | None:
    """Why an embedding can't be replaced by one over slabs; None when it can."""
    if slab_embedding_of(type(module)) is None:
        return f"it is a {type(module).__name__}, which may do more than look up"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "it is one with max_norm, scale_grad_by_freq or sparse gradients"
    return why_not(module)


def why_gather(engine: DeepSpeedEngine, module: nn.Module) -> str | None:
    """Why a layer's weight can't come in slabs; None when it can."""
    from deepspeed import comm as dist
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if not engine.zero_optimization_partition_weights():
        return f"ZeRO stage {engine.zero_optimization_stage()} shards no weights"
    optimizer, param = engine.optimizer, module.weight
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
        "its bias is sharded (stage3_param_persistence_threshold is below its size)": _has_sharded_bias(module),
        "it is small enough to stay whole on every rank (stage3_param_persistence_threshold)": param.ds_persist,
        "it is part of a ZeRO-3 leaf module, which is gathered as one": hasattr(param, "ds_z3_leaf_module"),
    }
    found = next((reason for reason, holds in reasons.items() if holds), None)
    if found is not None:
        return found
    shards = Shards(*param.ds_shape, dist.get_world_size(param.ds_process_group))
    if param.ds_tensor.ds_numel != shards.size:
        return f"its shard has {param.ds_tensor.ds_numel} elements where {shards.size} were expected"
    return shards.why_not()


def _has_sharded_bias(module: nn.Module) -> bool:
    # the loss is computed past the hooks that would gather it; a small one stays whole on every rank
    bias = getattr(module, "bias", None)
    return bias is not None and not bias.ds_persist


def _offloaded_to_nvme(engine: DeepSpeedEngine) -> bool:
    offload = engine.zero_offload_param()
    return offload is not None and str(offload.device).endswith("nvme")
