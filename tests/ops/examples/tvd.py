"""Examples of tvd."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, ids_of, leaf, pairs


def compiled() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        ops.tvd(leaf(2, 128256, dtype=dtype), leaf(2, 128256, dtype=dtype)).backward()
    ops.tvd(leaf(2, 50257), leaf(2, 50257).detach(), labels, temperature=2.0).backward()


def traced() -> Iterator[Case]:
    yield ops.tvd, [pairs(5, n_vocab) for n_vocab in (1024, 32000)]
    yield ops.tvd, [(*pairs(n, 1024), ids_of(n)) for n in (3, 4, 5)]
