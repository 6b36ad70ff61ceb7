"""Examples of jsd."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, ids_of, leaf, pairs


def compiled() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for beta in (0.0, 0.5):
        for dtype in (torch.bfloat16, torch.float32):
            ops.jsd(leaf(2, 128256, dtype=dtype), leaf(2, 128256, dtype=dtype), beta=beta).backward()
        ops.jsd(leaf(2, 50257), leaf(2, 50257).detach(), labels, beta=beta, temperature=2.0).backward()


def traced() -> Iterator[Case]:
    for beta in (0.0, 0.5):
        call = partial(ops.jsd, beta=beta)
        yield call, [pairs(5, n_vocab) for n_vocab in (1024, 32000)]
        yield call, [(*pairs(n, 1024), ids_of(n)) for n in (3, 4, 5)]
    yield partial(ops.jsd, reduction="none", temperature=2.0), [(leaf(n, 8), torch.ones(n, 8)) for n in (3, 4)]
