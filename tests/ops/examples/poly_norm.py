"""Examples of poly_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype in (
        (64, 128, half),
        (64, 576, half),  # in five blocks
        (2, 10240, full),
        (2, 14336, half),
        (2, 16384, full),  # the widest whole row of the backward
        (2, 32768, half),  # the widest of the forward
        (2, 65536, half),
    ):
        ops.poly_norm(leaf(n, d, dtype=dtype), leaf(3, dtype=full), leaf(1, dtype=full)).sum().backward()
    ops.poly_norm(leaf(2, 4096), leaf(3).detach()).sum().backward()


def traced() -> Iterator[Case]:
    for first, second in ((257, 40960), (40960, 257)):
        yield ops.poly_norm, [(leaf(65, d), leaf(3), leaf(1)) for d in (first, second)]
    yield ops.poly_norm, [(leaf(2, n, 64), leaf(3), leaf(1)) for n in (3, 4, 5)]
    yield lambda x, weight: ops.poly_norm(x, weight), [(leaf(2, 3, d), leaf(3).detach()) for d in (64, 128)]
