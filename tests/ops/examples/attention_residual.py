"""Examples of attention_residual."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, t, d, dtype in (
        (8, 64, 128, half),
        (4, 2, 4096, half),
        (5, 2, 4096, half),  # the least and the most that a program of the backward holds
        (8, 2, 4096, half),
        (9, 2, 4096, half),
        (8, 2, 4096, full),
        (3, 2, 16384, half),  # the widest
        (3, 2, 16384, full),
    ):
        ops.attention_residual(leaf(n, t, d, dtype=dtype), leaf(d, dtype=dtype), leaf(d, dtype=dtype)).sum().backward()
    for n in (8, 16):
        ops.attention_residual([leaf(2, 4096) for _ in range(n)], leaf(4096)).sum().backward()


def traced() -> Iterator[Case]:
    yield ops.attention_residual, [(leaf(n, 3, 64), leaf(64), leaf(64)) for n in (3, 4, 5)]
    yield ops.attention_residual, [(leaf(3, 2, t, d), leaf(d), leaf(d)) for t, d in ((3, 64), (4, 64), (4, 128))]
    # blocks that the backward holds, or not
    yield ops.attention_residual, [(leaf(n, t, 4096), leaf(4096)) for n, t in ((4, 3), (5, 3), (6, 4), (6, 5))]
    yield ops.attention_residual, [(leaf(8, 3, d), leaf(d)) for d in (2048, 3072, 4096)]
    yield lambda query, *blocks: ops.attention_residual(blocks, query), [(leaf(4096), *[leaf(2, 3, 4096)] * 8)]
    # wider than its kernels take
    yield ops.attention_residual, [(leaf(2, 3, 20480), leaf(20480))]
    for n in (1, 3, 17):
        yield lambda query, *blocks: ops.attention_residual(blocks, query), [(leaf(64), *[leaf(2, 3, 64)] * n)]
