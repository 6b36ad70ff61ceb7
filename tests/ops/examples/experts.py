"""Examples of experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for t, h, i, dtype, options in (
        (64, 2048, 768, half, {}),  # Qwen3-30B-A3B
        (512, 2048, 768, half, {"act": "gelu_tanh"}),
        (512, 2880, 2880, half, {"interleaved": True, "alpha": 1.702, "limit": 7.0, "offset": 1.0}),  # GPT-OSS
        (512, 100, 36, half, {}),
        (2048, 2048, 768, half, {}),  # in tiles that are copied, where the target can
        (64, 2048, 768, full, {}),
    ):
        weights = leaf(2, 2 * i, h, dtype=dtype), leaf(2, h, i, dtype=dtype)
        ids = torch.zeros(t, 1, dtype=torch.int64)
        ops.experts(leaf(t, h, dtype=dtype), *weights, ids, leaf(t, 1, dtype=dtype), **options).sum().backward()
    frozen = [weight.detach() for weight in weights]
    ops.experts(leaf(t, h, dtype=full), *frozen, ids, leaf(t, 1).detach()).sum().backward()


def traced() -> Iterator[Case]:
    def routed(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor) -> Tensor:
        ids = torch.zeros(weights.shape, dtype=torch.int64)
        return ops.experts(x, gate_up, down, ids, weights, limit=7.0)

    for tokens, sizes in (((3, 4, 5), ((64, 48),)), ((70,), ((64, 48), (128, 32), (33, 7)))):
        yield (
            routed,
            [(leaf(n, h), leaf(3, 2 * i, h), leaf(3, h, i), leaf(n, 2)) for n in tokens for h, i in sizes],
        )
    # so many that tiles are copied
    yield routed, [(leaf(n, 2048), leaf(3, 1536, 2048), leaf(3, 2048, 768), leaf(n, 2)) for n in (700, 701, 702)]
    yield routed, [(leaf(n, 2, 64), leaf(3, 96, 64).detach(), leaf(3, 64, 48), leaf(n, 2, 2)) for n in (3, 4)]
