"""Examples of mhc_post_res."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    full = torch.float32
    for n, c, dtype in (
        (4, 4096, torch.bfloat16),
        (4, 4096, full),
        (8, 1024, torch.bfloat16),
    ):
        streams = leaf(2, n, c, dtype=dtype), leaf(2, c, dtype=dtype)
        ops.mhc_post_res(*streams, leaf(2, n, dtype=full), leaf(2, n, n, dtype=full)).sum().backward()


def traced() -> Iterator[Case]:
    yield (
        ops.mhc_post_res,
        [(leaf(2, t, 4, c), leaf(2, t, c), leaf(2, t, 4), leaf(2, t, 4, 4)) for t, c in ((3, 16), (4, 16), (4, 32))],
    )
