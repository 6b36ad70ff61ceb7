"""Where mode "stream" has the weight gathered after all, or DeepSpeed splits other weights its own way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import deepspeed
import products
import torch
import torch.distributed as dist
from special import STREAM, both, case, engine_by_json, engine_of, left, mine, model_of, streamed, train, with_lora
from torch.nn.utils import parametrizations, parametrize, prune
from transformers import MixtralConfig, MixtralForCausalLM


def reason_of(build: Callable[[], torch.nn.Module] = model_of, stage: int = 3, **more: object) -> dict:
    """A configuration in which mode "stream" gathers the weight whole: two steps of stock and fused, and why."""
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, **more.pop("zero", {})}
    return both(build, stage, block=STREAM, run=lambda e: train(e, mine()[:2]), zero_optimization=zero, **more)


def of_leaves() -> torch.nn.Module:
    model = model_of()
    deepspeed.utils.set_z3_leaf_modules(model, [torch.nn.Linear])
    return model


@case
def stream_is_no_use() -> dict:
    """Why the weight is gathered whole after all, in one configuration after the other."""
    return {
        "persistent": reason_of(zero={"stage3_param_persistence_threshold": 10**6}),
        "stage": reason_of(stage=2),
        "reduce": reason_of(zero={"reduce_scatter": False}),
        "predivided": reason_of(zero={"reduce_scatter": False}, gradient_predivide_factor=2.0),
        "leaf": reason_of(of_leaves),
        "deepcompile": reason_of(compile={"deepcompile": True}),
        "quantized gradients": reason_of(zero={"zero_quantized_gradients": True}),
        # last: DeepSpeed keeps the groups of the first engine that has a second partition
        "hpz": reason_of(zero={"zero_hpz_partition_size": 2}),
    }


@case
def stream_predivided() -> dict:
    """What ZeRO-3 itself says to it."""
    said = {}
    for name, block in (("stock", None), ("fused", STREAM)):
        try:
            engine_of(model_of(), 3, block, gradient_predivide_factor=2.0)
        except AssertionError as error:
            said[name] = str(error)
    return said


def stock_and_streamed(engine_with: Callable[[dict | None], deepspeed.DeepSpeedEngine]) -> dict:
    stock = engine_with(None)
    out = {"stock": train(stock, mine())}
    stock.destroy()
    fused = engine_with(STREAM)
    out |= {"left": left(fused), "report": str(fused.ds_fused_report), "fused": train(fused, mine())}
    fused.destroy()
    return out


def with_table(change: Callable[[torch.nn.Embedding], object], tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(3)
    model = model_of(tied=tied)
    change(model.get_input_embeddings())
    return model


@case
def stream_tables() -> dict:
    """Tables of which the weight is no parameter, or gives sparse gradients; the head's is its own, or the same."""

    def gives_sparse(table: torch.nn.Embedding) -> None:
        table.sparse = True

    changes = {
        "pruned": lambda: with_table(lambda table: prune.l1_unstructured(table, "weight", amount=0.5)),
        # to read its weight is to change what is read next
        "spectral": lambda: with_table(parametrizations.spectral_norm),
        "sparse": lambda: with_table(gives_sparse, tied=True),
    }
    block = STREAM | {"embedding": True}
    return {name: both(build, 3, block=block, run=lambda e: train(e, mine()[:3])) for name, build in changes.items()}


class Scaled(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 0.5 * weight


@case
def stream_computed_since() -> dict:
    """A weight that is pruned or parametrized when the engine is there: what multiplies is no parameter any more."""
    changes = {
        "pruned": lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
        "parametrized": lambda layer: parametrize.register_parametrization(layer, "weight", Scaled()),
    }

    def run(engine: deepspeed.DeepSpeedEngine, what: str, how: str) -> list[float]:
        model = engine.module
        layer = model.get_output_embeddings() if what == "head" else model.get_input_embeddings()
        with deepspeed.zero.GatheredParameters([layer.weight]):
            changes[how](layer)
        return train(engine, mine()[:3])

    return {
        f"{what} {how}, tied {tied}": both(
            partial(model_of, tied=tied), 3, block=STREAM | {"embedding": True}, run=partial(run, what=what, how=how)
        )
        for what, how, tied in (
            ("head", "pruned", True),
            ("head", "parametrized", False),
            ("table", "pruned", False),
            ("table", "parametrized", True),
        )
    }


@case
def stream_muon() -> dict:
    """An optimizer that takes only gradients which are whole."""
    return stock_and_streamed(lambda block: engine_by_json(model_of(), block, "Muon", reduce_scatter=False))


@case
def stream_lora_on_the_head() -> dict:
    return streamed(lambda: with_lora(["q_proj", "lm_head"]))


@case
def stream_tensor_parallel() -> dict:
    # two steps suffice: no slab is involved
    return both(model_of, 3, joined=True, block=STREAM, tensor_parallel={"autotp_size": 2})


@case
def stream_expert_parallel() -> dict:
    """AutoEP splits the experts; the head is as in any other model."""

    def build() -> torch.nn.Module:
        torch.manual_seed(5)
        experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralForCausalLM(MixtralConfig(**products.SIZES, **experts, initializer_range=0.3, use_cache=False))

    # DeepSpeed puts other parameters in place of those that an optimizer made here would hold
    def engine(block: dict | None) -> deepspeed.DeepSpeedEngine:
        split = {"enabled": True, "autoep_size": 2, "preset_model": "mixtral", "use_grouped_mm": False}
        return engine_by_json(build(), block, "AdamW", expert_parallel=split)

    return stock_and_streamed(engine)


@case
def stream_another_deepspeed() -> dict:
    """The start finds out that an optimizer does otherwise than slabs count on, on one rank or on all."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3 as Stage3

    stock = Stage3.partition_grads

    def forgets(self, params: list, parts: list) -> list:
        """As if micro steps were added up elsewhere."""
        at, self.micro_step_id = self.micro_step_id, 0
        buffers = stock(self, params, parts)
        self.micro_step_id = at
        return buffers

    out = {}
    for name, changed in (("one rank", forgets), ("arguments", lambda self, parts: None), ("name", None)):
        on_this = dist.get_rank() == 1 or name != "one rank"
        if name == "name":
            of_base = Stage3.__mro__[1]
            kept, of_base.get_param_comm_dtype = of_base.get_param_comm_dtype, property()
        elif on_this:
            Stage3.partition_grads = changed
        try:
            engine = engine_of(model_of(), 3, STREAM)
        finally:
            Stage3.partition_grads = stock
            if name == "name":
                of_base.get_param_comm_dtype = kept
        out[name] = {"left": left(engine), "losses": train(engine, mine()[:2])}
        engine.destroy()
    stock_engine = engine_of(model_of(), 3, None)
    out["stock"] = train(stock_engine, mine()[:2])
    stock_engine.destroy()
    return out
