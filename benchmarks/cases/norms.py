"""Other norms: of layers, of a sum, of groups, and what stands in for one."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.cases.case import (
    DTYPE,
    NORM_SWEEP,
    ODD_WIDTHS,
    ROWS_OF_WIDTHS,
    SIZE,
    Case,
    Inputs,
    pointwise_bytes,
    randn,
)
from benchmarks.rivals import norms as rivals


def layer_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = randn(generator, n, d).requires_grad_()
    weight, bias = (nn.Parameter(randn(generator, d)) for _ in range(2))
    return Inputs({"x": x, "weight": weight, "bias": bias, "dy": randn(generator, n, d)}, ("dy",))


def add_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x, residual = (randn(generator, n, d).requires_grad_() for _ in range(2))
    weight, bias = (nn.Parameter(randn(generator, d)) for _ in range(2))
    tensors = {"x": x, "residual": residual, "weight": weight, "bias": bias}
    return Inputs(tensors | {"dy": randn(generator, n, d), "dsum": randn(generator, n, d)}, ("dy", "dsum"))


def group_norm_inputs(generator: torch.Generator, n: int, c: int, h: int, w: int) -> Inputs:
    x = randn(generator, n, c, h, w).requires_grad_()
    weight, bias = (nn.Parameter(randn(generator, c)) for _ in range(2))
    return Inputs({"x": x, "weight": weight, "bias": bias, "dy": randn(generator, n, c, h, w)}, ("dy",))


def dyt_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = randn(generator, n, d).requires_grad_()
    weight, bias = (nn.Parameter(randn(generator, d)) for _ in range(2))
    alpha = nn.Parameter(torch.full((1,), 0.5, device=generator.device, dtype=DTYPE))
    # dy leans on weight * x: dalpha would be a sum that cancels otherwise, whose rounding can't be told from an error
    dy = randn(generator, n, d) + (weight * x).detach()
    return Inputs({"x": x, "alpha": alpha, "weight": weight, "bias": bias, "dy": dy}, ("dy",))


def poly_norm_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    x = randn(generator, n, d).requires_grad_()
    weight = nn.Parameter(torch.tensor([0.5, -0.25, 1.0], device=generator.device, dtype=DTYPE))
    # without a dimension, as Liger's; the gradient that it returns fits no other
    bias = nn.Parameter(torch.tensor(0.5, device=generator.device, dtype=DTYPE))
    # dy leans on x and its square, for dyt_inputs' reason: dbias and each of dweight is a number
    dy = randn(generator, n, d) + (x + x * x).detach()
    return Inputs({"x": x, "weight": weight, "bias": bias, "dy": dy}, ("dy",))


def _layer_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x -> y; x, dy -> dx; weight and bias, once forward, weight again backward, and the gradients of both
    return SIZE * (2 * n * d + 2 * d), SIZE * (5 * n * d + 5 * d)


def _add_norm_bytes(n: int, d: int) -> tuple[int, int]:
    # x, residual -> y, sum; sum, dy, dsum -> one gradient for x and residual
    return SIZE * (4 * n * d + 2 * d), SIZE * (8 * n * d + 5 * d)


def _group_norm_bytes(n: int, c: int, h: int, w: int) -> tuple[int, int]:
    return SIZE * (2 * n * c * h * w + 2 * c), SIZE * (5 * n * c * h * w + 5 * c)


# groups of 512 KiB, larger than any tile; an inner and the outer level of a UNet, 20 and 80 KiB
GROUP_NORM_SWEEP = ((16, 512, 128, 128), (16, 1280, 16, 16), (16, 320, 64, 64))
# 32 groups of 4 to 40 channels, of images of 256 pixels to 65536
GROUP_NORM_WIDTHS = (
    (16, 512, 128, 128), (16, 128, 256, 256), (16, 256, 64, 64), (32, 640, 32, 32), (32, 1280, 32, 32),
    (64, 320, 64, 64), (16, 320, 64, 64), (64, 1280, 16, 16),
)  # fmt: skip

CASES = (
    Case(
        "layer_norm", "", layer_norm_inputs, rivals.LAYER_NORM,
        sweep=(*NORM_SWEEP, *ODD_WIDTHS), launch_bound=(16, 1024), tiny=(5, 48), bytes=_layer_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    Case(
        "add_layer_norm", "", add_norm_inputs, rivals.ADD_LAYER_NORM,
        sweep=((16384, 8192), (8192, 4096), (8192, 768)), launch_bound=(16, 1024), tiny=(5, 48), bytes=_add_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    Case(
        "group_norm", f"{rivals.N_GROUPS} groups", group_norm_inputs, rivals.GROUP_NORM,
        sweep=GROUP_NORM_SWEEP, launch_bound=(2, 64, 8, 8), tiny=(2, 64, 3, 5), bytes=_group_norm_bytes,
        widths=GROUP_NORM_WIDTHS,
    ),
    Case(
        "dyt", "", dyt_inputs, rivals.DYT,
        sweep=NORM_SWEEP, launch_bound=(16, 1024), tiny=(5, 48), bytes=_layer_norm_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
    # Llama-3-8B's MLPs, and PolyCom's dense model's
    Case(
        "poly_norm", "", poly_norm_inputs, rivals.POLY_NORM,
        sweep=((16384, 14336), (16384, 8192)), launch_bound=(16, 1024), tiny=(5, 48), bytes=pointwise_bytes,
        widths=ROWS_OF_WIDTHS,
    ),
)  # fmt: skip
