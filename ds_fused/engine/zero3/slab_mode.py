"""How a weight with a row for each word is used under ZeRO-3: whole, by DeepSpeed's hooks, in slabs, or where it lies.

Decided when ``deepspeed.initialize`` is done, when all is known that it depends on: the same on every rank. Heads were
claimed before (``policies.loss``) and ask ``SlabMode.slabs`` at each loss; embeddings are claimed here.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ds_fused.engine.agreement import first_of, first_that_holds
from ds_fused.engine.config import HEAD, OP_OPTIONS, Config
from ds_fused.engine.unproven_claim import UnprovenClaim
from ds_fused.engine.zero3 import copy_engines, self_test
from ds_fused.engine.zero3.choice import AUTO, GATHER, Choice
from ds_fused.engine.zero3.copy_engines import CopyEngines
from ds_fused.engine.zero3.delivery import Bystander, Delivery, gradient_hooks
from ds_fused.engine.zero3.lookup import Lookup
from ds_fused.engine.zero3.shards import Shards
from ds_fused.engine.zero3.slabs import ZeroSlabs
from ds_fused.engine.zero3.stationary import ZeroShard
from ds_fused.engine.zero3.vector import ZeroVector
from ds_fused.modules.layers.embedding import slab_embedding_of
from ds_fused.modules.layers.linear import own_weight
from ds_fused.modules.swap import is_fused, swap, unswap_all, why_not_swapped
from ds_fused.ops.common._say import say_once
from ds_fused.policies.loss import LinearClaim
from ds_fused.policies.report import Left

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_fused.policies.report import Report


log = logging.getLogger("ds_fused")


@dataclass(eq=False)
class EmbeddingClaim(UnprovenClaim):
    """An embedding whose table is never whole: rows are picked, not computed."""

    lookup: Lookup | None  # None: of a copied model
    key: str = "embedding"

    @property
    def replacement(self) -> str:
        return f"embedding; {self.lookup or 'its own table'}"

    def commit(self) -> None:
        for module in self.modules:
            swap(module, slab_embedding_of(type(module)), _ds_fused_lookup=self.lookup)

    def restore(self) -> None:
        unswap_all(self.modules)

    def in_place(self) -> bool:
        return all(is_fused(module) and "forward" not in vars(module) for module in self.modules)


class SlabMode:
    """For one engine: which of its weights are never whole, where that was asked for and can be."""

    def __init__(self, config: Config) -> None:
        self._mode = config.head["mode"]
        self._slab_bytes = config.head["slab_mb"] * 2**20
        self._embeddings = config.embedding
        self._wants_engines = config.head["copy_engines"]
        self._engines: CopyEngines | None = None
        self._heads: dict[nn.Module, Choice] = {}
        self._biases: dict[nn.Module, ZeroVector] = {}
        self._deliveries: dict[nn.Parameter, Delivery] = {}

    def slabs(self, head: nn.Module, n_tokens: int, inside: bool) -> ZeroSlabs | ZeroShard | None:
        """The weight of a head whose loss is to be computed without the whole of it; None where that is here.

        ``inside``: a forward of the model is running.
        """
        choice = self._choice(head)
        form = None if choice is None or choice.is_whole else choice.of(n_tokens, inside)
        if form is not None:
            self._deliveries[choice.param].refuse_hooks()
        return form

    def _choice(self, head: nn.Module) -> Choice | None:
        choice = self._heads.get(head)
        if choice is None or own_weight(head) is choice.param:
            return choice
        if choice.is_sharded:
            say_once(
                "ds_fused: the lm head's weight is computed from others since deepspeed.initialize (pruned or "
                "parametrized), for which it is gathered whole"
            )
        return None

    @property
    def window_bytes(self) -> int:
        """Of memory for copy engines: it stays, and PyTorch's allocator does not count it."""
        return sum(choice.window_bytes for choice in self._heads.values())

    def close(self, together: bool) -> None:
        """Hand back what copy engines hold; nothing happens the second time. No loss follows.

        ``together``: every rank is here, which it is not where an engine is collected as garbage.
        """
        engines, self._engines = self._engines, None
        if engines is None:
            return
        engines.end() if together else engines.leave()
        for choice in self._heads.values():
            choice.close()

    def is_sharded(self, head: nn.Module) -> bool:
        choice = self._choice(head)
        return choice is not None and choice.is_sharded

    def shard(self, head: nn.Module) -> Tensor | None:
        """This rank's part of a head's weight, if that is trained."""
        choice = self._choice(head)
        return choice.param.ds_tensor if choice is not None and choice.param.requires_grad else None

    def bias(self, head: nn.Module) -> Tensor | None:
        """That of a head in slabs, whole."""
        # a small one is whole on every rank
        return self._biases[head]() if head in self._biases else head.bias

    @property
    def parameters(self) -> Collection[nn.Parameter]:
        """Those that come in slabs or stay where they are; known once `decide` has run."""
        return self._deliveries.keys()

    def decide(self, engine: DeepSpeedEngine, report: Report) -> None:
        """Heads and embeddings of the engine's model; what came of it goes into the report."""
        if self._mode in (AUTO, GATHER) and not engine.zero_optimization_partition_weights():
            return
        heads = [claim for claim in report.claims if isinstance(claim, LinearClaim)]
        if self._mode == GATHER:
            for claim in heads:
                self._count(engine, claim)
            return
        sparse = {id(own_weight(module)): path for path, module in engine.module.named_modules() if _is_sparse(module)}
        for claim in heads:
            head = claim.site.head
            path = sparse.get(id(own_weight(head)))
            # what it gives would be added to nothing dense, as the whole head's gradient is
            why = None if path is None else f"sparse gradients come to it from {path}"
            reason = self._why_gather(engine, head, why)
            if reason is None:
                delivery = self._delivery(engine, head.weight)
                engines, reason = self._engines_for(head.weight)
                if reason is not None:
                    what = f"copy engines for head {claim.paths[0]}"
                    report.left = (*report.left, Left(what, 1, f"collectives move its slabs, since {reason}"))
                self._choose(engine, claim, delivery, engines)
                if head.bias is not None and not head.bias.ds_persist:
                    self._biases[head] = ZeroVector(self._delivered(engine, head.bias))
            else:
                report.left = (*report.left, self._gathered(f"head {claim.paths[0]}", reason))
        for path, module in self._tables(engine.module, [claim.site.head for claim in heads]):
            reason = self._why_gather(engine, module, why_not_looked_up(module))
            if reason is None:
                claim = EmbeddingClaim((path,), [module], self._lookup(self._delivery(engine, module.weight)))
                claim.commit()
                report.claims = (*report.claims, claim)
            else:
                report.left = (*report.left, self._gathered(f"embedding {path}", reason))

    def _why_gather(self, engine: DeepSpeedEngine, module: nn.Module, reason: str | None = None) -> str | None:
        """Why a layer's weight can't come in slabs, or ``reason``: one on any of the ranks that share the weight."""
        param, reason = own_weight(module), reason or why_gather(engine, module)
        # where parameters are not sharded every rank decides by itself, and may hold other layers
        if hasattr(param, "ds_process_group"):
            reason = first_of(reason, param.ds_process_group)
            if reason is None and param not in self._deliveries:
                reason = first_of(self_test.what_differs(engine, param), param.ds_process_group)
        return reason

    def _engines_for(self, param: nn.Parameter) -> tuple[CopyEngines | None, str | None]:
        """What is to move a weight's slabs, if asked for; or why it can't, on any rank."""
        if not self._wants_engines:
            return None, None
        group = param.ds_process_group
        # another weight may lie on other ranks
        reason = first_of(copy_engines.why_no_engines(group), group)
        if reason is not None:
            return None, reason
        if self._engines is None:
            self._engines = CopyEngines()
        return self._engines, None

    def _choose(
        self, engine: DeepSpeedEngine, claim: LinearClaim, source: Delivery | Bystander, engines: CopyEngines | None
    ) -> None:
        replacement = claim.replacement

        def tell(line: str) -> None:
            # what "auto" would choose is no news once it has
            said = replacement if self._mode == AUTO else claim.replacement
            claim.replacement = f"{said}; {line}"
            if engine.global_rank == 0:
                log.warning("ds_fused: head %s: %s", claim.paths[0], line)

        options = {name: option.default for name, option in OP_OPTIONS[HEAD].items()} | dict(claim.options)
        slabs, shard = ZeroSlabs(source, self._slab_bytes, engines), ZeroShard(source, engines)
        choice = Choice(self._mode, slabs, shard, options, engine.zero_max_reuse_distance(), tell)
        self._heads[claim.site.head] = choice
        claim.replacement = f"{replacement}; {choice}"

    def _count(self, engine: DeepSpeedEngine, claim: LinearClaim) -> None:
        """What it costs to gather a head's weight, where it might have been otherwise."""
        param, reason = claim.site.head.weight, why_gather(engine, claim.site.head)
        if hasattr(param, "ds_process_group") and first_of(reason, param.ds_process_group) is None:
            self._choose(engine, claim, Bystander(param), None)

    def _lookup(self, delivery: Delivery) -> Lookup:
        # in mode "stream" collectives depend on the weight alone, here as in the head
        shard = None if self._mode == "stream" else ZeroShard(delivery)
        return Lookup(ZeroSlabs(delivery, self._slab_bytes), shard, self._slab_bytes, delivery.refuse_hooks)

    def _delivery(self, engine: DeepSpeedEngine, param: nn.Parameter) -> Delivery:
        # a head and an embedding that share a weight share it
        if param not in self._deliveries:
            self._deliveries[param] = self._delivered(engine, param)
        return self._deliveries[param]

    def _delivered(self, engine: DeepSpeedEngine, param: nn.Parameter) -> Delivery:
        delivery = Delivery(param, engine)
        # before anything else can fail; with the engine's report it is undone
        report = engine.__dict__["ds_fused_report"]
        report.undoing = (*report.undoing, delivery.restore)
        return delivery

    def _gathered(self, what: str, reason: str) -> Left:
        return Left(what, 1, f'mode "{self._mode}": its weight is gathered whole, since {reason}')

    def _tables(self, model: nn.Module, heads: list[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
        """The embeddings that are tied to a head in slabs, and with ``"embedding": true`` those of the input too."""
        tied = {id(own_weight(head)) for head in heads if head in self._heads}
        inputs = {id(module) for module in _inputs(model)} if self._embeddings else set()
        for path, module in model.named_modules():
            if id(module) in inputs or (isinstance(module, nn.Embedding) and id(own_weight(module)) in tied):
                yield path, module


def _inputs(model: nn.Module) -> Iterator[nn.Module]:
    """The input embeddings that models of a model name, also those which somebody has wrapped (PEFT)."""
    for module in model.modules():
        found = None
        if hasattr(type(module), "get_input_embeddings"):
            # as an image tower may say
            with suppress(NotImplementedError):
                found = module.get_input_embeddings()
        if found is not None and any(isinstance(inner, nn.Embedding) for inner in found.modules()):
            yield found


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.sparse


def why_not_looked_up(module: nn.Embedding) -> str | None:
    """Why an embedding can't be replaced by one over slabs; None when it can."""
    if slab_embedding_of(type(module)) is None:
        return f"it is a {type(module).__name__}, which may do more than look up"
    if own_weight(module) is None:
        return "its weight is computed from other parameters, as pruning does"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "it is one with max_norm, scale_grad_by_freq or sparse gradients"
    return why_not_swapped(module)


def why_gather(engine: DeepSpeedEngine, module: nn.Module) -> str | None:
    """Why a layer's weight can't come in slabs; None when it can."""
    from deepspeed import comm as dist
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if not engine.zero_optimization_partition_weights():
        return f"ZeRO stage {engine.zero_optimization_stage()} shards no weights"
    optimizer, param = engine.optimizer, module.weight
    if type(optimizer) is not DeepSpeedZeroOptimizer_Stage3:
        # SuperOffload's, MiCS's in the versions that have it, or none that trains
        return f"the optimizer is {type(optimizer).__name__}"
    reasons = {
        "its parameters are partitioned a second time (zero_hpz_partition_size)": engine.zero_hpz_partition_size() > 1,
        "weights travel quantized (zero_quantized_weights)": engine.zero_quantized_weights(),
        "frozen weights are quantized (zero_quantized_nontrainable_weights)": (
            engine.zero_quantized_nontrainable_weights()
        ),
        "gradients travel quantized (zero_quantized_gradients)": engine.zero_quantized_gradients(),
        "Muon wants whole gradients": optimizer.use_muon,
        "reduce_scatter is off": not engine.zero_reduce_scatter(),
        "parameters are offloaded to NVMe": _offloaded_to_nvme(engine),
        "DeepCompile arranges the gathering": engine.is_deepcompile_enabled(),
        "ZenFlow updates a part of the gradient": bool(optimizer.zenflow),
        "tensor parallelism splits the layers (autotp_size)": engine.autotp_size() > 1,
        "AutoEP places it among the experts": getattr(param, "ds_zero_placement_family", _PLAIN) != _PLAIN,
        "it is small enough to stay whole on every rank (stage3_param_persistence_threshold)": param.ds_persist,
        "it is part of a ZeRO-3 leaf module, which is gathered as one": hasattr(param, "ds_z3_leaf_module"),
        "somebody's hooks hang on its gradient": bool(gradient_hooks(param)),
    }
    found = first_that_holds(reasons)
    if found is not None:
        return found
    shards = Shards(*param.ds_shape, dist.get_world_size(param.ds_process_group))
    if param.ds_tensor.ds_numel != shards.size:
        return f"its shard has {param.ds_tensor.ds_numel} elements where {shards.size} were expected"
    return shards.why_uncut()


# how AutoEP marks what is no expert's; without it nothing is marked
_PLAIN = "replicated"


def _offloaded_to_nvme(engine: DeepSpeedEngine) -> bool:
    offload = engine.zero_offload_param()
    return offload is not None and str(offload.device).endswith("nvme")
