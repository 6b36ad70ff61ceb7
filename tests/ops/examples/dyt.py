"""Examples of dyt."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    for n, d, dtype in ((64, 128, torch.bfloat16), (2, 4096, torch.bfloat16), (2, 4096, torch.float32)):
        ops.dyt(
            leaf(n, d, dtype=dtype), leaf(1, dtype=dtype), leaf(d, dtype=dtype), leaf(d, dtype=dtype)
        ).sum().backward()


def traced() -> Iterator[Case]:
    for sizes in (((5, 64), (5, 128), (5, 100)), ((3, 4096), (4, 4096), (4, 257))):
        yield ops.dyt, [(leaf(n, d), leaf(1), leaf(d), leaf(d)) for n, d in sizes]
    yield ops.dyt, [(leaf(2, 3, d), leaf(1), leaf(d)) for d in (64, 128)]
