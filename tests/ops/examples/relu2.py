"""Examples of relu2."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import ds_fused.ops as ops
from examples.parts import Case, leaf


def compiled() -> None:
    ops.relu2(leaf(2, 4096)).sum().backward()
    ops.relu2(leaf(2, 8192)[:, :4096]).sum().backward()
    ops.relu2(leaf(2, 4096, dtype=torch.float32)).sum().backward()


def traced() -> Iterator[Case]:
    yield ops.relu2, [(leaf(5, d),) for d in (64, 128, 100)]
    yield ops.relu2, [(leaf(2, n, 64),) for n in (3, 4, 5)]
    yield lambda x: ops.relu2(x.chunk(2, -1)[0]), [(leaf(5, 2 * d),) for d in (64, 128, 100)]
