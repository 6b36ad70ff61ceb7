"""The only rank of test_smollm2.py: ten steps of SmolLM2 on Shakespeare in fp32, stock and fused.

    smollm2_rank.py MODEL TEXTS OUT

OUT (JSON) holds {"stock": losses, "fused": losses, "judge": the first loss in fp64}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import deepspeed
import fp64
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ds_fused

STEPS, ROWS, LENGTH = 10, 1, 32


def batches_of(model: str, texts: str) -> torch.Tensor:
    """[STEPS, ROWS, LENGTH] tokens from the middle of a play, where no preface stands."""
    text = sorted(Path(texts).glob("*.txt"))[0].read_text(encoding="utf-8", errors="replace")
    ids = AutoTokenizer.from_pretrained(model)(text[20_000:40_000])["input_ids"]
    return torch.tensor(ids[: STEPS * ROWS * LENGTH]).view(STEPS, ROWS, LENGTH)


def train(folder: str, batches: torch.Tensor, fused: bool) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 1.0,
        # the stages are compared on small models; with one of this size they would only cost time
        "zero_optimization": {"stage": 0},
        "ds_fused": {"enabled": fused, "strict": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for ids in batches:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.destroy()
    return losses


def first_loss_in_fp64(folder: str, ids: torch.Tensor) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    weights = {name: w.detach().double() for name, w in model.named_parameters()}
    eps, theta = model.config.rms_norm_eps, model.config.rope_parameters["rope_theta"]
    with torch.no_grad():
        return fp64.loss_of(weights, model.config.to_dict(), eps, theta, ids, ids).item()


def main(folder: str, texts: str, out: str) -> None:
    ds_fused.install()
    batches = batches_of(folder, texts)
    runs = {
        "judge": first_loss_in_fp64(folder, batches[0]),
        "stock": train(folder, batches, fused=False),
        "fused": train(folder, batches, fused=True),
    }
    Path(out).write_text(json.dumps(runs))


if __name__ == "__main__":
    main(*sys.argv[1:])
