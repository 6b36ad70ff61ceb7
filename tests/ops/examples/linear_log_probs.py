"""Examples of linear_log_probs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, OneOfTwo, ids_of, leaf


def compiled() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for options in ({}, {"softcap": 30.0, "temperature": 0.7}):
        sum(ops.linear_log_probs(leaf(2, 8), leaf(32000, 8), labels, entropy=True, **options)).sum().backward()
    ops.linear_log_probs(leaf(2, 8), leaf(50257, 8), labels).sum().backward()
    ops.linear_log_probs(leaf(2, 8).detach(), OneOfTwo(), labels, entropy=True)


def traced() -> Iterator[Case]:
    both = partial(ops.linear_log_probs, entropy=True, temperature=0.7)
    yield both, [(leaf(n, 8), leaf(1024, 8), ids_of(n)) for n in (3, 4, 5)]
    recomputed = partial(ops.linear_log_probs, keep_mb=0, softcap=30.0)
    yield recomputed, [(leaf(n, 8), leaf(1024, 8), ids_of(n)) for n in (3, 4)]
