"""Examples of layer_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, x_dtype, weight_dtype in (
        (64, 128, half, half),  # many rows in a tile
        (2, 768, half, full),
        (64, 576, half, half),  # in five blocks
        (2, 5120, full, full),
        (2, 8192, full, full),
        (2, 10240, half, half),  # the widest whole row of the backward
        (2, 10240, full, full),
        (2, 32768, half, half),  # the widest of the forward; walked backward
        (2, 32768, full, full),
        (2, 65536, half, half),
    ):
        vectors = (leaf(d, dtype=weight_dtype) for _ in range(2))
        ops.layer_norm(leaf(n, d, dtype=x_dtype), *vectors).sum().backward()
    ops.layer_norm(leaf(2, 4096), None).sum().backward()


def traced() -> Iterator[Case]:
    # a whole row, one that is walked backward, one that is walked
    widths = (257, 20480, 40960)
    for first, second in ((a, b) for a in widths for b in widths if a != b):
        yield ops.layer_norm, [(leaf(65, d), leaf(d), leaf(d)) for d in (first, second)]
    yield ops.layer_norm, [(leaf(n, 4096), leaf(4096), leaf(4096)) for n in (3, 65, 66, 8193, 8194)]
    yield lambda x: ops.layer_norm(x, None), [(leaf(2, 3, d),) for d in (64, 128)]
