"""Examples of lora_linear."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for rank in (16, 64):
        adapter = leaf(rank, 4096, dtype=full), leaf(1024, rank, dtype=full)
        ops.lora_linear(leaf(2, 4096, dtype=half), leaf(1024, 4096, dtype=half), *adapter).sum().backward()


def traced() -> Iterator[Case]:
    adapted = [leaf(32, 64), leaf(4, 64), leaf(32, 4)]
    yield ops.lora_linear, [(leaf(5, n, 64), *adapted) for n in (3, 4, 5)]
    wide = [leaf(32, 64), leaf(4, 64).detach().float().requires_grad_(), leaf(32, 4).detach().float().requires_grad_()]
    yield ops.lora_linear, [(leaf(5, n, 64), *wide) for n in (3, 4, 5)]
    yield partial(ops.lora_linear, scaling=0.7), [(leaf(n, 64), *adapted, leaf(32), leaf(n, 64)) for n in (3, 4)]
