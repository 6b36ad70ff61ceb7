"""Activations, classes, functions and weights that are exchanged behind apply have their way."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ds_fused
from ds_fused.modules.layers.product import ACT_NAMES
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from tests.policies.tiny import LLAMA, NAMED, assert_same_step, batch, pair, step, twins


class Louder(nn.Module):
    """Around an activation, as quantisation puts something there."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.inside = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * self.inside(x)


def tanh_function(layer: nn.Module, name: str) -> None:
    layer._modules.pop(name)
    setattr(layer, name, torch.tanh)


EXCHANGES = {
    "a layer": lambda layer, name: setattr(layer, name, nn.Tanh()),
    "a layer around": lambda layer, name: setattr(layer, name, Louder(getattr(layer, name))),
    "a function": tanh_function,
    "a hook": lambda layer, name: layer._modules[name].register_forward_hook(lambda act, x, y: torch.tanh(y)),
}


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen3Moe", "Llama4Text"])
@pytest.mark.parametrize("experts", [True, False])
def test_an_activation_that_comes_later(family: str, experts: bool, how: str) -> None:
    model, stock = twins(NAMED[family])
    ds_fused.apply(model, experts=experts)
    n_exchanged = 0
    for each in (model, stock):
        for layer in each.modules():
            name = next((name for name in ACT_NAMES if name in layer._modules), None)
            if name is not None:
                EXCHANGES[how](layer, name)
                n_exchanged += 1
    assert n_exchanged >= 4
    assert_same_step(model, stock, tolerance=1e-5)


@pytest.mark.parametrize("how", EXCHANGES)
def test_an_activation_that_comes_later_within_tiles(how: str) -> None:
    model, stock = twins(LLAMA)
    ds_fused.apply(model, tiles=3)
    for each in (model, stock):
        EXCHANGES[how](each.model.layers[1].mlp, "act_fn")
    assert_same_step(model, stock, tolerance=1e-5)


@pytest.mark.parametrize("how", ["a layer", "a layer around", "a function"])
def test_an_activation_that_comes_later_compiled(how: str) -> None:
    model, stock = pair()
    for each in (model, stock):
        EXCHANGES[how](each.model.layers[1].mlp, "act_fn")
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="eager")
    found, expected = (each(batch()["input_ids"])[0] for each in (compiled, stock.model))
    torch.testing.assert_close(found, expected)


def louder(function: Callable) -> Callable:
    def patched(*args: object, **named: object) -> object:
        y = function(*args, **named)
        return (1.5 * y[0], *y[1:]) if isinstance(y, tuple) else 1.5 * y

    return patched


LAYER_CLASSES = {
    "Llama": ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaDecoderLayer", "Linear"),
    "Qwen3": ("Qwen3RMSNorm", "Qwen3Attention"),  # with norms of heads
}


CASES = [(family, cls) for family, names in LAYER_CLASSES.items() for cls in names]


def class_in(model: nn.Module, name: str) -> type:
    return next(type(module) for module in model.modules() if type(module).__name__ == name)


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("options", [{}, {"tiles": 3}, {"add_rms_norm": True}], ids=str)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_class_that_is_patched_later(
    family: str, name: str, options: dict, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stock = twins(NAMED[family])
    ds_fused.apply(model, **options)
    for _ in range(steps):
        step(model)
    cls = class_in(stock, name)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", louder(cls.forward))
        assert_same_step(model, stock, tolerance=1e-5)
        # so does a copy, and what apply makes of another
        assert_same_step(copy.deepcopy(model), stock, tolerance=1e-5)
        another = copy.deepcopy(stock)
        ds_fused.apply(another, **options)
        assert_same_step(another, stock, tolerance=1e-5)
    assert_same_step(model, stock, tolerance=1e-5)
    assert isinstance(model(**batch()).logits, LogitsOnDemand)


@pytest.mark.parametrize("how", [louder, lambda function: lambda *args, **named: function(*args, **named)])
def test_a_rotary_function_that_is_patched_later(how: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("Llama", "Qwen3"):
        model, stock = twins(NAMED[family])
        ds_fused.apply(model)
        home = sys.modules[class_in(stock, f"{family}Attention").__module__]
        for _ in range(2):
            monkeypatch.setattr(home, "apply_rotary_pos_emb", how(home.apply_rotary_pos_emb))
            assert_same_step(model, stock, tolerance=1e-5)


def test_a_class_that_is_patched_later_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, stock = twins(LLAMA)
    report = ds_fused.apply(model)
    cls = class_in(stock, "LlamaRMSNorm")
    monkeypatch.setattr(cls, "forward", louder(cls.forward))
    for _ in range(2):
        step(model)
    (message,) = caplog.messages
    assert "LlamaRMSNorm" in message and "patched" in message
    assert {claim.key for claim in report.recheck()} == {"rms_norm"}


def test_a_class_that_is_patched_later_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = pair()
    cls = class_in(stock, "LlamaRMSNorm")
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="eager")
    for _ in range(2):
        found, expected = (each(batch()["input_ids"])[0] for each in (compiled, stock.model))
        torch.testing.assert_close(found, expected)
        monkeypatch.setattr(cls, "forward", louder(cls.forward))


# weights that PyTorch spreads over x, which no kernel reads: such a norm is its original's, and a line says so
WEIGHTS = {"one": (1,), "a number": (), "a row": (1, -1)}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("family", "options"),
    [("Llama", {}), ("Llama", {"add_rms_norm": True}), ("Qwen3", {}), ("Cohere", {}), ("Qwen3Next", {})],
)
def test_a_norm_that_is_given_a_weight_of_another_shape(
    family: str, options: dict, weight: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, stock = twins(NAMED[family])
    ds_fused.apply(model, **options)
    n_exchanged = 0
    for each in (model, stock):
        for layer in each.modules():
            if "Norm" in type(layer).__name__ and type(layer) is not nn.LayerNorm:
                shape = [layer.weight.numel() if n < 0 else n for n in WEIGHTS[weight]]
                layer.weight = nn.Parameter(torch.full(shape, 1.5))
                n_exchanged += 1
    assert n_exchanged >= 4
    assert_same_step(model, stock, tolerance=1e-5)
    assert "Norm runs as it is: " in caplog.messages[0] and "must be one value per column of x" in caplog.messages[0]


def test_a_norm_that_has_a_weight_of_another_shape_compiled() -> None:
    model, stock = pair()
    for each in (model, stock):
        each.model.norm.weight = nn.Parameter(torch.full((1,), 1.5))
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="eager", fullgraph=True)
    found, expected = (each(batch()["input_ids"])[0] for each in (compiled, stock.model))
    torch.testing.assert_close(found, expected)
