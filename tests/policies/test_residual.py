"""Residual connections fused with the norm behind them: in which layers, and that they compute what they did."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import ds_fused
from ds_fused.modules.layers import norm
from ds_fused.modules.layers.residual import Residual
from ds_fused.modules.swap import swap
from ds_fused.ops.common._say import say_once
from tests.policies.tiny import (
    LAYERS,
    LLAMA,
    NAMED,
    assert_same_step,
    batch,
    counts,
    shapes_of_calls,
    twins,
    twins_fused_by,
)

KEYS = {"rms_norm": True, "add_rms_norm": True}


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the sums that norms have computed."""
    return shapes_of_calls(monkeypatch, norm, "add_rms_norm")


fused_twins = functools.partial(twins_fused_by, KEYS, "add_rms_norm")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Olmo2", "no sum of its own goes into one of its norms"),
        ("DeepseekV4", "can't be compared"),
    ],
)
def test_layers_of_other_bodies_are_left(name: str, reason: str, sums: list) -> None:
    model, stock = twins(NAMED[name])
    report = ds_fused.apply(model, KEYS)
    assert "add_rms_norm" not in counts(report)
    (row,) = (row for row in report.left if row.what.endswith("DecoderLayer"))
    assert row.count == LAYERS and reason in row.reason
    assert_same_step(model, stock, tolerance=1e-5)


def test_what_layers_are_given_and_return_can_be_recorded(sums: list) -> None:
    model, stock = fused_twins(LLAMA, sums)
    inputs = {"input_ids": batch()["input_ids"], "output_hidden_states": True, "output_attentions": True}
    found, expected = (each(**inputs) for each in (model, stock))
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    torch.testing.assert_close(found.attentions, expected.attentions)


# they would see two tensors where they expect one
def test_a_norm_with_a_hook_is_called_as_before(sums: list, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    model, stock = fused_twins(LLAMA, sums)
    seen = []
    for each in (model, stock):
        each.model.layers[1].post_attention_layernorm.register_forward_hook(lambda _, x, y: seen.append((x, y)))
    assert_same_step(model, stock, tolerance=1e-5)
    torch.testing.assert_close(seen[0], seen[1])
    assert len(sums) == LAYERS - 1
    assert [line for line in caplog.messages if "LlamaRMSNorm has a hook of" in line]


def checkpointed_in_its_forward(cls: type[nn.Module], asked: list[bool]) -> type[nn.Module]:
    """As transformers (5.24) makes layers, and every class derived from one: the outermost forward checkpoints."""

    def __init_subclass__(cls: type[nn.Module]) -> None:
        inner = cls.forward

        @functools.wraps(inner)
        def forward(self: nn.Module, *args: object, **named: object) -> object:
            asked.append(type(self).forward is forward)
            return inner(self, *args, **named)

        cls.forward = forward

    base = type(cls)("Base", (cls,), {"__init_subclass__": __init_subclass__})
    return type(cls)(cls.__name__, (base,), {"__module__": cls.__module__})


def test_layers_that_are_checkpointed_in_their_forward(sums: list) -> None:
    (model, _), asked = twins(LLAMA), []
    layers = model.model.layers
    own = checkpointed_in_its_forward(type(layers[0]), asked)
    for layer in layers:
        layer.__class__ = own
    assert counts(ds_fused.apply(model, KEYS))["add_rms_norm"] == LAYERS
    for _ in range(2):  # the first forward is watched
        asked.clear()
        sums.clear()
        model(**batch())
        assert asked.count(True) == len(layers) and len(sums) == len(layers)


def test_recompute_goes_first() -> None:
    report = ds_fused.apply(LLAMA.make(), KEYS, recompute="attention")
    assert counts(report) == {"rms_norm": 2 * LAYERS + 1, "recompute": LAYERS}
    assert [(row.what, row.reason) for row in report.left] == [("add_rms_norm", "recompute has the layers")]


def test_without_the_norms_it_is_left() -> None:
    report = ds_fused.apply(LLAMA.make(), {"add_rms_norm": True})
    assert [(row.what, row.count, row.reason) for row in report.left] == [
        ("LlamaDecoderLayer", LAYERS, "add_rms_norm needs rms_norm, which is off")
    ]


# one layer in which each way of writing the body is tried
class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = LlamaRMSNorm(6), LlamaRMSNorm(6)
        self.attn, self.mlp = nn.Sequential(nn.Linear(6, 6)), nn.Sequential(nn.Linear(6, 6))


def built(forward) -> nn.Module:
    return type("BodyLayer", (Layer,), {"forward": forward})()


def left_of(layer: nn.Module, verify: bool = True) -> str | None:
    """Why a layer stays stock; None where it does not."""
    report = ds_fused.apply(nn.Sequential(layer), KEYS, verify=verify)
    return next((row.reason for row in report.left if row.what == "BodyLayer"), None)


def usual(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


def parallel(self, x):
    return x + self.attn(self.norm1(x)) + self.mlp(self.norm2(x))


def keeping(self, x):
    self.kept = x + self.attn(self.norm1(x))
    return self.kept + self.mlp(self.norm2(self.kept))


def random(self, x):
    x = x + self.attn(self.norm1(x))
    return x + nn.functional.dropout(self.mlp(self.norm2(x)), 0.5)


class NormWithGate(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden_states)


def test_a_norm_of_another_kind_is_named() -> None:
    layer = built(usual)
    layer.norm2 = NormWithGate(6)
    assert left_of(layer) == "its norm2 is no norm that add_rms_norm computes"


def test_a_proof_draws_no_numbers_of_others() -> None:
    model = nn.Sequential(built(random))
    before = torch.get_rng_state()
    ds_fused.apply(model, KEYS)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("body", "reason"),
    [(usual, None), (parallel, "no sum of its own"), (keeping, "keeps something"), (random, "random numbers")],
)
def test_bodies(body, reason: str | None, verify: bool) -> None:
    found = left_of(built(body), verify)
    assert found is None if reason is None else reason in found, found


# one sum where a norm is given a child's result added to a tensor, the layer's own output in all other cases
@pytest.mark.parametrize(
    ("body", "n_sums"),
    [
        (lambda self, x: self.norm2(x + self.attn(x)), 1),
        (lambda self, x: self.norm2(self.attn(x) + x), 1),
        (lambda self, x: self.norm2(torch.add(x, self.attn(x))), 1),
        (lambda self, x: self.norm2(x + 0.5 * self.attn(x)), 1),
        (lambda self, x: self.norm2(x + x[..., :1] * self.attn(x)), 1),
        (lambda self, x: self.norm2(x + (self.attn(x) + self.mlp(x))), 1),
        (lambda self, x: self.norm2(x + self.norm1(self.attn(x))), 1),
        (lambda self, x: self.norm2(x + self.attn(x) + self.mlp(x)), 1),
        (lambda self, x: self.norm2(y := x + self.attn(x)) + self.norm1(y), 1),
        (lambda self, x: self.norm1(self.mlp(self.norm2(x + self.attn(x))) + x), 2),
        (lambda self, x: self.norm2(x - self.attn(x)), 0),
        (lambda self, x: self.norm2(x + self.attn(x)[:1]), 0),
        (lambda self, x: self.norm2((x + self.attn(x)) * 2.0), 0),
        (lambda self, x: self.norm2(torch.tanh(x + self.attn(x))), 0),
        (lambda self, x: self.norm2(torch.cat([x, self.attn(x)])), 0),
        (lambda self, x: (x + self.attn(x), self.mlp(x)), 0),
        (lambda self, x: self.mlp(x + self.attn(x)), 0),
    ],
)
def test_sums(body, n_sums: int, sums: list) -> None:
    torch.manual_seed(0)
    layer, x = built(body), torch.randn(2, 3, 6, requires_grad=True)
    expected = layer(x)
    swap(layer, Residual)
    for each in (layer.norm1, layer.norm2):
        swap(each, norm.RMSNorm, fused_eps="variance_epsilon", fused_offset=0.0, fused_cast="before_weight")
    found = layer(x)
    assert len(sums) == n_sums
    torch.testing.assert_close(found, expected)
    of_all = [
        sum(y.square().sum() for y in (each if isinstance(each, tuple) else (each,))) for each in (found, expected)
    ]
    leaves = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(y, leaves, allow_unused=True) for y in of_all]
    torch.testing.assert_close(*gradients)
    assert all(type(y) is Tensor for y in (found if isinstance(found, tuple) else (found,)))
