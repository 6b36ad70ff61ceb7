"""Examples of modulated_rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype, options in (
        (64, 128, half, {}),
        (2, 3072, half, {}),  # FLUX
        (2, 5120, full, {}),  # in five blocks
        (2, 8192, full, {"offset": 1.0, "cast": "after_weight"}),  # the widest whole row of the backward
        (2, 32768, half, {}),  # the widest of the forward
        (2, 65536, half, {"cast": "after_weight"}),
    ):
        for rows in (1, n):
            inputs = (
                leaf(2, n, d, dtype=dtype),
                leaf(d, dtype=dtype),
                *(leaf(2, rows, d, dtype=dtype) for _ in range(2)),
            )
            ops.modulated_rms_norm(*inputs, **options).sum().backward()
    ops.modulated_rms_norm(leaf(2, 2, 4096), None, leaf(2, 1, 4096)).sum().backward()
    ops.modulated_rms_norm(leaf(2, 2, 4096), None, leaf(2, 1, 4096, dtype=full), leaf(4096).detach()).sum().backward()


def traced() -> Iterator[Case]:
    for first, second in ((257, 40960), (40960, 257)):
        yield (
            ops.modulated_rms_norm,
            [(leaf(2, 65, d), leaf(d), leaf(2, 1, d), leaf(2, 1, d)) for d in (first, second)],
        )
    yield ops.modulated_rms_norm, [(leaf(2, n, 64), leaf(64), leaf(2, 1, 64), leaf(64)) for n in (3, 4, 5)]
    yield ops.modulated_rms_norm, [(leaf(n, 3, 64), leaf(64), leaf(n, 1, 64)) for n in (2, 3, 4)]
    yield ops.modulated_rms_norm, [(leaf(2, n, 4096), leaf(4096), leaf(2, 1, 4096)) for n in (65, 5000, 5001)]
    yield lambda x, scale: ops.modulated_rms_norm(x, None, scale), [(leaf(2, n, 64), leaf(2, n, 64)) for n in (3, 4)]
    six = [(leaf(2, 5, d), leaf(2, 1, 6 * d)) for d in (64, 128)]
    yield lambda x, six: ops.modulated_rms_norm(x, None, *six.chunk(6, -1)[:2]), six
