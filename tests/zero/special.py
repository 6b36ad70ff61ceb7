"""What the cases of special_ranks.py share: models, engines, batches, steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from cases import Cases
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from ds_fused.modules.loss import meeting

Batch = tuple[torch.Tensor, torch.Tensor]  # ids and labels, [ROWS, LENGTH]

CASES = case = Cases()


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


def engine_by_json(
    model: torch.nn.Module, block: dict | None, optimizer: str, reduce_scatter: bool = True, **more: object
) -> deepspeed.DeepSpeedEngine:
    """ZeRO-3 with an optimizer that DeepSpeed makes."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_scatter": reduce_scatter}
    params: dict[str, object] = {"lr": products.LEARNING_RATE["adamw"]}
    if optimizer == "AdamW":
        # DeepSpeed's own would be compiled, two minutes of processor time
        params["torch_adam"] = True
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        "optimizer": {"type": optimizer, "params": params},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
    }
    if block is not None:
        config["ds_fused"] = {"enabled": True, **block}
    return deepspeed.initialize(model=model, config=config | more)[0]


def mine(joined: bool = False, accumulation: int = 1) -> list[Batch]:
    """This rank's micro batches, step after step; joined: the same ones on every rank, as tensor parallelism wants."""
    rank = 0 if joined else dist.get_rank()
    return [micro[rank] for step in jobs.batches(accumulation, products.FEW_STEPS) for micro in step]


def my_steps(accumulation: int) -> list[list[Batch]]:
    """The same, those of each step for themselves."""
    batches = mine(accumulation=accumulation)
    return [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]


def loss_itself(output: Any) -> torch.Tensor:
    return output.loss


def there_and_back(
    engine: deepspeed.DeepSpeedEngine,
    batch: Batch,
    loss_of: Callable[[Any], torch.Tensor] = loss_itself,
    backward: Callable[[torch.Tensor], object] | None = None,
    **inputs: object,
) -> float:
    """Forward and backward of a micro batch: its loss. ``backward``: where it is not the engine's."""
    ids, labels = batch
    loss = loss_of(engine(input_ids=ids, labels=labels, **inputs))
    (backward or engine.backward)(loss)
    return loss.item()


def train(engine: deepspeed.DeepSpeedEngine, batches: list[Batch], **options: Any) -> list[float]:
    """The loss of each. ``options``: of `there_and_back`."""
    losses = []
    for batch in batches:
        losses.append(there_and_back(engine, batch, **options))
        engine.step()
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


def reading(who: Callable[[int], bool], block: dict) -> dict:
    """Train under ZeRO-3 and read the logits after each loss on the ranks that `who` names."""
    seen, errors = {"stock": [], "fused": []}, []

    def reader(name: str) -> Callable:
        def read(output: Any) -> torch.Tensor:
            if not who(dist.get_rank()):
                return output.loss
            began = time.monotonic()
            try:
                seen[name].append(output.logits.float().square().mean().item())
            except Exception as e:
                seen[name].append(None)
                errors.append([type(e).__name__, str(e), time.monotonic() - began])
            return output.loss

        return read

    stock = engine_of(model_of(), 3, None)
    losses = {"stock": train(stock, mine(), loss_of=reader("stock"))}
    stock.destroy()
    fused = engine_of(model_of(), 3, block)
    losses["fused"] = train(fused, mine(), loss_of=reader("fused"))
    fused.destroy()
    return losses | {"logits": seen, "errors": errors}


def read_by_one(block: dict) -> dict:
    before, meeting.PATIENCE_SECONDS = meeting.PATIENCE_SECONDS, 1.0
    try:
        return reading(lambda rank: rank == 1, block)
    finally:
        meeting.PATIENCE_SECONDS = before


@contextmanager
def shared_folder() -> Iterator[Path]:
    """One folder for all ranks, gone when all are done with it."""
    with tempfile.TemporaryDirectory() as mine:
        name = [mine]
        dist.broadcast_object_list(name)
        yield Path(name[0])
        dist.barrier()


# mode "stream": the head's weight comes in slabs of one row a rank, 34 of them
STREAM = {"fused_linear_cross_entropy": {"mode": "stream", "slab_mb": 0}}
STATIONARY = {"fused_linear_cross_entropy": {"mode": "stationary", "slab_mb": 0}}


@contextmanager
def streaming(**more: object) -> Iterator[None]:
    """Within it `STREAM` has these options of the head as well."""
    options = STREAM["fused_linear_cross_entropy"]
    before = dict(options)
    options.update(more)
    try:
        yield
    finally:
        options.clear()
        options.update(before)


def add_twins(name: str, twin: Callable[[Callable[[], dict]], Callable[[], dict]]) -> None:
    """Each case of mode "stream" once more, by that name and as `twin` makes it."""
    for case in list(CASES):
        if case.startswith("stream_"):
            CASES[case.replace("stream", name, 1)] = twin(CASES[case])


def streamed(build: Callable[[], torch.nn.Module] = model_of, run: Callable | None = None, **more: object) -> dict:
    return both(build, stage=3, block=STREAM, run=run, **more)
