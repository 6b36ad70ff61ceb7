"""The embedding of a vocabulary."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.cases.case import SIZE, Case, Inputs, randn
from benchmarks.rivals import embedding as rivals


def embedding_inputs(generator: torch.Generator, n: int, h: int, n_vocab: int) -> Inputs:
    # words are not equally frequent: the cube of a uniform number has one in ten tokens among a thousandth of the words
    ids = torch.rand(n, generator=generator, device=generator.device).pow(3).mul(n_vocab).long().clamp_max(n_vocab - 1)
    weight = nn.Parameter(randn(generator, n_vocab, h))
    return Inputs({"ids": ids, "weight": weight, "dy": randn(generator, n, h)}, ("dy",))


def _embedding_bytes(n: int, h: int, n_vocab: int) -> tuple[int, int]:
    # rows of the weight -> y; dy -> dweight, which is whole
    return SIZE * 2 * n * h, SIZE * (3 * n * h + n_vocab * h)


CASES = (
    Case(
        "embedding", "", embedding_inputs, rivals.EMBEDDING,
        sweep=((16384, 4096, 128256), (32768, 576, 49152)),
        launch_bound=(16, 1024, 1000), tiny=(300, 48, 96), bytes=_embedding_bytes,
    ),
)  # fmt: skip
