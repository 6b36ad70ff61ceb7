"""Examples of linear_kl_div."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import ds_fused.ops as ops
from examples.parts import Case, heads, leaf


def compiled() -> None:
    teacher = leaf(2, 16).detach(), leaf(50257, 16).detach()
    for reverse in (False, True):
        ops.linear_kl_div(leaf(2, 8), leaf(50257, 8), *teacher, reverse=reverse, temperature=2.0).backward()


def traced() -> Iterator[Case]:
    for reverse in (False, True):
        yield partial(ops.linear_kl_div, reverse=reverse), [heads(n) for n in (3, 4)]
