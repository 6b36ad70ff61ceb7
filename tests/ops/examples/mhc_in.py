"""Examples of mhc_in."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf, streams


def compiled() -> None:
    # what the backward of the coefficients adds to
    tensors = leaf(24, 4 * 4096), leaf(24), leaf(3)
    torch.autograd.backward([y.sum() for y in ops.mhc_in(leaf(64, 4, 4096), *tensors)])


def traced() -> Iterator[Case]:
    yield ops.mhc_in, [streams(2, t) for t in (3, 4, 5)]
