"""What is found once of ZeRO-3's linear layer is what was found each time."""

from __future__ import annotations

import inspect

import torch
from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3, zero3_linear_wrap

from ds_fused.engine.zero3.linear import remember_signature


def test_the_signature_is_found_once_and_is_the_same():
    forward = LinearFunctionForZeroStage3.forward
    forward.__dict__.pop("__signature__", None)
    found = inspect.signature(forward)
    remember_signature()
    assert inspect.signature(forward) is inspect.signature(forward) and inspect.signature(forward) == found


def test_the_layer_computes_with_and_without_a_bias():
    remember_signature()
    x, weight, bias = (torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,)))
    for operands in ((x, weight), (x, weight, bias)):
        found, expected = zero3_linear_wrap(*operands), torch.nn.functional.linear(*operands)
        torch.testing.assert_close(found, expected)
        gradients = (torch.autograd.grad(y.sum(), operands, retain_graph=True) for y in (found, expected))
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)
