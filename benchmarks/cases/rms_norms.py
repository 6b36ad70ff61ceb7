"""RMS norms: plain, with a bias, of a sum, gated, modulated."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.cases.case import NORM_SWEEP, ODD_WIDTHS, ROWS_OF_WIDTHS, SIZE, WIDTHS, Case, Inputs, randn
from benchmarks.rivals import rms_norms as rivals


def norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = randn(generator, n, d).requires_grad_()
    weight = nn.Parameter(randn(generator, d))
    return Inputs({"x": x, "weight": weight, "dy": randn(generator, n, d)}, ("dy",))


def bias_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    norm = norm_inputs(generator, n, d)
    return Inputs(norm.tensors | {"bias": nn.Parameter(randn(generator, d))}, norm.upstream)


def add_rms_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x, residual = (randn(generator, n, d).requires_grad_() for _ in range(2))
    weight = nn.Parameter(randn(generator, d))
    dy, dsum = (randn(generator, n, d) for _ in range(2))
    return Inputs({"x": x, "residual": residual, "weight": weight, "dy": dy, "dsum": dsum}, ("dy", "dsum"))


def gated_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    norm = norm_inputs(generator, n, d)
    return Inputs(norm.tensors | {"gate": randn(generator, n, d).requires_grad_()}, norm.upstream)


def modulated_norm_inputs(generator: torch.Generator, b: int, t: int, d: int) -> Inputs:
    x, dy = (randn(generator, b, t, d) for _ in range(2))
    weight = nn.Parameter(randn(generator, d))
    scale, shift = (randn(generator, b, 1, d).requires_grad_() for _ in range(2))
    return Inputs({"x": x.requires_grad_(), "weight": weight, "scale": scale, "shift": shift, "dy": dy}, ("dy",))


def _norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; the weight and its gradient, once each
    return SIZE * (2 * n * d + d), SIZE * (5 * n * d + 3 * d)


def _add_rms_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x, residual -> y, sum; dy, dsum, sum -> dx, which is both summands' gradient; the weight and its gradient
    return SIZE * (4 * n * d + d), SIZE * (8 * n * d + 3 * d)


def _gated_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x, gate -> y; x, gate, dy -> dx, dgate; the weight and its gradient
    return SIZE * (3 * n * d + d), SIZE * (8 * n * d + 3 * d)


def _modulated_norm_bytes(b: int, t: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; scale and shift, scale again, and the gradients of both; the weight and its gradient
    return SIZE * (2 * b * t * d + 2 * b * d + d), SIZE * (5 * b * t * d + 5 * b * d + 3 * d)


# 16 samples
MODULATED_WIDTHS = tuple((16, 2**23 // width, width) for width in WIDTHS)

CASES = (
    Case(
        "rms_norm", "before_weight", norm_inputs, rivals.LLAMA_NORM,
        sweep=(*NORM_SWEEP, *ODD_WIDTHS), launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    Case(
        "rms_norm", "after_weight", norm_inputs, rivals.GEMMA_NORM,
        sweep=NORM_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
    ),
    Case(
        "rms_norm", "bias", bias_norm_inputs, rivals.BIAS_NORM,
        sweep=NORM_SWEEP[:2], launch_bound=(16, 1024), tiny=(5, 48), bytes=_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    Case(
        "add_rms_norm", "", add_rms_norm_inputs, rivals.ADD_NORM,
        sweep=(*NORM_SWEEP[:2], *ODD_WIDTHS), launch_bound=(16, 1024), tiny=(5, 48), bytes=_add_rms_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    # Qwen3-Next: 8192 tokens x 32 heads; Mamba-Codestral-7B
    Case(
        "gated_rms_norm", "norm_first", gated_norm_inputs, rivals.gated_norm_providers("norm_first"),
        sweep=((1048576, 128), (262144, 128)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_gated_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    Case(
        "gated_rms_norm", "gate_first", gated_norm_inputs, rivals.gated_norm_providers("gate_first"),
        sweep=((16384, 8192), (8192, 8192)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_gated_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    # FLUX at 4096 tokens, DiT-XL at 256
    Case(
        "modulated_rms_norm", "", modulated_norm_inputs, rivals.MODULATED_NORM,
        sweep=((12, 4096, 3072), (64, 256, 1152)), launch_bound=(2, 8, 1024), tiny=(2, 5, 48),
        widths=MODULATED_WIDTHS,
        bytes=_modulated_norm_bytes,
    ),
)  # fmt: skip
