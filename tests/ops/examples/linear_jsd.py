"""Examples of linear_jsd."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, heads, ids_of, leaf


def compiled() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        student, teacher = ((leaf(2, h, dtype=dtype), leaf(32000, h, dtype=dtype)) for h in (8, 16))
        ops.linear_jsd(*student, *(t.detach() for t in teacher), labels).backward()


def traced() -> Iterator[Case]:
    yield ops.linear_jsd, [(*heads(n), ids_of(n)) for n in (3, 4, 5)]
    yield ops.linear_jsd, [heads(5, d) for d in (8, 16)]
    yield partial(ops.linear_jsd, keep_mb=0, reduction="sum", beta=0.1), [(*heads(n), ids_of(n)) for n in (3, 4)]
