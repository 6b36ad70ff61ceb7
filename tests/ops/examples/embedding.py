"""Examples of embedding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, ids_of, leaf


def compiled() -> None:
    for h, dtype in ((576, torch.bfloat16), (4096, torch.float32)):
        # more than one chunk, so that there is something to join
        ops.embedding(torch.zeros(300, dtype=torch.int64), leaf(11, h, dtype=dtype), 3).sum().backward()


def traced() -> Iterator[Case]:
    yield ops.embedding, [(ids_of(n), leaf(11, 64)) for n in (3, 4, 5)]
    yield ops.embedding, [(ids_of(600), leaf(11, h)) for h in (64, 128, 2000)]
    yield partial(ops.embedding, padding_idx=-1), [(ids_of(2 * n).view(2, n), leaf(v, 64)) for n, v in ((3, 5), (4, 6))]
