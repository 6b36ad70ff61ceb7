"""Several engines over one model, weights that are whole for a while, and layers that run twice before a backward."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from deepspeed.profiling.flops_profiler import FlopsProfiler
from deepspeed.utils import safe_get_full_fp32_param, z3_leaf_module
from special import STATIONARY, STREAM, both, case, engine_of, left, mine, model_of, replaced, train, with_lora
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

import ds_fused
from ds_fused.modules.swap import is_fused

TARGETS = ["q_proj", "down_proj"]
BUILDS = {"plain": model_of, "tied": lambda: model_of(tied=True), "lora": lambda: with_lora(TARGETS)}
TILED = {"tiled_mlp": {"tiles": 3}}
# blocks of the first engine and of the second; None: stock
PAIRS = {
    "stock": (None, None),
    "twice": ({}, {}),
    "then stock": (STREAM, None),
    "then stationary": (TILED | {"leaf_modules": True}, STATIONARY),
}


def marks(model: torch.nn.Module) -> list[str]:
    """What of an engine is left on a model."""
    leafs = [name for name, module in model.named_modules() if z3_leaf_module(module)]
    return leafs + [name for name, p in model.named_parameters() if hasattr(p, "ds_z3_leaf_module")]


@case
def profiled() -> dict:
    """Mode -> what DeepSpeed's flops profiler counts of a forward beside the trunk."""

    def counted(mode: str) -> int:
        engine = engine_of(model_of(), 3, {"fused_linear_cross_entropy": {"mode": mode, "slab_mb": 0}})
        profiler = FlopsProfiler(engine.module, ds_engine=engine)
        profiler.start_profile()
        train(engine, mine()[:1])
        profiler.stop_profile()
        trunk = sum(module.__macs__ for module in engine.module.model.modules())
        found = profiler.get_total_macs() - trunk
        profiler.end_profile()
        engine.destroy()
        return found

    return {mode: counted(mode) for mode in ("stream", "stationary", "gather")}


@case
def second_engine() -> dict:
    """One engine after another over the same model; the first is destroyed, or forgotten."""

    def run(build: Callable[[], torch.nn.Module], pair: tuple, is_destroyed: bool) -> dict:
        model = build()
        engine = engine_of(model, 3, pair[0])
        losses = train(engine, mine()[:2])
        left = None
        if is_destroyed:
            engine.destroy()
            left = marks(model)
        second = engine_of(model, 3, pair[1])
        head = model.get_output_embeddings().weight
        before = safe_get_full_fp32_param(head).clone() if head.requires_grad else torch.zeros(())
        losses += train(second, mine()[2:])
        moved = (safe_get_full_fp32_param(head) - before).abs().max().item() if head.requires_grad else 0.0
        report = getattr(second, "ds_fused_report", None)
        second.destroy()
        return {"losses": losses, "moved": moved, "left": left, "claims": 0 if report is None else len(report.claims)}

    return {
        f"{name}, {'destroyed' if is_destroyed else 'forgotten'}": {
            key: run(build, pair, is_destroyed) for key, pair in PAIRS.items()
        }
        for name, build in BUILDS.items()
        # LoRA's layers come as one, and so do the first engine's tiled ones
        for is_destroyed in ((True, False) if name == "plain" else (True,))
    }


@case
def second_engine_over_a_copy() -> dict:
    """A copy of a model that is trained becomes another engine's, as a teacher does; both train on."""

    def run(stage: int, pair: tuple, is_destroyed: bool) -> dict:
        first = engine_of(model_of(), stage, pair[0])
        numbers = train(first, mine()[:1])
        twin = copy.deepcopy(first.module)
        # of a copy of a copy, too
        model = copy.deepcopy(twin)
        if is_destroyed:
            first.destroy()
        second = engine_of(model, 3, pair[1])
        ids, labels = mine()[1]
        output = second(input_ids=ids, labels=labels)
        numbers.append(output.logits.detach().float().square().mean().item())
        second.backward(output.loss)
        second.step()
        numbers += train(second, mine()[2:])
        if not is_destroyed:
            numbers += train(first, mine()[1:])
            first.destroy()
        fused = pair[1] is not None
        found = {"replaced": replaced(second), "left": left(second)} if fused else {}
        second.destroy()
        is_stock = not any(map(is_fused, model.modules()))
        return {"numbers": numbers, "is_stock": is_stock} | found

    pairs = {"stock": (None, None), "then stock": ({}, None), "twice": ({}, {}), "then stream": (TILED, STREAM)}
    return {
        f"ZeRO-{stage}, {'destroyed' if is_destroyed else 'alive'}": {
            name: run(stage, pair, is_destroyed) for name, pair in pairs.items()
        }
        for stage, is_destroyed in ((0, False), (2, False), (2, True))
    }


@contextmanager
def whole(engine: deepspeed.DeepSpeedEngine) -> Iterator[torch.nn.Module]:
    """As TRL has a model generate: all weights gathered once, and nothing of DeepSpeed around the layers."""
    offload = engine.optimizer.parameter_offload
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        for hook in (*offload.forward_hooks, *offload.backward_hooks):
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        yield engine.module
        offload._register_deepspeed_module(offload.module)


@case
def whole_weights() -> dict:
    """A rank may be alone then: one generates for longer, and one has a loss of its own."""

    def run(tied: bool, block: dict | None) -> list[float]:
        engine = engine_of(model_of(tied=tied), 3, block)
        found = train(engine, mine()[:2])
        engine.eval()
        ids, labels = mine()[0]
        with torch.no_grad(), whole(engine) as model:
            made = model.generate(ids, max_new_tokens=3 * (1 + dist.get_rank()), min_new_tokens=3, do_sample=False)
            if dist.get_rank() == 0:
                found.append(model(input_ids=ids, labels=labels).loss.item())
        found.append(made[:, ids.shape[1] :][:, :3].double().mean().item())
        engine.train()
        found += train(engine, mine()[2:])
        engine.destroy()
        return found

    blocks = {"stock": None, "auto": {}, "stream": STREAM, "stationary": STATIONARY}
    return {f"tied {tied}": {name: run(tied, block) for name, block in blocks.items()} for tied in (False, True)}


@case
def copied_models() -> dict:
    """Copies of a ZeRO-3 engine's model: an average of its weights, and one that computes by itself."""

    def run(build: Callable[[], torch.nn.Module], block: dict | None) -> dict:
        model = build()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        engine = engine_of(model, 3, block)
        numbers = train(engine, mine()[:1])
        weights = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(weights):
            average = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for batch in mine()[1:3]:
            numbers += train(engine, [batch])
            with deepspeed.zero.GatheredParameters(weights):
                average.update_parameters(engine.module)
        # DeepSpeed's hooks, which a copy has as well, know no weights but an engine's
        with whole(engine) as model:
            twin = copy.deepcopy(model)
        numbers += train(engine, mine()[3:])
        engine.destroy()

        twin.load_state_dict(average.module.state_dict())
        ids, labels = mine()[0]
        n_fused = sum(map(is_fused, twin.modules()))
        for _ in ("as it was copied", "restored"):
            output = twin(input_ids=ids, labels=labels)
            output.loss.backward()
            grads = [p.grad for p in twin.parameters() if p.grad is not None]
            numbers += [output.loss.item(), output.logits.float().square().mean().item()]
            numbers += [len(grads), sum(grad.abs().sum().item() for grad in grads)]
            made = twin.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            numbers.append(made[:, ids.shape[1] :].double().mean().item())
            twin.zero_grad()
            ds_fused.restore(twin)
        is_stock = not any(map(is_fused, twin.modules()))
        return {"numbers": numbers, "n_fused": n_fused, "is_stock": is_stock, "left": marks(twin)}

    blocks = {
        "stock": None,
        "auto": {},
        "stream": STREAM | {"embedding": True},
        "leafs": TILED | {"leaf_modules": True},
        "small": {"profile": "small"},
    }
    return {name: {key: run(build, block) for key, block in blocks.items()} for name, build in BUILDS.items()}


@case
def padded_logits() -> dict:
    """An evaluation that pads logits as Accelerate does: of two tensors, each read where a batch is shorter."""

    def padded(logits: torch.Tensor) -> torch.Tensor:
        assert not logits.is_nested
        lengths = [torch.zeros(1) for _ in range(dist.get_world_size())]
        dist.all_gather(lengths, torch.full((1,), float(logits.shape[1])))
        longest = int(max(lengths))
        if logits.shape[1] == longest:
            return logits
        wide = logits.new_zeros((len(logits), longest, logits.shape[2]))
        wide[:, : logits.shape[1]] = logits
        return wide

    def run(block: dict | None) -> list[float]:
        engine = engine_of(model_of(), 3, block)
        engine.eval()
        found = []
        for turn, (ids, labels) in enumerate(mine()):
            # the rank with the longest batch goes on to the other tensor
            length = ids.shape[1] - (turn + dist.get_rank()) % 2
            with torch.no_grad():
                output = engine(input_ids=ids[:, :length], labels=labels[:, :length], output_hidden_states=True)
            for values in (output.logits, output.hidden_states[-1]):
                mean = padded(values).float().mean()
                dist.all_reduce(mean)
                found.append(mean.item())
        engine.destroy()
        return found

    return {name: run(block) for name, block in {"stock": None, "auto": {}, "stream": STREAM}.items()}


@case
def logits_after_a_step() -> dict:
    """How many warnings there are of logits that are those of a new weight."""

    class Heard(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    def run(block: dict, steps: bool) -> int:
        engine = engine_of(model_of(), 3, block)
        ids, labels = mine()[0]
        output = engine(input_ids=ids, labels=labels)
        engine.backward(output.loss)
        if steps:
            engine.step()
        heard.clear()
        assert output.logits.float().isfinite().all()
        engine.destroy()
        return sum("after the head's weight changed" in line for line in heard)

    heard: list[str] = []
    handler = Heard()
    logging.getLogger("ds_fused").addHandler(handler)
    try:
        blocks = {"gather": {"fused_linear_cross_entropy": {"mode": "gather"}}, "stream": STREAM}
        return {name: [run(block, steps) for steps in (False, True)] for name, block in blocks.items()}
    finally:
        logging.getLogger("ds_fused").removeHandler(handler)


@case
def masked() -> dict:
    """Masked language models, whose heads lie within a layer of their own."""
    vocab, length = jobs.config_of(False).vocab_size, products.LENGTH
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    families = {
        "bert": (BertForMaskedLM, BertConfig),
        "roberta": (RobertaForMaskedLM, RobertaConfig),
        "modernbert": (ModernBertForMaskedLM, ModernBertConfig),
    }

    def build(name: str) -> torch.nn.Module:
        torch.manual_seed(5)
        of, config = families[name]
        more = {} if name == "modernbert" else plain
        return of(config(vocab_size=vocab, pad_token_id=0, max_position_embeddings=2 * length, **sizes, **more))

    return {
        f"{name}, {mode}": both(lambda name=name: build(name), stage=3, block=block)
        for name in families
        for mode, block in {"auto": {}, "stream": STREAM, "stationary": STATIONARY}.items()
    }


@case
def two_forwards() -> dict:
    """One backward of two forwards, in buckets that are sent in between: each MLP in tiles has one gradient."""

    def run(stage: int, bucket: int, block: dict | None) -> list[float]:
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": bucket}
        engine = engine_of(model_of(), stage, block, zero_optimization=zero)
        found = []
        for first, second in zip(mine()[:2], mine()[2:], strict=True):
            losses = [engine(input_ids=ids, labels=labels).loss for ids, labels in (first, second)]
            engine.backward(losses[0] + 0.5 * losses[1])
            engine.step()
            found += [loss.item() for loss in losses]
        engine.destroy()
        return found

    return {
        f"ZeRO-{stage}, {bucket}": {
            name: run(stage, bucket, block) for name, block in (("stock", None), ("fused", TILED))
        }
        for stage in (2, 3)
        for bucket in (100, 10**8)
    }


@case
def weight_hooks() -> dict:
    """The script has only the last words of the head trained: a hook masks its weight's gradient."""

    def run(tied: bool, block: dict | None, when: str) -> dict:
        model = model_of(tied=tied)
        head = model.get_output_embeddings().weight
        calls = []

        def mask(gradient: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            return gradient.index_fill(0, torch.arange(20), 0)

        if when == "before":
            head.register_hook(mask)
        engine = engine_of(model, 3, block)
        if when == "after":
            head.register_hook(mask)
        before = safe_get_full_fp32_param(head).clone()
        try:
            losses = train(engine, mine())
            moved = (safe_get_full_fp32_param(head) - before).abs()[:20].max().item()
        except RuntimeError as error:
            return {"error": str(error)}
        finally:
            engine.destroy()
        return {"losses": losses, "calls": len(calls), "moved": moved}

    return {
        f"tied {tied}, {name}, {when}": {"stock": run(tied, None, when), "ours": run(tied, block, when)}
        for tied, name, block in (
            (False, "stream", STREAM),
            (False, "stationary", STATIONARY),
            (False, "gather", {"fused_linear_cross_entropy": {"mode": "gather"}}),
            (True, "auto", {}),
        )
        for when in ("before", "after")
    }
