"""Examples of neighborhood_attention."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for d, kernel_size, dtype in (
        (64, 7, half),
        (128, 255, half),
        (256, 255, half),
        (128, 7, full),
    ):
        q, k, v = (leaf(1, 300, 2, d, dtype=dtype).transpose(1, 2) for _ in range(3))
        ops.neighborhood_attention(q, k, v, kernel_size=kernel_size).sum().backward()
    ops.neighborhood_attention(q, k.detach(), v.detach(), dilation=2, border="shift").sum().backward()


def traced() -> Iterator[Case]:
    def heads_of(tokens: int, d: int, n_heads: int = 2) -> tuple[Tensor, ...]:
        return tuple(leaf(1, tokens, n_heads, d).transpose(1, 2) for _ in range(3))

    yield ops.neighborhood_attention, [heads_of(n, 64) for n in (3, 4, 5)]
    yield ops.neighborhood_attention, [heads_of(65, d) for d in (64, 128, 80)]
    yield ops.neighborhood_attention, [tuple(leaf(b, 4, 33, 64) for _ in range(3)) for b in (1, 2, 3)]
    dilated = partial(ops.neighborhood_attention, kernel_size=255, dilation=3, scale=0.5, border="shift")
    yield lambda q, k, v: dilated(q, k.detach(), v.detach()), [heads_of(n, 64) for n in (70, 71, 72)]
