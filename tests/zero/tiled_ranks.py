"""One rank of test_tiled.py: a Llama with tiled MLPs and one without train alike under every ZeRO stage.

    tiled_ranks.py OUT

OUT/RANK.json: by stage, the losses of both, how often a parameter's gradient was handed to the optimizer, and how often
each row ran through a last product of the first layer, whose tiles are counted by a hook: so it has no slices, and the
other one has, where ZeRO-3 gathers its MLP as one. Under gradient checkpointing: with nothing kept, and with all
computed again.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from deepspeed.utils import set_z3_leaf_modules, z3_leaf_module
from joining import joined
from transformers import LlamaForCausalLM

from ds_fused.engine.config import OP_OPTIONS
from ds_fused.modules.layers import summed, tiled_mlp
from ds_fused.modules.layers.tiled_mlp import TiledMLP, Tiles
from ds_fused.modules.swap import swap

TILES = 5  # of 24 rows, and of 22 on the other rank
GAS = 2


# by the JSON, with nothing else on
BLOCK = dict.fromkeys(OP_OPTIONS, False) | {"enabled": True, "swiglu": True, "tiled_mlp": {"tiles": TILES}}
# two tiles on one rank, a whole MLP on the other
LONG_TILES = BLOCK | {"tiled_mlp": {"tiles": TILES, "least_tokens": 12}}
NOTHING_KEPT = BLOCK | {"recompute": {"level": "fit", "keep_mb": 0}}


def engine_of(
    stage: int, tiled: bool, leaf: bool, block: dict | None, checkpointing: bool
) -> deepspeed.DeepSpeedEngine:
    model = LlamaForCausalLM(jobs.config_of(False))
    if checkpointing:
        model.gradient_checkpointing_enable()
    weights = jobs.first_weights(False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(weights[name])
    if tiled:
        for layer in model.model.layers:
            swap(layer.mlp, TiledMLP, fused_tiles=Tiles(TILES))
    if leaf:
        set_z3_leaf_modules(model, [type(model.model.layers[0].mlp)])
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        "gradient_accumulation_steps": GAS,
        "gradient_clipping": products.CLIP,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
    }
    if block is not None:
        config["ds_fused"] = block
    optimizer = torch.optim.SGD(model.parameters(), lr=products.LEARNING_RATE["sgd"])
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def counted(engine: deepspeed.DeepSpeedEngine) -> Counter:
    """How often a parameter arrives where ZeRO-3 puts gradients into its buckets, by name."""
    names = {p.ds_id: name for name, p in engine.module.named_parameters()}
    counts: Counter = Counter()
    stock = engine.optimizer.reduce_independent_p_g_buckets_and_remove_grads

    def reduce(param: torch.nn.Parameter) -> None:
        counts[names[param.ds_id]] += 1
        stock(param)

    engine.optimizer.reduce_independent_p_g_buckets_and_remove_grads = reduce
    return counts


@contextlib.contextmanager
def counting_sums() -> Iterator[list[torch.Size]]:
    """Shapes of the sums that products add to."""
    shapes: list[torch.Size] = []
    stock = summed.product

    def product(total: torch.Tensor, *operands: torch.Tensor, add: bool) -> None:
        shapes.append(total.shape)
        stock(total, *operands, add=add)

    summed.product = product
    try:
        yield shapes
    finally:
        summed.product = stock


@contextlib.contextmanager
def counting_slices() -> Iterator[list[int]]:
    """Of each backward that went by slices, in how many tiles it might have gone."""
    ran: list[int] = []
    stock = tiled_mlp.sliced_gradients

    def sliced_gradients(linears, x, dy, tiles, wants_dx):
        ran.append(tiles)
        return stock(linears, x, dy, tiles, wants_dx)

    tiled_mlp.sliced_gradients = sliced_gradients
    try:
        yield ran
    finally:
        tiled_mlp.sliced_gradients = stock


def train(stage: int, tiled: bool, leaf: bool = False, block: dict | None = None, checkpointing: bool = False) -> dict:
    engine = engine_of(stage, tiled, leaf, block, checkpointing)
    mlp = engine.module.model.layers[0].mlp
    made: list[int] = []
    mlp.down_proj.register_forward_hook(lambda module, args, y: made.append(y.shape[:-1].numel()))
    runs = []
    counts = counted(engine) if stage == 3 else Counter()
    losses = []
    with counting_slices() as slices:
        for step in jobs.batches(GAS, products.FEW_STEPS):
            for micro_batch in step:
                ids, labels = micro_batch[dist.get_rank()]
                if dist.get_rank() == 1:
                    ids, labels = ids[:, 1:], labels[:, 1:]
                made.clear()
                loss = engine(input_ids=ids, labels=labels).loss
                engine.backward(loss)
                runs.append(sum(made) / ids.numel())
                engine.step()
                losses.append(loss.item())
    found = {
        "losses": losses,
        "runs": runs,
        "sliced": len(slices),
        "counts": counts,
        "leaf": z3_leaf_module(mlp),
        "tiles": getattr(mlp, "fused_tiles", None),
    }
    engine.destroy()
    return found


def main(out: Path) -> None:
    found = {stage: {"stock": train(stage, False), "tiled": train(stage, True)} for stage in (3, 2)}
    found[3] |= {"leaf": train(3, True, leaf=True), "json": train(3, False, block=BLOCK)}
    found[3]["long_tiles"] = train(3, False, block=LONG_TILES)
    for way, block in {"again": BLOCK, "nothing_kept": NOTHING_KEPT}.items():
        with counting_sums() as shapes:
            found[3][way] = train(3, False, block=block, checkpointing=True)
        found[3][way]["sums"] = len(shapes)
    found[2]["nothing_kept"] = train(2, False, block=NOTHING_KEPT, checkpointing=True)
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]))
