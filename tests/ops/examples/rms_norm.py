"""Examples of rms_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    half, full = torch.bfloat16, torch.float32
    for n, d, x_dtype, weight_dtype, cast in (
        (64, 128, half, half, "before_weight"),  # Qwen3's q_norm: many rows in a tile
        (2, 4096, half, half, "before_weight"),
        (2, 4096, half, full, "after_weight"),
        (64, 576, half, half, "before_weight"),  # rows in five blocks
        (2, 5120, full, full, "before_weight"),
        (2, 10240, full, full, "before_weight"),
        (2, 16384, full, full, "before_weight"),  # the widest whole row of the backward
        (2, 32768, half, half, "after_weight"),  # the widest of the forward; walked backward
        (2, 65536, half, half, "before_weight"),
    ):
        x, weight = leaf(n, d, dtype=x_dtype), leaf(d, dtype=weight_dtype)
        ops.rms_norm(x, weight, cast=cast, offset=float(cast == "after_weight")).sum().backward()
    ops.rms_norm(leaf(2, 4096), None).sum().backward()
    for d in (4096, 5120, 8192, 65536):  # 8192: the widest whole row of a backward with dbias
        ops.rms_norm(leaf(2, d), leaf(d), bias=leaf(d)).sum().backward()


def traced() -> Iterator[Case]:
    # a whole row, one that is walked backward, one that is walked
    widths = (257, 20480, 40960)
    for first, second in ((a, b) for a in widths for b in widths if a != b):
        yield ops.rms_norm, [(leaf(65, d), leaf(d)) for d in (first, second)]
    # of the last ones programs share rows of partial sums
    yield ops.rms_norm, [(leaf(n, 4096), leaf(4096)) for n in (3, 65, 66, 8193, 8194)]
    yield lambda x: ops.rms_norm(x, None), [(leaf(2, 3, d),) for d in (64, 128)]
    yield ops.rms_norm, [(leaf(2, 3, d), leaf(d)) for d in (64, 128)]
    yield lambda x, bias: ops.rms_norm(x, None, bias=bias), [(leaf(n, 64), leaf(64)) for n in (3, 4, 5)]
    yield lambda x: ops.rms_norm(x, None, overwrite_grad=True), [(leaf(n, 64),) for n in (3, 4)]
