"""Gated linear units."""

from __future__ import annotations

import torch

from benchmarks.cases.case import SIZE, Case, Inputs, randn
from benchmarks.rivals import gates as rivals


def glu_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    gate, up, dy = (randn(generator, n, d) for _ in range(3))
    return Inputs({"gate": gate.requires_grad_(), "up": up.requires_grad_(), "dy": dy}, ("dy",))


def packed_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    # of GPT-OSS's size of values, of which the clamp takes some
    gate_up, dy = randn(generator, n, 2 * d, scale=3.0), randn(generator, n, d)
    return Inputs({"gate_up": gate_up.requires_grad_(), "dy": dy}, ("dy",))


def _glu_bytes(n: int, d: int) -> tuple[int, int]:
    # gate, up -> y; gate, up, dy -> dgate, dup
    return SIZE * 3 * n * d, SIZE * 8 * n * d


CASES = (
    Case(
        "glu", "silu", glu_inputs, rivals.glu_providers("silu"),
        sweep=((16384, 28672), (8192, 14336)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "gelu_tanh", glu_inputs, rivals.glu_providers("gelu_tanh"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "gelu", glu_inputs, rivals.glu_providers("gelu"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "relu", glu_inputs, rivals.glu_providers("relu"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "relu2", glu_inputs, rivals.glu_providers("relu2"),
        sweep=((16384, 14336),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    # Phi-3-mini and GLM-4-9B; GPT-OSS, four of whose 2880-wide experts a token meets
    Case(
        "glu", "packed", packed_inputs, rivals.PACKED_GLU,
        sweep=((8192, 8192), (8192, 13696)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
    Case(
        "glu", "gpt_oss", packed_inputs, rivals.GPT_OSS_GLU,
        sweep=((32768, 2880),), launch_bound=(16, 1024), tiny=(5, 48), bytes=_glu_bytes,
    ),
)  # fmt: skip
