"""One rank of test_recompute.py: ranks that keep different parts of their layers, or the inputs of these on the host,
under ZeRO-3 with checkpointing.

    recompute_ranks.py OUT

OUT/RANK.json: by case, the losses, the gradients' norms, the collectives of the last step and the products in it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from joining import joined
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

import ds_fused
from ds_fused.engine.config import OP_OPTIONS
from ds_fused.modules.memory.recompute import Recompute

STEPS = 4
# what each rank keeps
LEVELS = {
    "stock": ("full", "full"),
    "same": ("matmuls", "matmuls"),
    "different": ("matmuls", "full"),
    "less": ("attention", {"keep_mb": 1}),
    "offload": ({"offload": True}, {"level": "attention", "offload": True}),
    "room": ({"keep_mb": 1, "offload": "auto"}, {"keep_mb": 1, "offload": "auto"}),
}
# case -> MiB that each rank has for what it keeps, past what its level says: too little for all on the second
ROOM = {"room": (1, 0)}
BLOCK = dict.fromkeys(OP_OPTIONS, False) | {"enabled": True, "recompute": {"keep_mb": 1}}


class Watching(TorchDispatchMode):
    """The collectives in their order, each with what it moves, and how many products ran."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.products = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "c10d":
            sizes = [x.numel() for x in args if isinstance(x, torch.Tensor)]
            self.collectives.append(f"{op.name()} {sizes}")
        self.products += op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return op(*args, **(kwargs or {}))


def engine_of(init: bool, recompute: object, block: dict | None, room: int | None) -> deepspeed.DeepSpeedEngine:
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        # so small a model would be gathered once, as a whole
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 5000,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 3000,
        },
        "zero_allow_untested_optimizer": True,
    }
    weights = jobs.first_weights(False)
    with deepspeed.zero.Init(config_dict_or_path=config) if init else contextlib.nullcontext():
        model = LlamaForCausalLM(jobs.config_of(False))
    for name, weight in model.named_parameters():
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0, enabled=init), torch.no_grad():
            if weight.numel():
                weight.copy_(weights[name])
    model.gradient_checkpointing_enable()
    report = ds_fused.apply(model, {}, recompute=recompute)
    if room is not None:
        report.claims[0].allotment._keep_bytes = room * 2**20
    if block is not None:
        config["ds_fused"] = block
    optimizer = torch.optim.SGD(model.parameters(), lr=products.LEARNING_RATE["sgd"])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(init: bool, recompute: object, block: dict | None = None, room: int | None = None) -> dict:
    engine = engine_of(init, recompute, block, room)
    losses, norms = [], []
    for (micro_batch,) in jobs.batches(1, STEPS):
        ids, labels = micro_batch[dist.get_rank()]
        if dist.get_rank() == 1:
            # another number of tokens
            ids, labels = ids[:, 3:], labels[:, 3:]
        with Watching() as watching:
            loss = engine(input_ids=ids, labels=labels).loss
            engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    found = {"losses": losses, "norms": norms, "collectives": watching.collectives, "products": watching.products}
    if room is not None:
        found["on_host"] = next(m for m in engine.module.modules() if isinstance(m, Recompute)).fused_allotment.on_host
    if block is not None:
        found["report"] = str(engine.ds_fused_report)
    engine.destroy()
    return found


def main(out: Path) -> None:
    rank = dist.get_rank()
    # zero.Init puts a linear of its own into torch, for good: those without it come first
    found = {
        f"{'init' if init else 'plain'} {name}": train(init, levels[rank], room=ROOM.get(name, (None, None))[rank])
        for init in (False, True)
        for name, levels in LEVELS.items()
    }
    found["init json"] = train(True, "full", BLOCK)
    (out / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]))
