"""Models and uses under mode "stream"; special_stationary.py has the same in the other mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from deepspeed.runtime import torch_autocast
from gloo_engines import GlooEngines
from special import STREAM, both, case, engine_of, mine, model_of, read_by_one, reading, streamed, streaming, train
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BartConfig, BartForConditionalGeneration, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput
from transformers.trainer_pt_utils import LabelSmoother

import ds_fused
from ds_fused.engine.zero3 import choice, copy_engines, slab_mode
from ds_fused.engine.zero3.figures import Rates
from ds_fused.ops.common import _tiles


def frozen(*trained: str, tied: bool = False) -> torch.nn.Module:
    """A model of which only those parameters learn whose names hold one of the words."""
    model = model_of(tied)
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(word in name for word in trained))
    return model


def copied(twin: Callable[[], dict], mode: str = "stream") -> Callable[[], dict]:
    """A case of mode "stream" in that mode, with what stands for copy engines on CPUs."""

    def run() -> dict:
        whys, engines = copy_engines.why_no_engines, slab_mode.CopyEngines
        copy_engines.why_no_engines, slab_mode.CopyEngines = lambda group: None, GlooEngines
        try:
            with streaming(mode=mode, copy_engines=True):
                return twin()
        finally:
            copy_engines.why_no_engines, slab_mode.CopyEngines = whys, engines

    return run


@case
def stream_without_copy_engines() -> dict:
    """They are asked for on CPUs."""
    head = STREAM["fused_linear_cross_entropy"] | {"copy_engines": True}
    return both(model_of, stage=3, block={"fused_linear_cross_entropy": head})


def copied_auto(rates: Rates) -> dict:
    """Mode "auto" at these rates: memory for copy engines before the first loss and after the last one."""
    head = STREAM["fused_linear_cross_entropy"] | {"mode": "auto", "copy_engines": True}

    def run(engine: deepspeed.DeepSpeedEngine) -> dict:
        slabs = vars(engine).get("_ds_fused_slab_mode")
        before = slabs and slabs.window_bytes
        losses = train(engine, mine())
        windows = [before, slabs and slabs.window_bytes]
        return {"losses": losses, "windows": windows, "report": str(getattr(engine, "ds_fused_report", ""))}

    measured = choice.measured
    choice.measured = lambda slabs, shard: rates
    try:
        return copied(partial(both, model_of, stage=3, run=run, block={"fused_linear_cross_entropy": head}))()
    finally:
        choice.measured = measured


@case
def copied_auto_stream() -> dict:
    """Products are all that takes time, the same in each mode: the one that holds the least."""
    return copied_auto(Rates(flops=1.0, memory=1e15, wire=1e15, call=0.0))


@case
def copied_auto_stationary() -> dict:
    """What is read and written beside the products is all that takes time."""
    return copied_auto(Rates(flops=1e15, memory=1.0, wire=1e15, call=0.0))


@case
def destroyed() -> dict:
    """Engine after engine with copy engines: the first is destroyed, the second collected by one rank before the other.

    "there": whose communicators are, engines being numbered. "wrapped": methods of the first one's optimizer.
    """
    groups: list[dist.ProcessGroup] = []
    found: dict = {"losses": [], "there": []}

    def made() -> deepspeed.DeepSpeedEngine:
        engine = engine_of(model_of(), 3, STREAM)
        groups.append(vars(engine)["_ds_fused_slab_mode"]._engines._group)
        found["losses"].append(train(engine, mine()[:2]))
        return engine

    def look() -> None:
        there = dist.distributed_c10d._world.pg_map
        found["there"].append([number for number, group in enumerate(groups) if group in there])

    def run() -> dict:
        first = made()
        (of_head,) = vars(first)["_ds_fused_slab_mode"]._heads.values()
        kept = of_head._slabs._windows
        windows = [weakref.ref(window) for window in (*kept._weights, *kept._gradients, *kept._received)]
        look()
        optimizer = first.optimizer
        found["wrapped"] = [["partition_grads" in vars(optimizer), "zero_grad" in vars(optimizer)]]
        first.destroy()
        first.destroy()
        found["wrapped"].append(["partition_grads" in vars(optimizer), "zero_grad" in vars(optimizer)])
        found["windows"] = [window() is None for window in windows]
        look()
        # as garbage is collected, which DeepSpeed's own references to an engine put off
        second = made()
        if dist.get_rank() == 1:
            second.__del__()
        third = made()
        look()
        if dist.get_rank() == 0:
            second.__del__()
        third.__del__()
        last = made()
        look()
        last.destroy()
        look()
        return found

    return copied(run)()


@case
def stream_frozen_trunk() -> dict:
    return streamed(lambda: frozen("lm_head"))


@case
def stream_frozen_head() -> dict:
    return streamed(lambda: frozen("layers", "norm"))


@case
def stream_unfrozen() -> dict:
    """Head and embedding, tied, frozen when the optimizer is made: that never trains them, and says nothing."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = train(engine, mine()[:1])
        engine.module.lm_head.weight.requires_grad_()
        return losses + train(engine, mine()[1:])

    return streamed(lambda: frozen("layers", "norm", tied=True), run=run)


@case
def stream_uneven_ranks() -> dict:
    """Other lengths on each rank, and one that has nothing to predict in its second step."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        batches = mine()
        if dist.get_rank() == 1:
            batches = [(ids[:, : 5 + step], labels[:, : 5 + step]) for step, (ids, labels) in enumerate(batches)]
            batches[1] = batches[1][0], torch.full_like(batches[1][1], jobs.IGNORED)
        # a sum over this number, which both ranks share: a mean over no tokens would be NaN
        return train(engine, batches, num_items_in_batch=20)

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

    def loss_of(output: Any) -> torch.Tensor:
        return output.loss + 1e-2 * output.logits.float().square().mean()

    block = {**STREAM, "logits": "keep"}
    return both(model_of, stage=3, block=block, run=lambda engine: train(engine, mine(), loss_of=loss_of))


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
def stream_accumulation_dtype() -> dict:
    """Micro steps of a model in bf16 are added up in fp32."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        assert engine.optimizer.gradient_accumulation_dtype == torch.float32
        # from the fourth step on runs in bf16 part
        return train(engine, mine(accumulation=2)[:6])

    more = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}, "gradient_accumulation_steps": 2}
    return streamed(run=run, **more)


@case
def stream_autocast() -> dict:
    try:
        return streamed(torch_autocast={"enabled": True, "dtype": "bfloat16"})
    finally:
        # DeepSpeed remembers it, and then asks no other engine what its gradients travel in
        torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


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
def stream_checkpointing() -> dict:
    def build() -> torch.nn.Module:
        model = model_of()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        return model

    return streamed(build)


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
    """Forward and backward, then evaluation, of models whose tables and logits are larger than anything else."""
    n_vocab, n_tokens = 40001, 40
    ids = torch.randint(n_vocab, (1, n_tokens), generator=torch.Generator().manual_seed(dist.get_rank()))

    def build(tied: bool) -> torch.nn.Module:
        config = jobs.config_of(tied)
        config.vocab_size = n_vocab
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
        engine.eval()
        with torch.no_grad(), Largest() as watch:
            evaluated = engine(input_ids=ids, labels=ids).loss
        return {"largest": [*largest, watch.elements], "losses": [loss.item(), evaluated.item()]}

    # tables of 5 MiB in slabs of 1
    head = {**STREAM["fused_linear_cross_entropy"], "slab_mb": 1, "chunk_mb": 1}
    block = {"fused_linear_cross_entropy": head, "embedding": True}
    before = _tiles.LEAST_SIDE, _tiles.SIDE_STEP
    _tiles.LEAST_SIDE, _tiles.SIDE_STEP = 4, 2
    try:
        out = {kind: both(partial(build, kind == "tied"), 3, run=run, block=block) for kind in ("tied", "untied")}
    finally:
        _tiles.LEAST_SIDE, _tiles.SIDE_STEP = before
    return out | {"table": n_vocab * products.SIZES["hidden_size"], "logits": n_vocab * n_tokens}


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


class Measured(LlamaForCausalLM):
    """Reads its logits without gradients before its loss and after it, which is not all that it trains on."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs: Any) -> CausalLMOutput:
        hidden = self.model(input_ids, **kwargs).last_hidden_state
        logits = self.lm_head(hidden)
        with torch.no_grad():
            self.accuracy = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()
        loss = self.loss_function(logits, labels, self.vocab_size)
        with torch.no_grad():
            self.entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return CausalLMOutput(loss=loss + 1e-2 * hidden.square().mean(), logits=logits)


@case
def stream_measured() -> dict:
    return streamed(partial(model_of, kind=Measured))


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
