"""Examples of add_rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype, cast in (
        (64, 128, half, "before_weight"),
        (2, 4096, half, "before_weight"),
        (2, 5120, full, "before_weight"),
        (2, 16384, half, "after_weight"),
        (2, 16384, full, "before_weight"),
        (2, 32768, half, "before_weight"),
        (2, 65536, half, "before_weight"),
    ):
        inputs = leaf(n, d, dtype=dtype), leaf(n, d, dtype=dtype), leaf(d, dtype=dtype)
        torch.autograd.backward([y.sum() for y in ops.add_rms_norm(*inputs, cast=cast)])
    ops.add_rms_norm(leaf(2, 4096), leaf(2, 4096, dtype=full), leaf(4096))[0].sum().backward()


def traced() -> Iterator[Case]:
    for first, second in ((257, 40960), (40960, 257)):
        yield ops.add_rms_norm, [(leaf(65, d), leaf(65, d), leaf(d)) for d in (first, second)]
    yield ops.add_rms_norm, [(leaf(2, n, 64), leaf(2, n, 64), leaf(64)) for n in (3, 4, 5)]
    yield ops.add_rms_norm, [(leaf(2, 3, d), leaf(2, 3, d), leaf(d)) for d in (64, 128)]
    yield lambda x, residual: ops.add_rms_norm(x, residual, None)[0], [(leaf(5, d), leaf(5, d)) for d in (64, 128)]
    mixed = [(leaf(n, 64), leaf(n, 64, dtype=torch.float32), leaf(64).detach()) for n in (3, 4)]
    yield ops.add_rms_norm, mixed
    yield ops.add_rms_norm, [(leaf(n, 64).detach(), leaf(n, 64).detach(), leaf(64)) for n in (3, 4)]
