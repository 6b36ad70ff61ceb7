"""Linear layers under a low-rank adapter."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.cases.case import DTYPE, Case, Inputs, randn
from benchmarks.rivals import adapters as rivals


def adapter_inputs(generator: torch.Generator, m: int, k: int, n: int, r: int, *, dtype: torch.dtype = DTYPE) -> Inputs:
    """The base's weight is frozen. ``dtype``: of the adapter."""
    x, weight, dy = (randn(generator, *shape) for shape in ((1, m, k), (n, k), (1, m, n)))
    a, b = (t.to(dtype) for t in (randn(generator, r, k, scale=k**-0.5), randn(generator, n, r, scale=r**-0.5)))
    weight *= k**-0.5
    tensors = {"x": x.requires_grad_(), "weight": weight, "a": a.requires_grad_(), "b": b.requires_grad_(), "dy": dy}
    return Inputs(tensors, ("dy",))


def _flops(m: int, k: int, n: int, r: int) -> tuple[int, int]:
    # the base's product, and that for dx; the adapter's two, and two more of each backward
    return 2 * m * (k * n + r * (k + n)), 2 * m * (2 * k * n + 3 * r * (k + n))


# Llama-3-8B's gate_proj, down_proj and q_proj, at rank 16
_SWEEP = ((8192, 4096, 14336, 16), (8192, 14336, 4096, 16), (8192, 4096, 4096, 16))

CASES = tuple(
    Case(
        "lora_linear", variant, partial(adapter_inputs, dtype=dtype), rivals.LORA_LINEAR, sweep=_SWEEP,
        launch_bound=(16, 256, 256, 8), tiny=(5, 16, 24, 3), flops=_flops, is_head=False,
    )
    # as PEFT makes it, and in the layer's dtype
    for variant, dtype in (("fp32 adapter", torch.float32), ("", DTYPE))
)  # fmt: skip
