"""Examples of group_norm."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    for shape, n_groups, dtype in (
        ((2, 1280, 16, 16), 32, torch.bfloat16),
        ((64, 1024), 32, torch.bfloat16),  # several samples in a tile
        ((2, 64, 16, 16), 1, torch.float32),  # the largest whole group of the backward
        ((2, 128, 16, 16), 1, torch.float32),  # of the forward; in parts backward
        ((2, 320, 64, 64), 32, torch.bfloat16),
        ((2, 384, 14, 14), 1, torch.float32),
    ):
        vectors = (leaf(shape[1], dtype=dtype) for _ in range(2))
        ops.group_norm(leaf(*shape, dtype=dtype), n_groups, *vectors).sum().backward()
    ops.group_norm(leaf(2, 64, 8, 8), 8).sum().backward()


def traced() -> Iterator[Case]:
    def normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.group_norm(x, 8, weight, bias)

    # whole groups and groups in parts, one after the other
    for sides in ((16, 64, 128), (64, 16, 24)):
        yield normed, [(leaf(2, 80, side, side), leaf(80), leaf(80)) for side in sides]
    yield normed, [(leaf(n, c), leaf(c), leaf(c)) for n, c in ((3, 64), (4, 64), (5, 128))]
    yield lambda x: ops.group_norm(x, 8), [(leaf(n, 64, 7),) for n in (3, 4, 5)]
