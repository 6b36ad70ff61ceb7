"""Examples of add_layer_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    for d, dtype in (
        (768, torch.bfloat16),
        (5120, torch.float32),
        (8192, torch.float32),
        (10240, torch.bfloat16),
        (10240, torch.float32),
        (32768, torch.bfloat16),
        (65536, torch.bfloat16),
    ):
        x, residual = leaf(2, d, dtype=dtype), leaf(2, d, dtype=dtype)
        outputs = ops.add_layer_norm(x, residual, leaf(d, dtype=dtype), leaf(d, dtype=dtype))
        torch.autograd.backward([y.sum() for y in outputs])


def traced() -> Iterator[Case]:
    yield ops.add_layer_norm, [(leaf(65, d), leaf(65, d), leaf(d), leaf(d)) for d in (257, 20480, 40960)]
    yield ops.add_layer_norm, [(leaf(2, n, 64), leaf(2, n, 64), leaf(64)) for n in (3, 4, 5)]
    yield ops.add_layer_norm, [(leaf(5, 64).detach(), leaf(5, 64).detach(), leaf(64))]
    yield lambda *inputs: ops.add_layer_norm(*inputs)[0], [(leaf(5, 64), leaf(5, 64), leaf(64))]
