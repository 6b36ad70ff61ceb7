"""One rank of test_sweep.py: the sharded modes against stock over models, shapes and batches, on however many ranks.

    sweep_ranks.py OUT

OUT/RANK.json holds a row for each model.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import deepspeed
import products
import torch
import torch.distributed as dist
from joining import joined
from special import STATIONARY, STREAM, engine_of
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from ds_fused.engine.zero3 import slabs as zero_slabs

SIZES = {**products.SIZES, "num_hidden_layers": 1, "initializer_range": 0.3, "use_cache": False}


def llama(n_vocab: int, tied: bool = False, frozen: bool = False) -> Callable[[], torch.nn.Module]:
    def build() -> torch.nn.Module:
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": n_vocab}, tie_word_embeddings=tied))
        model.lm_head.weight.requires_grad_(not frozen)
        return model

    return build


# 67 leaves a rest over 2, 3, 4 and 5 ranks, as 50257 does; 66 none over 2 and 3, as 49152; 71 one over 5, as 151936
MODELS = {
    "split rows": llama(67),
    "whole rows": llama(66),
    "one row over": llama(71, tied=True),
    "frozen": llama(67, frozen=True),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=5.0)),
    "scale": lambda: GraniteForCausalLM(
        GraniteConfig(**SIZES, logits_scaling=3.0, embedding_multiplier=2.0, tie_word_embeddings=True)
    ),
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Another length on each rank. 0: all have labels; 1: one rank has none; 2: nobody has; 3: one has a single
    token, which predicts nothing (transformers runs no empty batch; test_zero_slabs does)."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    draw = torch.Generator().manual_seed(10 * step + rank)
    ids = torch.randint(66, (products.ROWS, 5 + 2 * rank), generator=draw)
    labels = ids.clone()
    if step == 2 or (step == 1 and rank == last):
        labels.fill_(-100)
    if step == 3 and rank == last:
        ids, labels = ids[:1, :1], labels[:1, :1]
    return ids, labels


class Counted:
    """Stands for deepspeed.comm where slabs are sent, and counts them."""

    def __init__(self) -> None:
        self.all_gather_into_tensor_, self.reduce_scatter_tensor_ = 0, 0

    def __getattr__(self, name: str) -> object:
        if name in ("all_gather_into_tensor", "reduce_scatter_tensor"):
            setattr(self, f"{name}_", getattr(self, f"{name}_") + 1)
        return getattr(deepspeed.comm, name)


def train(engine: deepspeed.DeepSpeedEngine) -> dict:
    losses, counts = [], []
    for step in range(4):
        zero_slabs.dist = counted = Counted()
        ids, labels = batch(step)
        # a sum over a number that all ranks share: a mean over no tokens would be NaN
        loss = engine(input_ids=ids, labels=labels, num_items_in_batch=20).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        counts.append([counted.all_gather_into_tensor_, counted.reduce_scatter_tensor_])
        zero_slabs.dist = deepspeed.comm
    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        weights = {name: w.detach().flatten().tolist() for name, w in params.items()}
    return {"losses": losses, "counts": counts, "weights": weights}


def main(out: Path) -> None:
    rows = {}
    for name, build in MODELS.items():
        row = rows[name] = {}
        for which, block in (("stock", None), ("stream", STREAM), ("stationary", STATIONARY)):
            torch.manual_seed(0)
            engine = engine_of(build(), 3, block)
            row[which] = train(engine) | {"report": str(getattr(engine, "ds_fused_report", None))}
            engine.destroy()
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]))
