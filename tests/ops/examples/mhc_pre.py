"""Examples of mhc_pre."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    for n, c, dtype in ((4, 4096, torch.bfloat16), (4, 4096, torch.float32), (8, 1024, torch.bfloat16)):
        ops.mhc_pre(leaf(2, n, c, dtype=dtype), leaf(2, n, dtype=torch.float32)).sum().backward()


def traced() -> Iterator[Case]:
    yield ops.mhc_pre, [(leaf(2, t, 4, c), leaf(2, t, 4)) for t, c in ((3, 16), (4, 16), (4, 32))]
