"""Norms of q and k fused with the rotation behind them: in which layers, and that they compute what they did."""

from __future__ import annotations

import functools
from collections.abc import Callable

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import (
    ALL_ATTENTION_FUNCTIONS,
    Qwen3Attention,
    apply_rotary_pos_emb,
)

import ds_fused
from ds_fused.modules.layers import qk_norm
from ds_fused.ops.common._say import say_once
from tests.policies.tiny import (
    LAYERS,
    NAMED,
    assert_same_step,
    counts,
    shapes_of_calls,
    twins,
    twins_fused_by,
)

KEYS = {"rms_norm": True, "rope": True, "qk_norm_rope": True}
QWEN3 = NAMED["Qwen3"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of q in the calls of the op."""
    return shapes_of_calls(monkeypatch, qk_norm, "rms_norm_rope")


fused_twins = functools.partial(twins_fused_by, KEYS, "qk_norm_rope")


def test_a_part_of_a_head_turns(calls: list) -> None:
    model, stock = twins(NAMED["Qwen3Next"])  # and q comes with a gate; the other layer has a linear attention
    assert counts(ds_fused.apply(model, KEYS))["qk_norm_rope"] == 1
    calls.clear()
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Llama", None),  # it has none
        ("Olmo2", None),  # norms over all heads together, of which q has more
        ("HunYuanDenseV1", "its rotary function is given no results of two norms"),  # norms behind it
    ],
)
def test_other_layers_have_their_rotary_functions_replaced(name: str, reason: str | None, calls: list) -> None:
    model, stock = twins(NAMED[name])
    report = ds_fused.apply(model, KEYS)
    assert "qk_norm_rope" not in counts(report) and counts(report)["rope"] == LAYERS
    rows = [(row.what, row.count, row.reason) for row in report.left]
    assert rows == ([] if reason is None else [(f"{name}Attention", LAYERS, f"qk_norm_rope: {reason}")])
    assert_same_step(model, stock, tolerance=1e-5)
    assert not calls


@pytest.mark.parametrize("level", ["attention", "matmuls"])
def test_checkpointing_that_keeps_a_part(level: str, calls: list) -> None:
    model, stock = twins(QWEN3)
    report = ds_fused.apply(model, KEYS, recompute=level)
    assert counts(report)["qk_norm_rope"] == counts(report)["recompute"] == LAYERS
    calls.clear()
    for each in (model, stock):
        each.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(calls) == 2 * LAYERS


def test_a_norm_in_a_wrapper_is_called_as_before(calls: list) -> None:
    model, stock = fused_twins(QWEN3, calls)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["q_norm"], init_lora_weights=False)
    for i, each in enumerate(both := [model, stock]):
        torch.manual_seed(3)
        both[i] = peft.get_peft_model(each, config)
    assert_same_step(*both, tolerance=1e-5)
    assert not calls


# they would see the tensors of both where they expect one
def test_a_norm_with_a_hook_is_called_as_before(calls: list, caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    model, stock = fused_twins(QWEN3, calls)
    seen = []
    for each in (model, stock):
        each.model.layers[1].self_attn.k_norm.register_forward_hook(lambda _, x, y: seen.append((x, y)))
    assert_same_step(model, stock, tolerance=1e-5)
    torch.testing.assert_close(seen[0], seen[1])
    assert len(calls) == LAYERS - 1
    assert [line for line in caplog.messages if "Qwen3RMSNorm has a hook of" in line]


def test_outside_of_its_layer_a_norm_does_not_wait(calls: list) -> None:
    model, stock = fused_twins(QWEN3, calls)
    x = torch.randn(2, 3, model.config.head_dim)
    found, expected = (each.model.layers[0].self_attn.q_norm(x) for each in (model, stock))
    assert type(found) is Tensor
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError):
        model.model.layers[0].self_attn(x)  # a forward that raises leaves no norm waiting
    assert type(model.model.layers[0].self_attn.q_norm(x)) is Tensor


@pytest.mark.parametrize("off", ["rms_norm", "rope"])
def test_without_the_ops_that_it_fuses_it_is_left(off: str) -> None:
    report = ds_fused.apply(QWEN3.make(), KEYS | {off: False})
    assert [(row.what, row.count, row.reason) for row in report.left] == [
        ("qk_norm_rope", 1, f"it needs rms_norm and rope, and {off} is off")
    ]


# one layer in which each way of writing the body is tried
def built(prepare: Callable[..., tuple[Tensor, Tensor]]) -> nn.Module:
    """An attention that turns what ``prepare`` makes of the layer and of its q and k, [B, T, H, D]."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None):
        heads = *hidden_states.shape[:-1], -1, self.head_dim
        q, k, v = (project(hidden_states).view(heads) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = prepare(self, q, k)
        if self.turns:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        y, _ = attend(self, q, k, v.transpose(1, 2), attention_mask, scaling=self.scaling)
        return self.o_proj(y.reshape(*hidden_states.shape[:-1], -1))

    config = QWEN3.make().config
    torch.manual_seed(0)
    layer = type("BodyAttention", (Qwen3Attention,), {"forward": forward, "turns": True})(config, layer_idx=1)
    for each in (layer.q_norm, layer.k_norm):
        nn.init.normal_(each.weight)
    return layer


def usual(self, q, k):
    return self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)


def left_of(layer: nn.Module, calls: list) -> str | None:
    """Why its norms stay apart; None where they don't. Either way it computes what it did."""
    tensors = torch.randn(2, 3, 32), torch.randn(2, 1, 3, layer.head_dim)
    expected = layer(tensors[0], tensors[1])
    report = ds_fused.apply(nn.Sequential(layer), KEYS)
    calls.clear()  # of the proof
    found = layer(tensors[0], tensors[1])
    torch.testing.assert_close(found, expected)
    leaves = list(layer.parameters())
    gradients = (torch.autograd.grad(y.square().sum(), leaves, allow_unused=True) for y in (found, expected))
    torch.testing.assert_close(*gradients)
    reason = next((row.reason for row in report.left if row.what == "BodyAttention"), None)
    assert len(calls) == (reason is None)
    return reason


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (usual, None),
        (lambda self, q, k: (self.q_norm(q.transpose(1, 2)), self.k_norm(k.transpose(1, 2))), None),
        (lambda self, q, k: (self.q_norm(q).transpose(-2, -3), self.k_norm(k.transpose(1, 2))), None),
        (lambda self, q, k: (self.k_norm(q).transpose(1, 2), self.q_norm(k).transpose(1, 2)), None),
        (lambda self, q, k: (self.q_norm(q).transpose(1, 2), self.q_norm(k).transpose(1, 2)), "norm of q and of k"),
        (lambda self, q, k: (self.q_norm(q).transpose(1, 2), k.transpose(1, 2)), "no results of two norms"),
        (lambda self, q, k: (self.q_norm(q).transpose(1, 2) * 2.0, usual(self, q, k)[1]), "no results of two norms"),
        (lambda self, q, k: tuple(torch.transpose(x, 1, 2) for x in (self.q_norm(q), self.k_norm(k))), "no results"),
        (lambda self, q, k: tuple(x.transpose(2, 3).mT for x in usual(self, q, k)), "no results of two norms"),
        (lambda self, q, k: tuple(x.permute(0, 2, 1, 3) for x in (self.q_norm(q), self.k_norm(k))), "no results"),
        (lambda self, q, k: usual(self, q, self.k_norm(k)), None),
        (lambda self, q, k: [x for x in usual(self, q, k) if x.device == q.device], "read before they turn"),
        (lambda self, q, k: usual(self, q, k) if self.layer_idx % 2 else (q, k), "can't be compared: TypeError"),
    ],
)
def test_bodies(body, reason: str | None, calls: list) -> None:
    found = left_of(built(body), calls)
    assert found is None if reason is None else reason in found, found


def test_a_layer_that_does_not_turn(calls: list) -> None:
    layer = built(usual)
    layer.turns = False
    assert left_of(layer, calls) == "qk_norm_rope: its rotary function is not called"


def test_norms_of_two_forms_stay_apart(calls: list) -> None:
    layer = built(usual)
    layer.k_norm.variance_epsilon = 0.5
    assert left_of(layer, calls) == "qk_norm_rope: its q_norm and its k_norm are norms of different forms"
