"""Examples of mhc_coefficients."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf, streams


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for t, n, c, dtype, weight_dtype in (
        (64, 4, 4096, half, half),  # the largest tiles
        (64, 4, 4096, half, full),
        (64, 4, 1024, torch.float16, torch.float16),
        (64, 4, 1024, full, full),
        (16, 2, 1024, half, half),  # a thread has one number of a token's matrix
    ):
        m = n * (n + 2)
        tensors = leaf(m, n * c, dtype=weight_dtype), leaf(m, dtype=full), leaf(3, dtype=full)
        outputs = ops.mhc_coefficients(leaf(t, n, c, dtype=dtype), *tensors)
        torch.autograd.backward([y.sum() for y in outputs])


def traced() -> Iterator[Case]:
    yield ops.mhc_coefficients, [streams(2, t) for t in (3, 4, 5)]
    yield ops.mhc_coefficients, [streams(t, c=c) for t, c in ((64, 16), (64, 32), (200, 32))]
    yield (
        lambda x, phi, *more: ops.mhc_coefficients(x.transpose(0, 1), phi.T, *more)[2],
        [(x.detach(), leaf(64, 24), bias, scale) for x, _, bias, scale in (streams(2, t) for t in (3, 4))],
    )
