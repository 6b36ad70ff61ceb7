"""One rank of test_soak.py: a thousand steps of a small model under ZeRO-3, batches of other lengths on each rank.

    soak_ranks.py OUT MODE...

OUT/MODE.RANK.json holds {"losses", "labels", "early", "late", "head"}: of each step the sum of losses and the number of
labels; a mode is that of the head's weight, or what copy engines move in it (products.BY_COPY_ENGINES).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from joining import joined
from products import BY_COPY_ENGINES
from ranks import head
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, EARLY = 1000, 100
# by which each step's sum is divided
ITEMS = 1000
# odd: rows are split between ranks
VOCAB = 32003
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


def config_of(mode: str) -> dict:
    in_mode = BY_COPY_ENGINES.get(mode, mode)
    head = {"mode": in_mode, "copy_engines": in_mode != mode}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        # prefetch and buckets as they are by default, but no weight small enough to stay
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "steps_per_print": STEPS + 1,
        "ds_fused": {
            "enabled": True,
            "fused_linear_cross_entropy": head | {"slab_mb": 8, "chunk_mb": 16},
        },
    }


def batch(draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Words as frequent as in a text, so that there is something to learn; now and then none of them has a label."""
    rows, length = int(torch.randint(1, 4, (), generator=draw)), int(torch.randint(16, 700, (), generator=draw))
    ids = (VOCAB * torch.rand(rows, length, generator=draw) ** 6).long()
    labels = ids.masked_fill(torch.rand(rows, length, generator=draw) < torch.rand((), generator=draw), -100)
    return ids, labels.fill_(-100) if torch.rand((), generator=draw) < 0.05 else labels


def train(mode: str) -> dict:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, use_cache=False))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config_of(mode))
    accelerator = get_accelerator()
    draw = torch.Generator().manual_seed(1 + dist.get_rank())
    losses, labelled, allocated, began = [], [], {}, time.monotonic()
    for step in range(1, STEPS + 1):
        ids, labels = batch(draw)
        # on the CPU: the host waits for no GPU. The first word of a row is nobody's next one
        labelled.append(int((labels[:, 1:] != -100).sum()))
        ids, labels = ids.to(engine.device), labels.to(engine.device)
        loss = engine(input_ids=ids, labels=labels, num_items_in_batch=ITEMS).loss
        engine.backward(loss)
        engine.step()
        # read at the end: the host is to run ahead, as in a real job
        losses.append(loss.detach())
        if step % EARLY == 0 and dist.get_rank() == 0:
            # where a run hangs, this says how far it came
            print(f"{mode}: step {step} after {time.monotonic() - began:.0f} s", flush=True)
        if step in (EARLY, STEPS):
            accelerator.synchronize()
            allocated[step] = accelerator.memory_allocated() - 512 * len(losses)
    sums = (ITEMS * torch.stack(losses)).tolist()
    told = {"losses": sums, "labels": labelled, "early": allocated[EARLY], "late": allocated[STEPS]}
    told["head"] = head(engine)
    engine.destroy()
    return told


def main(out: Path, modes: list[str]) -> None:
    for mode in modes:
        (out / f"{mode}.{dist.get_rank()}.json").write_text(json.dumps(train(mode)))


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]), sys.argv[2:])
