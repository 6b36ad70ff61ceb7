"""Examples of glu."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from ds_fused.ops.mlp._gates import GLUForm
from ds_fused.ops.mlp.glu import glu_again
from examples.parts import Case, leaf


def compiled() -> None:
    for act in ("silu", "gelu_tanh", "gelu", "relu", "relu2"):
        ops.glu(leaf(2, 4096), leaf(2, 4096), act).sum().backward()
    ops.glu(leaf(2, 8192)).sum().backward()
    ops.glu(leaf(2, 5760), interleaved=True, alpha=1.702, limit=7.0, offset=1.0).sum().backward()  # GPT-OSS
    ops.glu(leaf(2, 4096), leaf(2, 4096), limit=10.0).sum().backward()  # DeepSeek-V4
    ops.glu(leaf(2, 4096), leaf(2, 4096).detach()).sum().backward()
    ops.glu(leaf(2, 4096, dtype=torch.float32), leaf(2, 4096, dtype=torch.float32)).sum().backward()
    for form, interleaved in ((GLUForm(), False), (GLUForm("silu", 1.702, 7.0, 1.0), True)):
        glu_again(leaf(2, 4096).detach(), leaf(2, 8192).detach(), form, interleaved)


def traced() -> Iterator[Case]:
    yield ops.glu, [(leaf(5, d), leaf(5, d)) for d in (64, 128, 100)]
    yield ops.glu, [(leaf(2, n, 64), leaf(2, n, 64)) for n in (3, 4, 5)]
    yield lambda packed: ops.glu(*packed.chunk(2, -1)), [(leaf(5, 2 * d),) for d in (64, 128, 100)]
    yield lambda packed: ops.glu(packed, act="relu2"), [(leaf(5, 2 * d),) for d in (64, 128, 100)]
    clamped = partial(ops.glu, interleaved=True, alpha=1.702, limit=7.0, offset=1.0)
    yield clamped, [(leaf(2, n, 64),) for n in (3, 4, 5)]
    yield lambda gate, up: ops.glu(gate, up.detach()), [(leaf(5, d), leaf(5, d)) for d in (64, 128)]
