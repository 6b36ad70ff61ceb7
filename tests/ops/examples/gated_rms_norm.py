"""Examples of gated_rms_norm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, dtype, options in (
        (64, 128, half, {}),  # Qwen3-Next: a norm per head
        (64, 576, half, {}),  # in five blocks
        (2, 5120, full, {"order": "gate_first"}),
        (2, 6144, full, {}),
        (2, 8192, half, {"order": "gate_first"}),  # the widest whole group of the backward
        (2, 8192, full, {"cast": "after_weight", "act": "sigmoid"}),
        (2, 7680, half, {"order": "gate_first", "group_size": 960}),
        (2, 16384, full, {"order": "gate_first", "cast": "after_weight"}),  # the widest of the forward
        (2, 65536, half, {}),
        (2, 65536, half, {"order": "gate_first", "group_size": 32768}),
    ):
        inputs = leaf(n, d, dtype=dtype), leaf(n, d, dtype=dtype), leaf(d, dtype=dtype)
        ops.gated_rms_norm(*inputs, **options).sum().backward()
    for d in (4096, 65536):
        ops.gated_rms_norm(leaf(2, d), leaf(2, d), None).sum().backward()


def traced() -> Iterator[Case]:
    for options in ({}, {"order": "gate_first", "group_size": 64}):
        norm = partial(ops.gated_rms_norm, **options)
        for widths in ((256, 40960), (40960, 256)):
            yield norm, [(leaf(65, d), leaf(65, d), leaf(d)) for d in widths]
        yield norm, [(leaf(2, n, 64), leaf(2, n, 64), leaf(64)) for n in (3, 4, 5)]
    yield lambda x, gate: ops.gated_rms_norm(x, gate, None), [(leaf(5, d).detach(), leaf(5, d)) for d in (64, 128)]
    yield lambda x: ops.gated_rms_norm(*x.chunk(2, -1), None), [(leaf(5, 2 * d),) for d in (64, 128, 100)]
