"""Examples of kl_div."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    for dtype, log_target in ((torch.bfloat16, False), (torch.float32, True)):
        for reduction in ("batchmean", "none"):
            x, t = leaf(2, 4096, dtype=dtype), leaf(2, 4096, dtype=dtype)
            ops.kl_div(x, t, log_target=log_target, reduction=reduction).sum().backward()
    ops.kl_div(leaf(2, 50257), leaf(2, 50257).detach()).backward()
    ops.kl_div(leaf(2, 8192)[:, :4096], leaf(2, 4096).detach()).backward()


def traced() -> Iterator[Case]:
    for reduction in ("batchmean", "none"):
        call = partial(ops.kl_div, reduction=reduction)
        yield call, [(leaf(5, d), leaf(5, d)) for d in (64, 128, 100)]
        yield call, [(leaf(n, 64), leaf(n, 64).detach()) for n in (3, 4, 5)]
    yield lambda both: ops.kl_div(*both.chunk(2, -1), log_target=True), [(leaf(5, 2 * d),) for d in (64, 128)]
