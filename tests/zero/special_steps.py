"""Mode "stream" under other steps than forward, backward, step: accumulations, evaluation, checkpoints."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from special import (
    STREAM,
    Batch,
    both,
    case,
    engine_by_json,
    mine,
    model_of,
    my_steps,
    shared_folder,
    streamed,
    there_and_back,
    train,
)
from torch.utils.checkpoint import checkpoint
from transformers import LlamaForCausalLM


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


def evaluated(engine: deepspeed.DeepSpeedEngine, batch: Batch) -> list[float]:
    """Without gradients: the loss, and of the logits, where there are no labels, the mean square."""
    ids, labels = batch
    engine.eval()
    with torch.no_grad():
        loss = engine(input_ids=ids, labels=labels).loss.item()
        logits = engine(input_ids=ids).logits.float().square().mean().item()
    engine.train()
    return [loss, logits]


@case
def stream_direct_backward() -> dict:
    return streamed(run=lambda engine: train(engine, mine(), backward=torch.Tensor.backward))


@case
def stream_evaluation_and_saving() -> dict:
    """Evaluation between two steps, then the weights saved, trained away from and loaded again."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = train(engine, mine()[:2])
        with shared_folder() as folder:
            engine.save_checkpoint(folder, tag="here")
            after = train(engine, mine()[2:])
            between = evaluated(engine, mine()[0])
            engine.load_checkpoint(folder, tag="here")
            again = train(engine, mine()[2:])
        return [*losses, *after, *between, *again]

    return streamed(run=run)


@case
def stream_coalesced() -> dict:
    """Several backwards, one reduction: all but the head's gradients wait on their parameters until it."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for step in my_steps(3):
            with engine.coalesce_grad_reduction():
                losses += [there_and_back(engine, batch) for batch in step]
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
        for length, step in enumerate(my_steps(3)):
            losses += [there_and_back(engine, batch) for batch in step[: 1 + length % 3]]
            engine.step()
        return losses

    return tied_and_untied(run, managed_gradient_accumulation=False)


@case
def stream_direct_backward_accumulating() -> dict:
    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        return train(engine, mine(accumulation=3), backward=torch.Tensor.backward)

    return tied_and_untied(run, gradient_accumulation_steps=3)


@case
def stream_offload_accumulating() -> dict:
    """Weights and optimizer on the CPU; micro steps are added up there."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        assert engine.optimizer.offload_optimizer and engine.optimizer.offload_param
        return train(engine, mine(accumulation=3))

    offload = {"device": "cpu"}
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "offload_optimizer": offload, "offload_param": offload}
    more = {"zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "gradient_accumulation_steps": 3}
    return tied_and_untied(run, **more)


@case
def stream_thrown_away() -> dict:
    """Before each step a gradient that nobody wants."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for batches in zip(reversed(mine()), mine(), strict=True):
            for batch in batches:
                engine.optimizer.zero_grad()
                losses.append(there_and_back(engine, batch))
            engine.step()
        return losses

    return streamed(run=run)


class CheckpointedHead(LlamaForCausalLM):
    """Head and loss are run again in the backward."""

    use_reentrant = False

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        def loss_of(hidden: torch.Tensor) -> torch.Tensor:
            return self.loss_function(self.lm_head(hidden), labels, self.config.vocab_size)

        hidden = self.model(input_ids).last_hidden_state
        return SimpleNamespace(loss=checkpoint(loss_of, hidden, use_reentrant=self.use_reentrant))


class ReentrantHead(CheckpointedHead):
    use_reentrant = True


@case
def stream_checkpointed_head() -> dict:
    """Within a reentrant checkpoint as stock, which itself fails there with a tied head."""
    builds = {name: partial(model_of, name == "tied", CheckpointedHead) for name in ("untied", "tied")}
    builds["reentrant"] = partial(model_of, kind=ReentrantHead)
    return {name: streamed(build) for name, build in builds.items()}


@case
def stream_generating() -> dict:
    """Words between two steps, all ranks for as long as one of them wants more."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = train(engine, mine()[:2])
        engine.eval()
        words = engine.module.generate(mine()[0][0], max_new_tokens=4, do_sample=False, synced_gpus=True)
        engine.train()
        return [*losses, *train(engine, mine()[2:]), *words.flatten().tolist()]

    return tied_and_untied(run)


@case
def stream_evaluation_in_an_accumulation() -> dict:
    """Between two micro steps, with and without labels."""

    def run(engine: deepspeed.DeepSpeedEngine) -> list[float]:
        losses = []
        for batch in mine(accumulation=2):
            (loss,) = train(engine, [batch])
            losses += [*evaluated(engine, batch), loss]
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
