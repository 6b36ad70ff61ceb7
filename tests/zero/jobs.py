"""What a case is made of: the model, its first weights and its batches, the same on every rank and in the judge."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from products import LEARNING_RATE, LENGTH, RANKS, ROWS, SIZES, STEPS
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

IGNORED = -100


def config_of(tied: bool) -> LlamaConfig:
    # 0.3: at the usual 0.02 so small a model's logits are all but zero, and no error in its layers would show
    return LlamaConfig(**SIZES, tie_word_embeddings=tied, initializer_range=0.3, use_cache=False)


def first_weights(tied: bool) -> dict[str, Tensor]:
    """Every value is exact in bf16, so that runs of all dtypes begin at one point."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config_of(tied))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
    return {name: w.detach().bfloat16().float() for name, w in model.named_parameters()}


def batches(accumulation: int, n_steps: int = STEPS) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """[step][micro batch][rank] -> ids, labels [ROWS, LENGTH]. Some labels are ignored, on each rank another number."""
    draw = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor]:
        ids = torch.randint(SIZES["vocab_size"], (ROWS, LENGTH), generator=draw)
        ignored = torch.rand(ROWS, LENGTH, generator=draw) < 0.2
        return ids, ids.masked_fill(ignored, IGNORED)

    return [[[batch() for _ in range(max(RANKS.values()))] for _ in range(accumulation)] for _ in range(n_steps)]


def optimizer_of(name: str, weights: Iterable[Tensor]) -> torch.optim.Optimizer:
    lr = LEARNING_RATE[name]
    if name == "adamw":
        # At the usual eps of 1e-8 it makes a whole step out of the noise in a gradient near 0, stock as well as others.
        # At 1e-5 a few such gradients still are most of a run's distance from the judge: over 20 sets of batches that
        # of an embedding was 0.4 to 2.6 times as large in one run as in another, and at 1e-4 it is 0.6 to 1.2 times
        return torch.optim.AdamW(weights, lr=lr, eps=1e-4)
    return torch.optim.SGD(weights, lr=lr, momentum=0.9 if name == "momentum" else 0.0)
