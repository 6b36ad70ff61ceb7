"""One rank of test_gathers.py: what ds_fused sets of ZeRO-3's gathering against stock ZeRO-3, all ops off.

    gathers_ranks.py OUT LEFT_OUT...

OUT/CASE.RANK.json, of every case but those left out: by way ("stock", "leaf", ...), what `trained` returns.
"""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import getattr_static
from pathlib import Path

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from cases import Cases
from deepspeed.comm.comm import comms_logger
from deepspeed.runtime.zero import partition_parameters, stage3
from deepspeed.runtime.zero.stage3 import unwrap_model_for_generation
from deepspeed.utils import z3_leaf_module
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from ds_fused.engine.config import OP_OPTIONS
from ds_fused.engine.zero3 import gathers, leaf_modules, reductions

GAS = 2
OFF = dict.fromkeys(OP_OPTIONS, False) | {"enabled": True}
LEAF = OFF | {"leaf_modules": True}
SIZES = {"small": OFF | {"zero_sizes": "small"}, "large": OFF | {"zero_sizes": "large"}}
CHECKPOINTING = {"reentrant": True, "plain": False}

CASES = case = Cases()


def llama(tied: bool = False, checkpointing: str | None = None) -> LlamaForCausalLM:
    model = LlamaForCausalLM(jobs.config_of(tied))
    weights = jobs.first_weights(tied)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    if checkpointing is not None:
        kwargs = {"use_reentrant": CHECKPOINTING[checkpointing]}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    return model


def split_llama(**more: object) -> LlamaForCausalLM:
    """Over the ranks, as it is built."""
    config = {"train_micro_batch_size_per_gpu": products.ROWS, "zero_optimization": {"stage": 3}, **more}
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = LlamaForCausalLM(jobs.config_of(False))
    weights = jobs.first_weights(False)
    for name, weight in model.named_parameters():
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data.copy_(weights[name])
    return model


def lora(checkpointing: str | None = None, inputs: bool = True) -> nn.Module:
    """The embedding is frozen: without checkpointing, nothing that reaches the first layer needs a gradient."""
    model = llama(checkpointing=checkpointing)
    if checkpointing is not None and inputs:
        model.enable_input_require_grads()
    torch.manual_seed(2)
    targets = ["q_proj", "v_proj", "gate_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def engine_of(model: nn.Module, block: dict | None, zero: Mapping = {}, **more: object) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": products.CLIP,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
        "zero_allow_untested_optimizer": True,
        **more,
    }
    if block is not None:
        config["ds_fused"] = block
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def step_of(engine: deepspeed.DeepSpeedEngine, step: list) -> list[float]:
    found = []
    for micro_batch in step:
        ids, labels = micro_batch[dist.get_rank()]
        loss = engine(input_ids=ids, labels=labels).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    return [*found, float(engine.get_global_grad_norm())]


def digest(model: nn.Module) -> str:
    """Of all weights, bit by bit."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            found.update(parameter.detach().float().numpy().tobytes())
    return found.hexdigest()


# all gathers of ZeRO-3, whoever starts them
GATHERS = ((partition_parameters, "_dist_allgather_fn"), (gathers, "WeightHandle"))


@contextmanager
def calls_of(ways: Sequence[tuple[object, str]]) -> Iterator[Counter[str]]:
    """How often each attribute is called within, by its name."""
    found: Counter[str] = Counter()

    def counting(name: str, way: Callable) -> Callable:
        def called(*args: object, **named: object) -> object:
            found[name] += 1
            return way(*args, **named)

        return called

    # as it stands there: what a class of C++'s gives is not what it has
    stock = [getattr_static(place, name) for place, name in ways]
    for (place, name), way in zip(ways, stock, strict=True):
        setattr(place, name, counting(name, way))
    try:
        yield found
    finally:
        for (place, name), way in zip(ways, stock, strict=True):
            setattr(place, name, way)


def trained(
    build: Callable[[], nn.Module], block: dict | None, between: Callable | None = None, **config: object
) -> dict:
    """Losses and gradient norms, the weights after it, how many gathers a step of the last took, and which leafs."""
    engine = engine_of(build(), block, **config)
    counts, said = [], []
    for number, step in enumerate(jobs.batches(GAS, products.FEW_STEPS)):
        with calls_of(GATHERS) as calls:
            said += step_of(engine, step)
            if between is not None and number == 1:
                said += between(engine)
        counts.append(calls.total())
    found = {
        "said": said,
        "gathers": counts,
        "weights": digest(engine.module),
        "leafs": [name for name, module in engine.module.named_modules() if z3_leaf_module(module)],
    }
    report = getattr(engine, "ds_fused_report", None)
    if report is not None:
        found |= {"report": str(report), "left": [f"{row.what}: {row.reason}" for row in report.left]}
        found["sizes"] = sizes_in_effect(engine)
        report.restore()
        found["leafs after restore"] = sum(z3_leaf_module(module) for module in engine.module.modules())
    engine.destroy()
    return found


def sizes_in_effect(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """Where DeepSpeed keeps them, not where it reads them."""
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    of = partial(getattr, coordinator)
    return {
        "stage3_prefetch_bucket_size": of("_PartitionedParameterCoordinator__prefetch_bucket_sz"),
        "stage3_max_live_parameters": of("_PartitionedParameterCoordinator__max_n_available_params"),
        "stage3_max_reuse_distance": of("_PartitionedParameterCoordinator__max_reuse_dist_in_numel"),
        "reduce_bucket_size": engine.optimizer.reduce_bucket_size,
        "bucket": max(bucket.buffer.numel() for bucket in engine.optimizer.ipg_buckets.values()),
        "sub_group_size": engine.optimizer.sub_group_size,
    }


def with_deepspeeds_leafs(build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    deepspeed.utils.set_z3_leaf_modules(model, ["LlamaDecoderLayer"])
    return model


def ways(build: Callable[[], nn.Module], between: Callable | None = None, **config: object) -> dict:
    """Stock, leaf modules, and these with small sizes; neither, but gathers in place, is "in place"."""
    blocks = {"stock": None, "in place": OFF, "leaf": LEAF, "both": LEAF | {"zero_sizes": "small"}}
    return {name: trained(build, block, between, **config) for name, block in blocks.items()}


def sized(build: Callable[[], nn.Module]) -> dict:
    """Beside them sizes alone, DeepSpeed's own leaf modules, and leaf modules by way of a buffer."""
    found = ways(build) | {name: trained(build, block) for name, block in SIZES.items()}
    found["by a buffer"] = trained(build, LEAF | {"collectives": "stock"})
    return found | {"deepspeed's leaf": trained(partial(with_deepspeeds_leafs, build), None)}


@case
def plain() -> dict:
    return sized(llama)


@case
def tied() -> dict:
    return ways(partial(llama, tied=True))


@case
def reentrant() -> dict:
    return ways(partial(llama, checkpointing="reentrant"))


@case
def not_reentrant() -> dict:
    return sized(partial(llama, checkpointing="plain"))


@case
def checkpoint_to_the_end() -> dict:
    """A repeated forward that does not stop at the last tensor that is needed; DeepSpeed's ZeRO-3 can't do that."""

    def way(block: dict | None) -> dict:
        try:
            return trained(partial(llama, checkpointing="plain"), block)
        except RuntimeError as error:
            return {"error": str(error)}

    with set_checkpoint_early_stop(False):
        return {"stock": way(None), "leaf": way(LEAF)}


@case
def with_lora() -> dict:
    return ways(lora)


@case
def lora_reentrant() -> dict:
    return ways(partial(lora, "reentrant"))


@case
def lora_plain() -> dict:
    return ways(partial(lora, "plain"))


@case
def lora_plain_without_gradients_of_inputs() -> dict:
    return ways(partial(lora, "plain", inputs=False))


@case
def fp32_adapters() -> dict:
    """Over a model in bf16, as PEFT makes them and zero.Init leaves them: gradients in fp32 where bf16 is sent."""

    def build() -> nn.Module:
        model = split_llama(bf16={"enabled": True})
        torch.manual_seed(2)
        return get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))

    dtypes = {str(p.dtype) for p in build().parameters() if p.requires_grad}
    blocks = {"stock": None, "in place": OFF}
    found = {name: trained(build, block, bf16={"enabled": True}) for name, block in blocks.items()}
    return found | {"dtypes": sorted(dtypes)}


@case
def in_between() -> dict:
    """Evaluation and generation with a cache between two steps."""

    def between(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        ids, labels = jobs.batches(1, 1)[0][0][dist.get_rank()]
        engine.eval()
        with torch.no_grad():
            evaluated = engine(input_ids=ids, labels=labels).loss.item()
            words = engine.module.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True, synced_gpus=True)
        engine.train()
        return [evaluated, *words.flatten().tolist()]

    return ways(llama, between)


@case
def unwrapped() -> dict:
    """DeepSpeed takes its hooks off for generation and puts them on again."""

    def between(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        ids = jobs.batches(1, 1)[0][0][dist.get_rank()][0]
        with unwrap_model_for_generation(engine) as model, torch.no_grad():
            words = model.module.generate(ids, max_new_tokens=4, do_sample=False)
        return words.flatten().tolist()

    return ways(partial(llama, checkpointing="plain"), between)


@case
def some_stay_whole() -> dict:
    """Norms are persistent, and weights were split when the model was built."""
    return ways(split_llama, zero={"stage3_param_persistence_threshold": 100})


@case
def whole_ahead() -> dict:
    """Of a layer of 7744 weights all is on its way before it begins, or, as the JSON says in "part", 2000."""
    block, part = LEAF | {"zero_sizes": "small"}, {"stage3_prefetch_bucket_size": 2000}
    return {"whole": trained(llama, block), "part": trained(llama, block, zero=part)}


@case
def frequencies() -> dict:
    """zero.Init rounds those of the rotary embedding. "whole": a model that was built without it."""
    bf16 = {"bf16": {"enabled": True}}
    build = partial(split_llama, **bf16)
    found = {"stock": trained(build, None, **bf16), "whole": trained(llama, None, **bf16)}
    for choice in ("stock", "fp32"):
        found[f"{choice} by us"] = trained(build, OFF | {"rotary_frequencies": choice}, **bf16)
    return found


@case
def offloaded() -> dict:
    """Shards of weights on the host: here, where the device is."""
    return ways(llama, zero={"offload_param": {"device": "cpu"}})


@case
def only_inference() -> dict:
    """Without an optimizer."""

    def said(block: dict | None) -> dict:
        config = {"train_micro_batch_size_per_gpu": products.ROWS, "zero_optimization": {"stage": 3}}
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        config |= {} if block is None else {"ds_fused": block}
        engine = deepspeed.initialize(model=llama(), config=config)[0]
        engine.eval()
        ids, labels = jobs.batches(1, 1)[0][0][dist.get_rank()]
        with torch.no_grad():
            losses = [engine(input_ids=ids, labels=labels).loss.item() for _ in range(3)]
        return {"losses": losses, "leafs": sum(z3_leaf_module(module) for module in engine.module.modules())}

    return {"stock": said(None), "leaf": said(LEAF | {"zero_sizes": "small"})}


@case
def restored_late() -> dict:
    """After its engine is gone."""
    engine = engine_of(llama(), LEAF)
    report, model = engine.ds_fused_report, engine.module
    hooks = [sum(len(module._forward_hooks) for module in model.modules())]
    engine.destroy()
    report.restore()
    hooks.append(sum(len(module._forward_hooks) for module in model.model.modules()))
    return {"hooks": hooks, "leafs": sum(z3_leaf_module(module) for module in model.modules())}


@case
def a_gather_for_each() -> dict:
    """Nothing is fetched ahead, so that each module, or each layer, is a gather of its own."""
    zero = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
    return {
        f"{name} {how}": trained(partial(llama, checkpointing=how), block, zero=zero)
        for how in (None, *CHECKPOINTING)
        for name, block in {"stock": None, "leaf": LEAF}.items()
    }


# by way of buffers, and in place: gathers, reductions
WAYS = (
    (partition_parameters, "AllGatherCoalescedHandle"),
    (gathers, "WeightHandle"),
    (stage3, "reduce_scatter_coalesced"),
    (reductions.ReductionClaim, "_reduce"),
)


def handles(engine: deepspeed.DeepSpeedEngine, step: list) -> Counter[str]:
    """How often a step calls each of WAYS, by its name."""
    with calls_of(WAYS) as found:
        step_of(engine, step)
    return found


@case
def in_place() -> dict:
    """How weights come and gradients go: as it is, while DeepSpeed logs communication, and restored."""
    engine = engine_of(llama(), LEAF)
    weight = engine.module.model.layers[0].mlp.gate_proj.weight
    steps = jobs.batches(GAS, 3)
    found: dict = {"plain": handles(engine, steps[0])}
    weight.all_gather_coalesced([weight, engine.module.model.embed_tokens.weight]).wait()
    found["bytes beyond the weight"] = weight.untyped_storage().nbytes() - weight.nbytes
    weight.partition([weight, engine.module.model.embed_tokens.weight])
    comms_logger.enabled = True
    try:
        found["logged"] = handles(engine, steps[1])
    finally:
        comms_logger.enabled = False
    found["report"] = str(engine.ds_fused_report)
    engine.ds_fused_report.restore()
    found["restored"] = handles(engine, steps[2])
    return found


class Odd(nn.Module):
    """Weights that two ranks can't split evenly, one with an element, in two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.a, self.b = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(1))
        self.c = nn.Parameter(torch.randn(7).bfloat16(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.a).sum() * self.b.sum() + self.c.float().sum()


class AsOnGpus:
    """DeepSpeed's accelerator, by another name."""

    device_name = staticmethod(lambda: "cuda")
    current_device_name = staticmethod(lambda: "cpu")


# one call of the group for several weights, and for one
CALLS = ((dist.ProcessGroup, "allgather_into_tensor_coalesced"), (dist.ProcessGroup, "_allgather_base"))


@case
def odd() -> dict:
    model = Odd()
    expected = [p.detach().float().tolist() for p in model.parameters()]
    engine = engine_of(model, OFF)
    params = list(model.parameters())
    with calls_of(CALLS) as calls:
        handle = params[dist.get_rank()].all_gather_coalesced(set(params))
    handle.wait()
    handle.wait()
    found = {"expected": expected, "got": [p.detach().float().tolist() for p in params], "calls": calls}
    found["class"], found["dtypes"] = type(handle).__name__, [str(p.dtype) for p in params]
    for p in params:
        p.partition()
    stock, gathers.get_accelerator = gathers.get_accelerator, AsOnGpus
    try:
        # of one dtype: gloo can have one such call on its way at a time
        with calls_of(CALLS) as found["calls on GPUs"]:
            params[0].all_gather_coalesced(params[:2]).wait()
    finally:
        gathers.get_accelerator = stock
    found["got on GPUs"] = [p.detach().float().tolist() for p in params[:2]]
    for p in params[:2]:
        p.partition()
    engine.backward(engine(torch.ones(2, 5)))
    engine.step()
    return found


@case
def proofs() -> dict:
    """Where two ways differ, or the backend can't, all ranks go DeepSpeed's."""
    wait, room, reduce = gathers.WeightHandle.wait, gathers._room, reductions.ReductionClaim._reduce

    def wrong_weight(handle: gathers.WeightHandle, handle_dependency: bool = True) -> None:
        weights = [p for p, _ in handle._wholes]
        wait(handle)
        weights[0].data.add_(dist.get_rank())

    def wrong_gradient(claim: reductions.ReductionClaim, *args: object) -> list[torch.Tensor]:
        return [part + dist.get_rank() for part in reduce(claim, *args)]

    def unable(*args: object) -> None:
        raise RuntimeError("Backend other does not support it\nat a place")

    found = {}
    for name, broken in {
        "weights": (wrong_weight, room, reduce),
        "gradients": (wait, room, wrong_gradient),
        "unable": (wait, unable, unable),
    }.items():
        gathers.WeightHandle.wait, gathers._room, reductions.ReductionClaim._reduce = broken
        try:
            engine = engine_of(llama(), LEAF)
        finally:
            gathers.WeightHandle.wait, gathers._room, reductions.ReductionClaim._reduce = wait, room, reduce
        left = [f"{row.what}: {row.reason}" for row in engine.ds_fused_report.left]
        found[name] = {"left": left, "handles": handles(engine, jobs.batches(GAS, 1)[0])}
    return found


@case
def not_in_place() -> dict:
    """What the JSON says of gathers stands."""
    found = {}
    for name in ("stage3_allgather_sequential", "stage3_use_all_reduce_for_fetch_params"):
        found[name] = trained(llama, OFF, zero={name: True})["left"]
    found["reduce_scatter"] = trained(llama, OFF, zero={"reduce_scatter": False})["left"]
    return found | {"stock": trained(llama, OFF | {"collectives": "stock"})["left"]}


@case
def given() -> dict:
    """What the JSON gives stays, by either of DeepSpeed's names."""
    zero = {"stage3_prefetch_bucket_size": 777, "max_reuse_distance": 888, "reduce_bucket_size": 9999}
    return {"small": trained(llama, SIZES["small"], zero=zero)}


@case
def leafs_of_the_user() -> dict:
    def build() -> nn.Module:
        model = llama()
        deepspeed.utils.set_z3_leaf_module(model.model.layers[0].mlp, True)
        return model

    zero = {"leaf_module": {"names": ["model.layers.1.mlp"]}}
    return {"script": trained(build, LEAF), "json": trained(llama, LEAF, zero=zero)}


@case
def tiled_inside() -> dict:
    block = OFF | {"swiglu": True, "tiled_mlp": {"tiles": 3}}
    build = partial(llama, checkpointing="plain")
    return {"stock": trained(build, block), "leaf": trained(build, block | {"leaf_modules": True})}


@case
def fused() -> dict:
    """Everything on, with the head and a tied embedding in slabs."""
    block = {"enabled": True, "fused_linear_cross_entropy": {"mode": "stream"}}
    build = partial(llama, tied=True)
    return {"stock": trained(build, block), "leaf": trained(build, block | {"leaf_modules": True})}


@case
def some_kept() -> dict:
    """A checkpointed layer that keeps a part of its forward."""
    block = OFF | {"recompute": "matmuls"}
    build = partial(llama, checkpointing="plain")
    return {"stock": trained(build, block), "leaf": trained(build, block | {"leaf_modules": True})}


@case
def profiles() -> dict:
    build = partial(llama, checkpointing="plain")
    blocks = {name: {"enabled": True, "profile": name} for name in ("auto", "fit", "fast", "small")}
    blocks["explicit"] = blocks["small"] | {"zero_sizes": "stock", "fused_linear_cross_entropy": {"mode": "gather"}}
    return {"stock": trained(build, None)} | {name: trained(build, block) for name, block in blocks.items()}


def mixture() -> nn.Module:
    torch.manual_seed(4)
    return MixtralForCausalLM(
        MixtralConfig(**products.SIZES, num_local_experts=4, initializer_range=0.3, use_cache=False)
    )


@case
def experts() -> dict:
    """Small enough to be gathered with their layer; and not."""
    found = {"stock": trained(mixture, None), "leaf": trained(mixture, LEAF)}
    before, leaf_modules.MOST_BYTES = leaf_modules.MOST_BYTES, 1000
    try:
        return found | {"too large": trained(mixture, LEAF)}
    finally:
        leaf_modules.MOST_BYTES = before


@case
def other_profile_on_one() -> dict:
    block = OFF | {"profile": "fast" if dist.get_rank() else "auto"}
    try:
        engine_of(llama(), block)
    except RuntimeError as error:
        return {"error here": str(error)}
    return {"error here": ""}


if __name__ == "__main__":
    CASES.run(Path(sys.argv[1]), [name for name in CASES if name not in sys.argv[2:]])
