"""Models and uses beside the plain case, whatever the way of the head's weight."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator

import deepspeed
import products
import torch
import torch.distributed as dist
from special import both, case, engine_of, mine, model_of, read_by_one, reading, train, with_lora
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ds_fused.modules.layers import lora as lora_module
from ds_fused.modules.layers import norm
from ds_fused.modules.layers import qk_norm as norms_of_q_and_k
from ds_fused.policies.kinds import norms


@case
def lora() -> dict:
    return both(lambda: with_lora(["q_proj", "v_proj", "gate_proj", "down_proj"]), stage=2)


@case
def lora_zero3() -> dict:
    """``nodes``: how many times a layer ran as one node with its adapter."""
    nodes = 0

    class Counted(lora_module.LoRALinearFunction):
        @staticmethod
        def forward(*args: object) -> torch.Tensor:
            nonlocal nodes
            nodes += 1
            return function.forward(*args)

    function, lora_module.LoRALinearFunction = lora_module.LoRALinearFunction, Counted
    try:
        out = {}
        for name, block in (("alone", {"lora": True}), ("layers", {"lora": True, "leaf_modules": True})):
            nodes = 0
            out[name] = both(lambda: with_lora(["q_proj", "v_proj", "gate_proj", "down_proj"]), stage=3, block=block)
            out[name]["nodes"] = nodes
    finally:
        lora_module.LoRALinearFunction = function
    return out


@case
def lora_on_the_head() -> dict:
    return both(lambda: with_lora(["q_proj", "lm_head"]), stage=3)


@case
def experts() -> dict:
    """A mixture with each implementation of its products, and in one op; the router's auxiliary loss is a part."""

    def build(implementation: str) -> torch.nn.Module:
        torch.manual_seed(4)
        router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
        model = MixtralForCausalLM(MixtralConfig(**products.SIZES, **router, use_cache=False))
        model.set_experts_implementation(implementation)
        return model

    apart = {"experts": False}
    names = ("eager", "grouped_mm", "batched_mm")
    found = {name: both(lambda name=name: build(name), stage=3, block=apart) for name in names}
    return found | {"whole": both(lambda: build("grouped_mm"), stage=3)}


@case
def instance_forward() -> dict:
    def build() -> torch.nn.Module:
        model = model_of()
        mlp = model.model.layers[0].mlp
        mlp.forward = types.MethodType(lambda self, x: 0.5 * type(self).forward(self, x), mlp)
        return model

    return both(build, stage=1)


@case
def instance_forward_of_the_model() -> dict:
    def build() -> torch.nn.Module:
        model = model_of()
        stock = model.forward

        def forward(self, *args, **kwargs):
            output = stock(*args, **kwargs)
            output.loss = 2 * output.loss
            return output

        model.forward = types.MethodType(forward, model)
        return model

    return both(build, stage=3)


@case
def grad_in_forward() -> dict:
    """The head's weight is gathered for the forward, which makes its gradient too; several micro steps."""
    block = {"fused_linear_cross_entropy": {"mode": "gather", "grad_in_forward": True}}
    return both(
        lambda: model_of(tied=True),
        3,
        block=block,
        run=lambda engine: train(engine, mine(accumulation=2)),
        gradient_accumulation_steps=2,
    )


@case
def residual() -> dict:
    """Norms that take the residual stream as a second input, with sharded weights; and computed again in backward."""
    with counted(norm, "add_rms_norm") as shapes:
        out = both(model_of, stage=3, run=with_and_without_checkpointing, block={"add_rms_norm": True})
    # those of the proof have another shape
    tokens = mine()[0][0].shape
    return out | {"sums": sum(shape[:2] == tokens for shape in shapes)}


@case
def qk_norm() -> dict:
    """Norms of q and k, with sharded weights, in one op with the rotation; and computed again in backward."""

    def build() -> torch.nn.Module:
        torch.manual_seed(5)
        model = Qwen3ForCausalLM(Qwen3Config(**products.SIZES, head_dim=8, use_cache=False))
        for name, weight in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.normal_(weight, mean=1.0, std=0.2)
        return model

    with counted(norms_of_q_and_k, "rms_norm_rope") as shapes:
        out = both(build, stage=3, run=with_and_without_checkpointing, block={"qk_norm_rope": True})
    rows, tokens = mine()[0][0].shape
    heads = products.SIZES["num_attention_heads"]
    return out | {"calls": sum(shape == (rows, heads, tokens, 8) for shape in shapes)}


@contextlib.contextmanager
def counted(module: types.ModuleType, name: str) -> Iterator[list[torch.Size]]:
    """The shapes of the first argument in the calls of a function, by that name in a module."""
    shapes, stock = [], getattr(module, name)

    def counting(*args: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        shapes.append(args[0].shape)
        return stock(*args, **options)

    setattr(module, name, counting)
    try:
        yield shapes
    finally:
        setattr(module, name, stock)


def with_and_without_checkpointing(engine: deepspeed.DeepSpeedEngine) -> list[float]:
    losses = train(engine, mine())
    engine.module.gradient_checkpointing_enable()
    return losses + train(engine, mine())


@case
def tensor_parallel() -> dict:
    return both(model_of, stage=1, joined=True, tensor_parallel={"autotp_size": 2})


@case
def logits_read_by_all() -> dict:
    return reading(lambda rank: True, {})


@case
def logits_kept() -> dict:
    return reading(lambda rank: rank == 1, {"logits": "keep"})


@case
def logits_read_by_one() -> dict:
    # a weight that DeepSpeed gathers: from the second step on it is there when the logits are read
    return read_by_one({"fused_linear_cross_entropy": {"mode": "gather"}})


def refused(block: dict) -> dict:
    """What deepspeed.initialize says to this rank's block, and what it leaves behind."""
    model = model_of()
    before = {name: type(module) for name, module in model.named_modules()}
    try:
        engine_of(model, 1, block)
        error = None
    except Exception as e:
        error = [type(e).__name__, str(e)]
    same = before == {name: type(module) for name, module in model.named_modules()}
    return {"refused": error, "stock_again": same}


@case
def ranks_decide_differently() -> dict:
    return refused({"rope": dist.get_rank() == 0})


@case
def one_rank_proves_a_difference() -> dict:
    compare = norms.compare

    def differs(stock: Callable, fused: Callable, tensors: dict, *rest: object, **more: object) -> str | None:
        # an RMSNorm, by its tensors
        if dist.get_rank() == 1 and tensors.keys() == {"x", "weight"}:
            return compare(stock, lambda given: fused(given) + 1, tensors, *rest, **more)
        return compare(stock, fused, tensors, *rest, **more)

    norms.compare = differs
    try:
        return refused({})
    finally:
        norms.compare = compare


@case
def one_rank_misspells() -> dict:
    return refused({"rope": True} if dist.get_rank() == 0 else {"ropes": True})
