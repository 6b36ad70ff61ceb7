"""Whole MLPs, of experts too, and the activation that has no gate."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.cases.case import Case, Inputs, pointwise_bytes, randn
from benchmarks.rivals import mlps as rivals


def mlp_inputs(generator: torch.Generator, n: int, h: int, i: int) -> Inputs:
    weights = {
        f"{name}_weight": nn.Parameter(randn(generator, *shape, scale=shape[1] ** -0.5))
        for name, shape in (("gate", (i, h)), ("up", (i, h)), ("down", (h, i)))
    }
    x, dy = (randn(generator, 1, n, h) for _ in range(2))
    return Inputs({"x": x.requires_grad_(), **weights, "dy": dy}, ("dy",), by_backward=True)


def experts_inputs(generator: torch.Generator, t: int, k: int, e: int, h: int, i: int) -> Inputs:
    x, dy = (randn(generator, t, h) for _ in range(2))
    gate_up = nn.Parameter(randn(generator, e, 2 * i, h, scale=h**-0.5))
    down = nn.Parameter(randn(generator, e, h, i, scale=i**-0.5))
    # as a router's: different experts, nearly as many tokens for each
    weights, ids = randn(generator, t, e).softmax(-1).topk(k)
    tensors = {"x": x.requires_grad_(), "gate_up": gate_up, "down": down, "weights": weights.requires_grad_()}
    return Inputs(tensors | {"ids": ids, "dy": dy}, ("dy",))


def pointwise_inputs(generator: torch.Generator, n: int, d: int) -> Inputs:
    return Inputs({"x": randn(generator, n, d).requires_grad_(), "dy": randn(generator, n, d)}, ("dy",))


def _mlp_flops(n: int, h: int, i: int) -> tuple[int, int]:
    # three products, and two more of each backward
    return 6 * n * h * i, 18 * n * h * i


def _experts_flops(t: int, k: int, e: int, h: int, i: int) -> tuple[int, int]:
    return _mlp_flops(t * k, h, i)


CASES = (
    # Llama-3-8B, at 8k and 32k tokens
    Case(
        "tiled_mlp", "", mlp_inputs, rivals.TILED_MLP,
        sweep=((8192, 4096, 14336), (32768, 4096, 14336)), launch_bound=(128, 64, 128), tiny=(20, 16, 24),
        flops=_mlp_flops, is_head=False,
    ),
    # Qwen3-30B-A3B at 8k and 2k tokens, Mixtral-8x7B at 4k
    Case(
        "experts", "", experts_inputs, rivals.EXPERTS,
        sweep=((8192, 8, 128, 2048, 768), (4096, 2, 8, 4096, 14336), (2048, 8, 128, 2048, 768)),
        launch_bound=(16, 2, 4, 256, 128), tiny=(5, 2, 3, 16, 24), flops=_experts_flops, is_head=False,
    ),
    # Nemotron-4-15B
    Case(
        "relu2", "", pointwise_inputs, rivals.RELU2,
        sweep=((8192, 24576),), launch_bound=(16, 1024), tiny=(5, 48), bytes=pointwise_bytes,
    ),
)  # fmt: skip
