"""Kernels in a layer of which a checkpoint keeps the products: what a kernel may overwrite is handed out once."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.kept import LEVELS, Learnt, Recording
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
