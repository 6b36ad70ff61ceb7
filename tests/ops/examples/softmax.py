"""Examples of softmax."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, along_a_dimension, leaf


def compiled() -> None:
    for n, d, dtype in (
        (64, 128, torch.bfloat16),
        (2, 4096, torch.float16),
        (2, 16384, torch.float32),  # the widest whole row of the backward
        (2, 32768, torch.float32),  # the widest of the forward; in parts backward
        (2, 65536, torch.bfloat16),
    ):
        ops.softmax(leaf(n, d, dtype=dtype)).sum().backward()


def traced() -> Iterator[Case]:
    yield from along_a_dimension(ops.softmax)
