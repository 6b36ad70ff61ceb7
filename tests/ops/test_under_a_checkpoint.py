"""Kernels in a layer of which a checkpoint keeps the products: what a kernel may overwrite is handed out once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_fused.ops.registry as registry
from ds_fused.modules.layers.experts import WholeExperts
from ds_fused.modules.layers.mlp import Gate
from ds_fused.modules.memory.kept import LEVELS, Learnt, Recording
from ds_fused.ops import glu, rms_norm

N, D = 5, 16


def layer(x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    y = rms_norm(x, norm)
    return x + F.linear(glu(F.linear(y, gate), F.linear(y, up), overwrite_inputs=True), down)


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_are_those_of_a_whole_repetition(device, level):
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, N, D), (D,), (D, D), (D, D), (D, D))
    inputs = [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes]

    def run(backwards: int, **context: object) -> list[Tensor]:
        y = checkpoint(layer, *inputs, use_reentrant=False, **context)
        found = [y.detach()]
        for _ in range(backwards):
            found += torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)
        return found

    learnt = Learnt()
    for backwards in (1, 2, 2):
        recording = Recording(learnt, LEVELS[level])
        found = run(backwards, context_fn=recording.contexts)
        assert recording.kept_bytes() == 0
        for a, b in zip(found, run(backwards), strict=True):
            assert torch.equal(a, b)


class Mixture(WholeExperts, nn.Module):
    fused_gate, fused_transposed = Gate(), False

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.__dict__.update(gate_up_proj=gate_up, down_proj=down)


@pytest.mark.parametrize("is_last", [True, False])
@pytest.mark.parametrize("level", ["full", "matmuls"])
def test_experts(is_last, level, device, monkeypatch):
    n_experts, ids = 3, torch.tensor([[0, 1], [2, 0], [1, 2], [3, 0], [2, 1]], device=device)  # 3 is nobody's
    draw = torch.Generator().manual_seed(0)
    shapes = ((N, D), (n_experts, 2 * D, D), (n_experts, D, D), (N, 2), (D,))
    inputs = [torch.randn(shape, generator=draw).to(device).requires_grad_() for shape in shapes]
    counts = []
    file = registry.op("experts").module
    products = file.product_of_rows
    monkeypatch.setattr(file, "product_of_rows", lambda *args, **how: counts.append(1) or products(*args, **how))

    def mixture_layer(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, norm: Tensor) -> Tensor:
        y = Mixture(gate_up, down)(x, ids, weights)
        return x + (y if is_last else rms_norm(y, norm))

    def run(**context: object) -> tuple[list[Tensor], int]:
        y = checkpoint(mixture_layer, *inputs, use_reentrant=False, **context)
        counts.clear()
        found = torch.autograd.grad(y.square().sum(), inputs[: 4 if is_last else 5])
        return [y.detach(), *found], len(counts)

    learnt = Learnt()
    for first in (True, False, False):
        recording = Recording(learnt, LEVELS[level])
        (found, ran), (expected, ran_in_full) = run(context_fn=recording.contexts), run()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)
        assert recording.kept_bytes() == 0
        # two of the forward again, and two of the backward
        assert ran_in_full == 4
        again = 0 if level == "matmuls" else 1 if is_last and not first else 2
        assert ran == 2 + again
