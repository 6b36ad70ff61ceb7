"""Examples of linear_cosine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, heads, ids_of, leaf


def compiled() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for v, dtype in ((32000, torch.bfloat16), (32000, torch.float32), (50257, torch.bfloat16)):
        student, teacher = ((leaf(2, h, dtype=dtype), leaf(v, h, dtype=dtype)) for h in (8, 16))
        ops.linear_cosine(*student, *(t.detach() for t in teacher), labels).backward()
    ops.linear_cosine(*student, *(t.detach() for t in teacher)).backward()


def traced() -> Iterator[Case]:
    yield ops.linear_cosine, [(*heads(n), ids_of(n)) for n in (3, 4, 5)]
    yield partial(ops.linear_cosine, keep_mb=0, reduction="sum"), [heads(n) for n in (3, 4)]
