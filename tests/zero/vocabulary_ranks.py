"""One rank of test_vocabularies.py: a vocabulary of a real model, tied, in the sharded modes and as stock.

    vocabulary_ranks.py OUT WORDS

OUT/RANK.json holds of each run its losses, what the report says of head and embedding, and how far the largest distance
of a weight from stock's is.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import products
import torch
import torch.distributed as dist
from joining import joined
from special import engine_of
from transformers import LlamaConfig, LlamaForCausalLM

STEPS, LENGTH = 3, 9
SIZES = {**products.SIZES, "num_hidden_layers": 1, "initializer_range": 0.1, "use_cache": False}


def batch(step: int, n_vocab: int) -> torch.Tensor:
    """Words of all parts of the vocabulary; the last ones are among them, behind which the last shard has padding."""
    draw = torch.Generator().manual_seed(10 * step + dist.get_rank())
    ids = torch.randint(n_vocab, (products.ROWS, LENGTH + dist.get_rank()), generator=draw)
    ids[0, -3:] = n_vocab - 1 - torch.arange(3)
    return ids


def train(engine: deepspeed.DeepSpeedEngine, n_vocab: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = []
    for step in range(STEPS):
        ids = batch(step, n_vocab)
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    params = dict(engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(params.values())):
        return losses, {name: w.detach().clone() for name, w in params.items()}


def main(out: Path, n_vocab: int) -> None:
    rows, stock = {}, {}
    for mode in ("stock", "stream", "stationary"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "vocab_size": n_vocab}, tie_word_embeddings=True))
        # of a table of 6 to 19 MiB
        block = None if mode == "stock" else {"fused_linear_cross_entropy": {"mode": mode, "slab_mb": 1}}
        engine = engine_of(model, 3, block)
        losses, weights = train(engine, n_vocab)
        stock = stock or weights
        apart = max((w - stock[name]).abs().max().item() for name, w in weights.items())
        report = str(getattr(engine, "ds_fused_report", None))
        rows[mode] = {"losses": losses, "apart": apart, "report": report}
        engine.destroy()
    (out / f"{dist.get_rank()}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]), int(sys.argv[2]))
