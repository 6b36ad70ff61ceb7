"""One rank of test_special.py: models and uses that are not the plain case, stock and fused, one after another.

    special_ranks.py OUT CASE...

OUT/CASE.RANK.json holds what the case's function returned on that rank, or {"error"}.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)
from transformers.trainer_pt_utils import LabelSmoother

import ds_fused
from ds_fused.engine import lookup, zero3
from ds_fused.engine.delivery import Delivery
from ds_fused.engine.stationary import ZeroShard
from ds_fused.modules import norm
from ds_fused.ops import _tiles
from ds_fused.policies.kinds import norms

CASES: dict[str, Callable[[], dict]] = {}


def case(function: Callable[[], dict]) -> Callable[[], dict]:
    CASES[function.__name__] = function
    return function


def model_of(tied: bool = False, kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> LlamaForCausalLM:
    model = kind(jobs.config_of(tied))
    weights = jobs.first_weights(tied)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    return model


def engine_of(model: torch.nn.Module, stage: int, block: dict | None, **more: object) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        "gradient_clipping": products.CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    if block is not None:
        config["ds_fused"] = {"enabled": True, **block}
    trained = [w for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=products.LEARNING_RATE["sgd"])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config | more)[0]


def mine(joined: bool = False) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's batches, one for each step; joined: the same ones on every rank, as tensor parallelism wants."""
    return [step[0][0 if joined else dist.get_rank()] for step in jobs.batches(1, products.FEW_STEPS)]


def train(engine: deepspeed.DeepSpeedEngine, batches: list, during: Callable = lambda output: None) -> list[float]:
    losses = []
    for ids, labels in batches:
        output = engine(input_ids=ids, labels=labels)
        during(output)
        engine.backward(output.loss)
        engine.step()
        losses.append(output.loss.item())
    return losses


def left(engine: deepspeed.DeepSpeedEngine) -> list[str]:
    return [f"{row.what}: {row.reason}" for row in engine.ds_fused_report.left]


def replaced(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in engine.ds_fused_report.replaced:
        counts[row.key] = counts.get(row.key, 0) + row.count
    return counts


def both(
    build: Callable[[], torch.nn.Module],
    stage: int,
    joined: bool = False,
    block: dict | None = None,
    run: Callable[[deepspeed.DeepSpeedEngine], object] | None = None,
    **more: object,
) -> dict:
    """Stock, then fused: what `run` returns of each engine, or the losses of its training."""
    run = run or (lambda engine: train(engine, mine(joined)))
    stock = engine_of(build(), stage, None, **more)
    out = {"stock": run(stock)}
    stock.destroy()
    fused = engine_of(build(), stage, block or {}, **more)
    out |= {"replaced": replaced(fused), "left": left(fused), "report": str(fused.ds_fused_report)}
    out["fused"] = run(fused)
    fused.destroy()
    return out


def with_lora(targets: list[str]) -> torch.nn.Module:
    model = model_of()
    torch.manual_seed(2)
    # with B = 0, as LoRA begins, A would have no gradient in the first step
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


@case
def lora() -> dict:
    return both(lambda: with_lora(["q_proj", "v_proj", "gate_proj", "down_proj"]), stage=2)


@case
def lora_zero3() -> dict:
    return both(lambda: with_lora(["q_proj", "v_proj", "gate_proj", "down_proj"]), stage=3)


@case
def lora_on_the_head() -> dict:
    return both(lambda: with_lora(["q_proj", "lm_head"]), stage=3)


@case
def experts() -> dict:
    """A mixture with each implementation of its products; the auxiliary loss of the router is a part of the loss."""

    def build(implementation: str) -> torch.nn.Module:
        torch.manual_seed(4)
        router = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
        model = MixtralForCausalLM(MixtralConfig(**products.SIZES, **router, use_cache=False))
        model.set_experts_implementation(implementation)
        return model

    return {name: both(lambda name=name: build(name), stage=3) for name in ("eager", "grouped_mm", "batched_mm")}


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

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for step in jobs.batches(2, products.FEW_STEPS):
            for micro in step:
                ids, labels = micro[dist.get_rank()]
                loss = engine(input_ids=ids, labels=labels).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        return losses

    block = {"fused_linear_cross_entropy": {"mode": "gather", "grad_in_forward": True}}
    return both(lambda: model_of(tied=True), 3, block=block, run=run, gradient_accumulation_steps=2)


@case
def residual() -> dict:
    """Norms that take the residual stream as a second input, with sharded weights; and computed again in backward."""
    sums, stock = [], norm.add_rms_norm

    def counting(*args: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        sums.append(args[0].shape)
        return stock(*args, **options)

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = train(engine, mine())
        engine.module.gradient_checkpointing_enable()
        return losses + train(engine, mine())

    norm.add_rms_norm = counting
    try:
        out = both(model_of, stage=3, run=run, block={"add_rms_norm": True})
    finally:
        norm.add_rms_norm = stock
    # those of the proof have another shape
    tokens = mine()[0][0].shape
    return out | {"sums": sum(shape[:2] == tokens for shape in sums)}


@case
def tensor_parallel() -> dict:
    return both(model_of, stage=1, joined=True, tensor_parallel={"autotp_size": 2})


def reading(who: Callable[[int], bool], block: dict) -> dict:
    """Train under ZeRO-3 and read the logits after each loss on the ranks that `who` names."""
    seen, errors = {"stock": [], "fused": []}, []

    def reader(name: str) -> Callable:
        def read(output) -> None:
            if not who(dist.get_rank()):
                return
            began = time.monotonic()
            try:
                seen[name].append(output.logits.float().square().mean().item())
            except Exception as e:
                seen[name].append(None)
                errors.append([type(e).__name__, str(e), time.monotonic() - began])

        return read

    stock = engine_of(model_of(), 3, None)
    losses = {"stock": train(stock, mine(), reader("stock"))}
    stock.destroy()
    fused = engine_of(model_of(), 3, block)
    losses["fused"] = train(fused, mine(), reader("fused"))
    fused.destroy()
    return losses | {"logits": seen, "errors": errors}


@case
def logits_read_by_all() -> dict:
    return reading(lambda rank: True, {})


@case
def logits_kept() -> dict:
    return reading(lambda rank: rank == 1, {"logits": "keep"})


def read_by_one(block: dict) -> dict:
    before, zero3.PATIENCE_SECONDS = zero3.PATIENCE_SECONDS, 1.0
    try:
        return reading(lambda rank: rank == 1, block)
    finally:
        zero3.PATIENCE_SECONDS = before


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


# mode "stream": the head's weight comes in slabs of one row a rank, 34 of them
STREAM = {"fused_linear_cross_entropy": {"mode": "stream", "slab_mb": 0}}


STATIONARY = {"fused_linear_cross_entropy": {"mode": "stationary", "slab_mb": 0}}


def streamed(build: Callable[[], torch.nn.Module] = model_of, run: Callable | None = None, **more: object) -> dict:
    return both(build, stage=3, block=STREAM, run=run, **more)


def frozen(*trained: str) -> torch.nn.Module:
    """A model of which only those parameters learn whose names hold one of the words."""
    model = model_of()
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(word in name for word in trained))
    return model


@case
def stream_frozen_trunk() -> dict:
    return streamed(lambda: frozen("lm_head"))


@case
def stream_frozen_head() -> dict:
    return streamed(lambda: frozen("layers", "norm"))


@case
def stream_uneven_ranks() -> dict:
    """Other lengths on each rank, and one that has nothing to predict in its second step."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for step, (ids, labels) in enumerate(mine()):
            if dist.get_rank() == 1:
                ids, labels = ids[:, : 5 + step], labels[:, : 5 + step]
                labels = torch.full_like(labels, jobs.IGNORED) if step == 1 else labels
            # a sum over this number, which both ranks share: a mean over no tokens would be NaN
            loss = engine(input_ids=ids, labels=labels, num_items_in_batch=20).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    return streamed(run=run)


@case
def stream_embedding() -> dict:
    """An untied embedding in slabs as well, with a hook that others put on it."""

    def build() -> torch.nn.Module:
        model = model_of()
        model.model.embed_tokens.padding_idx = 3
        model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 1.5)
        return model

    return both(build, stage=3, block={**STREAM, "embedding": True})


@case
def stream_logits_kept() -> dict:
    """The logits take part in the loss, so the head gets a gradient in both ways."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for ids, labels in mine():
            output = engine(input_ids=ids, labels=labels)
            loss = output.loss + 1e-2 * output.logits.float().square().mean()
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    return both(model_of, stage=3, block={**STREAM, "logits": "keep"}, run=run)


@case
def stream_gradient_to_logits() -> dict:
    engine = engine_of(model_of(), 3, STREAM)
    ids, labels = mine()[0]
    output = engine(input_ids=ids, labels=labels)
    try:
        engine.backward(output.loss + output.logits.float().mean())
        return {"raised": None}
    except RuntimeError as error:
        return {"raised": str(error)}


@case
def stream_logits_read() -> dict:
    return reading(lambda rank: True, STREAM)


@case
def stream_logits_read_by_one() -> dict:
    return read_by_one(STREAM)


@case
def stream_communication_dtype() -> dict:
    return streamed(bf16={"enabled": True}, communication_data_type="fp32")


@case
def stream_autocast() -> dict:
    return streamed(torch_autocast={"enabled": True, "dtype": "bfloat16"})


@case
def stream_offload() -> dict:
    offload = {"device": "cpu"}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": offload, "offload_param": offload}
    return streamed(zero_optimization=zero, zero_force_ds_cpu_optimizer=False)


@case
def stream_tied_offload() -> dict:
    """The gradients of head and embedding meet on the CPU."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": {"device": "cpu"}}
    build = partial(model_of, tied=True)
    return streamed(build, zero_optimization=zero, zero_force_ds_cpu_optimizer=False)


@case
def stream_direct_backward() -> dict:
    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for ids, labels in mine():
            loss = engine(input_ids=ids, labels=labels).loss
            loss.backward()
            engine.step()
            losses.append(loss.item())
        return losses

    return streamed(run=run)


@case
def stream_checkpointing() -> dict:
    def build() -> torch.nn.Module:
        model = model_of()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        return model

    return streamed(build)


@case
def stream_evaluation_and_saving() -> dict:
    """Evaluation between two steps, then the weights saved, trained away from and loaded again."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = train(engine, mine()[:2])
        with shared_folder() as folder:
            engine.save_checkpoint(folder, tag="here")
            after = train(engine, mine()[2:])
            engine.eval()
            ids, labels = mine()[0]
            with torch.no_grad():
                evaluated = engine(input_ids=ids, labels=labels).loss.item()
                logits = engine(input_ids=ids).logits.float().square().mean().item()
            engine.train()
            engine.load_checkpoint(folder, tag="here")
            again = train(engine, mine()[2:])
        return [*losses, *after, evaluated, logits, *again]

    return streamed(run=run)


def tied_and_untied(run: Callable[[deepspeed.DeepSpeedEngine], object], **more: object) -> dict:
    """Both kinds of head, and the tied one also where its embedding is not looked up in slabs."""
    block = {**STREAM}

    def apart() -> torch.nn.Module:
        # what may do more than look up is left alone, so autograd brings a gradient of its own to the shared weight
        model = model_of(tied=True)
        model.model.embed_tokens.max_norm = 100.0
        return model

    builds = {"untied": model_of, "tied": lambda: model_of(tied=True), "apart": apart}
    return {name: both(build, 3, block=block, run=run, **more) for name, build in builds.items()}


@case
def stream_coalesced() -> dict:
    """Several backwards, one reduction: all but the head's gradients wait on their parameters until it."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for step in jobs.batches(3, products.FEW_STEPS):
            with engine.coalesce_grad_reduction():
                for micro in step:
                    ids, labels = micro[dist.get_rank()]
                    loss = engine(input_ids=ids, labels=labels).loss
                    engine.backward(loss)
                    losses.append(loss.item())
            engine.step()
        return losses

    offload = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": {"device": "cpu"}}
    out = tied_and_untied(run)
    out["offloaded"] = streamed(run=run, zero_optimization=offload, zero_force_ds_cpu_optimizer=False)
    return out


@case
def stream_callers_accumulation() -> dict:
    """The caller says when an accumulation ends, and its length changes from step to step."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for length, step in enumerate(jobs.batches(3, products.FEW_STEPS)):
            for micro in step[: 1 + length % 3]:
                ids, labels = micro[dist.get_rank()]
                loss = engine(input_ids=ids, labels=labels).loss
                engine.backward(loss)
                losses.append(loss.item())
            engine.step()
        return losses

    return tied_and_untied(run, managed_gradient_accumulation=False)


@case
def stream_direct_backward_accumulating() -> dict:
    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for step in jobs.batches(3, products.FEW_STEPS):
            for micro in step:
                ids, labels = micro[dist.get_rank()]
                loss = engine(input_ids=ids, labels=labels).loss
                loss.backward()
                engine.step()
                losses.append(loss.item())
        return losses

    return tied_and_untied(run, gradient_accumulation_steps=3)


@case
def stream_thrown_away() -> dict:
    """Before each step a gradient that nobody wants."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for batches in zip(reversed(mine()), mine(), strict=True):
            for ids, labels in batches:
                engine.optimizer.zero_grad()
                loss = engine(input_ids=ids, labels=labels).loss
                engine.backward(loss)
                losses.append(loss.item())
            engine.step()
        return losses

    return streamed(run=run)


@case
def stream_evaluation_in_an_accumulation() -> dict:
    """Between two micro steps, with and without labels."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for step in jobs.batches(2, products.FEW_STEPS):
            for micro in step:
                ids, labels = micro[dist.get_rank()]
                loss = engine(input_ids=ids, labels=labels).loss
                engine.backward(loss)
                engine.step()
                engine.eval()
                with torch.no_grad():
                    losses.append(engine(input_ids=ids, labels=labels).loss.item())
                    losses.append(engine(input_ids=ids).logits.float().square().mean().item())
                engine.train()
                losses.append(loss.item())
        return losses

    return tied_and_untied(run, gradient_accumulation_steps=2)


@case
def stream_no_sync() -> dict:
    """What ZeRO-3 itself says to it."""

    def run(engine: deepspeed.DeepSpeedEngine) -> str | None:
        try:
            with engine.no_sync():
                train(engine, mine()[:1])
        except AssertionError as error:
            return str(error)
        return None

    return streamed(run=run)


@contextmanager
def shared_folder() -> Iterator[Path]:
    """One folder for all ranks, gone when all are done with it."""
    with tempfile.TemporaryDirectory() as mine:
        name = [mine]
        dist.broadcast_object_list(name)
        yield Path(name[0])
        dist.barrier()


@case
def stream_universal_checkpoint() -> dict:
    """Two steps, the checkpoint made universal, and two more by an engine that starts from it."""

    def engine(tied: bool, block: dict | None, **more: object) -> deepspeed.DeepSpeedEngine:
        return engine_by_json(model_of(tied), block, "AdamW", **more)

    def run(tied: bool, block: dict | None) -> tuple[list[float], str]:
        with shared_folder() as folder:
            first = engine(tied, block)
            losses = train(first, mine()[:2])
            first.save_checkpoint(folder, tag="here")
            first.destroy()
            if dist.get_rank() == 0:
                convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--num_extract_workers", "1"]
                folders = ["--input_folder", folder / "here", "--output_folder", folder / "universal"]
                subprocess.run([*convert, *folders], check=True, stdout=subprocess.DEVNULL)
            dist.barrier()
            second = engine(tied, block, checkpoint={"load_universal": True})
            second.load_checkpoint(folder, tag="universal")
            losses += train(second, mine()[2:])
            report = str(getattr(second, "ds_fused_report", None))
            second.destroy()
        return losses, report

    out = {}
    for name, tied in (("untied", False), ("tied", True)):
        stock, _ = run(tied, None)
        fused, report = run(tied, STREAM)
        out[name] = {"stock": stock, "fused": fused, "report": report}
    return out


@case
def stream_saved_weights() -> dict:
    """The weights of a trained model, as DeepSpeed consolidates them into one file in the model's dtype and in fp32."""

    def run(engine: deepspeed.DeepSpeedEngine) -> dict:
        train(engine, mine())
        with shared_folder() as folder:
            engine.save_16bit_model(folder, "weights.bin")
            engine.save_checkpoint(folder, tag="here")
            dist.barrier()
            saved = torch.load(folder / "weights.bin")
            single = get_fp32_state_dict_from_zero_checkpoint(folder, tag="here")
        params = dict(engine.module.named_parameters())
        exact = {name: deepspeed.utils.safe_get_full_fp32_param(w) for name, w in params.items()}
        with deepspeed.zero.GatheredParameters(list(params.values())):
            own = all(torch.equal(saved[name], w) for name, w in params.items())
        return {
            "own": own and all(torch.equal(single[name], w) for name, w in exact.items()),
            "dtypes": sorted({str(w.dtype) for w in saved.values()}),
            "weights": {name: w.flatten().tolist() for name, w in single.items()},
        }

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_gather_16bit_weights_on_model_save": True}
    out = tied_and_untied(run, zero_optimization=zero)
    out["bf16"] = streamed(run=run, zero_optimization=zero, bf16={"enabled": True})
    return out


class Largest(TorchDispatchMode):
    """The most elements that any storage had which an operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return result


@case
def stream_memory() -> dict:
    """Forward and backward of a model whose tied table and whose logits are larger than anything else."""
    n_vocab, n_tokens = 40001, 40
    config = jobs.config_of(tied=True)
    config.vocab_size = n_vocab
    ids = torch.randint(n_vocab, (1, n_tokens), generator=torch.Generator().manual_seed(dist.get_rank()))

    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return LlamaForCausalLM(config)

    def run(engine: deepspeed.DeepSpeedEngine) -> dict:
        largest = []
        for _ in range(2):
            with Largest() as watch:
                loss = engine(input_ids=ids, labels=ids).loss
                engine.backward(loss)
            engine.step()
            largest.append(watch.elements)
        return {"largest": largest, "loss": loss.item()}

    # a table of 5 MiB in slabs of 1
    block = {"fused_linear_cross_entropy": {**STREAM["fused_linear_cross_entropy"], "slab_mb": 1, "chunk_mb": 1}}
    before = _tiles.LEAST_SIDE, _tiles.SIDE_STEP
    _tiles.LEAST_SIDE, _tiles.SIDE_STEP = 4, 2
    try:
        out = both(build, stage=3, run=run, block=block)
    finally:
        _tiles.LEAST_SIDE, _tiles.SIDE_STEP = before
    return out | {"table": n_vocab * config.hidden_size, "logits": n_vocab * n_tokens}


def with_bias(frozen: str | None = None) -> torch.nn.Module:
    """``frozen``: the head's weight or bias."""
    model = model_of()
    torch.manual_seed(3)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(products.SIZES["vocab_size"]))
    if frozen is not None:
        getattr(model.lm_head, frozen).requires_grad_(False)
    return model


@case
def stream_bias() -> dict:
    """A bias below the threshold stays whole on every rank; the weight is above it."""
    return streamed(with_bias, zero_optimization={"stage": 3, "stage3_param_persistence_threshold": 100})


@case
def stream_sharded_bias() -> dict:
    """A bias above the threshold is sharded, too; 67 numbers over two ranks, so with padding."""
    return streamed(with_bias)


@case
def stream_sharded_bias_of_a_frozen_head() -> dict:
    return streamed(lambda: with_bias(frozen="weight"))


@case
def stream_frozen_sharded_bias() -> dict:
    return streamed(lambda: with_bias(frozen="bias"))


@case
def stream_gemma() -> dict:
    """Tied, embeddings scaled in a class of their own, logits capped."""

    def build() -> torch.nn.Module:
        torch.manual_seed(4)
        config = Gemma3TextConfig(
            **products.SIZES, head_dim=8, final_logit_softcapping=5.0, initializer_range=0.3, use_cache=False
        )
        return Gemma3ForCausalLM(config)

    return streamed(build)


@case
def stream_own_loss() -> dict:
    """The forward computes its loss itself, of logits with a second bias; one table for encoder, decoder and head."""

    def build() -> torch.nn.Module:
        torch.manual_seed(4)
        parts = {f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in BART_PART.items()}
        model = BartForConditionalGeneration(
            BartConfig(vocab_size=67, d_model=32, max_position_embeddings=64, init_std=0.3, dropout=0.0, **parts)
        )
        model.final_logits_bias.normal_()
        return model

    return streamed(build)


BART_PART = {"layers": 1, "ffn_dim": 48, "attention_heads": 4}


class SmoothingTrainer:
    """What HF's Trainer does with labels when it smooths them."""

    def __init__(self) -> None:
        self.label_smoother = LabelSmoother(0.1)

    def compute_loss(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        labels = inputs.pop("labels")
        return self.label_smoother(model(**inputs), labels, shift_labels=True)


@case
def stream_smoothed() -> dict:
    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        trainer = SmoothingTrainer()
        ds_fused.fuse_label_smoother(trainer)
        losses = []
        for ids, labels in mine():
            loss = trainer.compute_loss(engine, {"input_ids": ids, "labels": labels})
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    return streamed(run=run)


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
        "leaf": reason_of(of_leaves),
        "deepcompile": reason_of(compile={"deepcompile": True}),
        "quantized gradients": reason_of(zero={"zero_quantized_gradients": True}),
        # last: DeepSpeed keeps the groups of the first engine that has a second partition
        "hpz": reason_of(zero={"zero_hpz_partition_size": 2}),
    }


def engine_by_json(
    model: torch.nn.Module, block: dict | None, optimizer: str, reduce_scatter: bool = True, **more: object
) -> deepspeed.DeepSpeedEngine:
    """ZeRO-3 with an optimizer that DeepSpeed makes."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_scatter": reduce_scatter}
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        "optimizer": {"type": optimizer, "params": {"lr": products.LEARNING_RATE["adamw"]}},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if block is not None:
        config["ds_fused"] = {"enabled": True, **block}
    return deepspeed.initialize(model=model, config=config | more)[0]


def stock_and_streamed(engine_with: Callable[[dict | None], deepspeed.DeepSpeedEngine]) -> dict:
    stock = engine_with(None)
    out = {"stock": train(stock, mine())}
    stock.destroy()
    fused = engine_with(STREAM)
    out |= {"left": left(fused), "report": str(fused.ds_fused_report), "fused": train(fused, mine())}
    fused.destroy()
    return out


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


@contextmanager
def lookups() -> Iterator[list[int]]:
    """Of each lookup for which the tokens travelled, the largest number of them on a rank."""
    seen, function = [], lookup.stationary_embedding

    def noted(*args: object, most: int, **options: object) -> torch.Tensor:
        seen.append(most)
        return function(*args, most=most, **options)

    lookup.stationary_embedding = noted
    try:
        yield seen
    finally:
        lookup.stationary_embedding = function


def stationary(twin: Callable[[], dict]) -> Callable[[], dict]:
    """A case of mode "stream" in the other mode, and its lookups."""

    def run() -> dict:
        options = STREAM["fused_linear_cross_entropy"]
        before = dict(options)
        options["mode"] = "stationary"
        try:
            with lookups() as seen:
                return twin() | {"lookups": seen}
        finally:
            options.update(before)

    return run


for name in list(CASES):
    if name.startswith("stream_"):
        CASES[name.replace("stream", "stationary", 1)] = stationary(CASES[name])


@case
def stationary_weighted_ranks() -> dict:
    """Each rank's loss counts differently, so the gradients of the forward are of no use."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for ids, labels in mine():
            loss = (1 + dist.get_rank()) * engine(input_ids=ids, labels=labels).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        return losses

    return both(model_of, stage=3, run=run, block=STATIONARY)


@case
def stationary_both_ways() -> dict:
    """Batches of few tokens and of many, in one accumulation and the other way round in the next."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for number, step in enumerate(jobs.batches(2, products.FEW_STEPS)):
            for micro, batches in enumerate(step):
                ids, labels = batches[dist.get_rank()]
                if (number + micro) % 2:
                    ids, labels = torch.cat([ids, ids]), torch.cat([labels, labels])
                loss = engine(input_ids=ids, labels=labels).loss
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        return losses

    with lookups() as seen:
        out = both(partial(model_of, tied=True), 3, block=STATIONARY, run=run, gradient_accumulation_steps=2)
    return out | {"lookups": seen}


class OfItsOwn(LlamaForCausalLM):
    """A forward with a loss that transformers does not know: `loss_of` (hidden states, head, labels), both flat."""

    loss_of: Callable[[torch.Tensor, torch.nn.Linear, torch.Tensor], torch.Tensor]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> types.SimpleNamespace:
        # of the sequences that have labels, which may be none
        hidden = self.model(input_ids).last_hidden_state[: len(labels)]
        return types.SimpleNamespace(loss=self.loss_of(hidden.flatten(0, 1), self.lm_head, labels.reshape(-1)))


def with_own_loss(loss_of: Callable) -> OfItsOwn:
    model = model_of(kind=OfItsOwn)
    model.loss_of = loss_of
    return model


def uneven() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Rank 1 has no label in the second step, and no token of the loss in the third."""
    batches = mine()
    if dist.get_rank() == 1:
        batches[1] = batches[1][0], torch.full_like(batches[1][1], jobs.IGNORED)
        batches[2] = batches[2][0], batches[2][1][:0]
    return batches


IN_BF16 = {"fp32": {}, "bf16": {"bf16": {"enabled": True}}}


@case
def stationary_class_weights() -> dict:
    """With smoothing; each rank has its own weights."""

    def loss_of(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
        of_class = torch.linspace(0.2, 2.0 + dist.get_rank(), head.out_features)
        # as a sum, since a mean over no tokens would be NaN
        logits = head(hidden).float()
        return F.cross_entropy(logits, labels, of_class, label_smoothing=0.1, reduction="sum") / 20

    build, run = partial(with_own_loss, loss_of), lambda engine: train(engine, uneven())
    return {name: both(build, 3, block=STATIONARY, run=run, **more) for name, more in IN_BF16.items()}


@case
def stationary_entropies() -> dict:
    """A policy's loss with a bonus for entropy. The op is called with the shard, so the flag has no part in it."""

    def policy_loss(log_probs: torch.Tensor, entropies: torch.Tensor) -> torch.Tensor:
        advantages = torch.linspace(-0.5, 1.0, log_probs.numel())  # of each token another
        return -(advantages * log_probs + 0.1 * entropies).sum() / 20

    def plain(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
        log_p = head(hidden).float().log_softmax(-1)
        counts = labels != jobs.IGNORED
        log_probs = log_p.gather(1, labels.clamp_min(0)[:, None])[:, 0]
        return policy_loss(log_probs * counts, -(log_p.exp() * log_p).sum(-1) * counts)

    def losses(stays: bool, **more: object) -> list[float]:
        model = with_own_loss(plain)
        engine = engine_of(model, 3, None, **more)
        if stays:
            shard = ZeroShard(Delivery(model.lm_head.weight, engine))
            log_probs = partial(ds_fused.linear_log_probs, entropy=True)
            model.loss_of = lambda hidden, head, labels: policy_loss(*log_probs(hidden, shard, labels))
        found = train(engine, uneven())
        engine.destroy()
        return found

    return {name: {"stock": losses(False, **more), "fused": losses(True, **more)} for name, more in IN_BF16.items()}


@case
def auto() -> dict:
    """Which mode is chosen for few tokens and for many, and that training is right in it."""

    def run(engine: deepspeed.DeepSpeedEngine) -> dict:
        losses = train(engine, mine())
        return {"losses": losses, "report": str(getattr(engine, "ds_fused_report", ""))}

    return both(model_of, stage=3, run=run, block={"fused_linear_cross_entropy": {"mode": "auto"}})


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    ds_fused.install()
    for name in names:
        try:
            result = CASES[name]()
        except Exception:
            result = {"error": traceback.format_exc()}
        (out / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
