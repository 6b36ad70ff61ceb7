"""From wish to report: keys and options, strictness, conflicts, agreement, all or nothing."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import ds_fused
from ds_fused.modules.swap import is_fused
from ds_fused.policies import memory, swap_claim
from ds_fused.policies import plan as plan_file
from ds_fused.policies.kinds import Way
from ds_fused.policies.plan import plan
from ds_fused.policies.swap_claim import SwapClaim
from tests.policies.tiny import LAYER_KEYS, LLAMA, NAMED, batch, classes, counts, step


def test_everything_is_on_by_default() -> None:
    report = ds_fused.apply(LLAMA.make())
    assert counts(report) == LLAMA.counts | {"fused_linear_cross_entropy": 1, "cross_entropy": 1}
    assert list(report.left) == []


def test_switches_and_wanted() -> None:
    assert "rope" not in counts(ds_fused.apply(LLAMA.make(), rope=False))
    assert counts(ds_fused.apply(LLAMA.make(), {"rope": True})) == {"rope": 2}
    assert counts(ds_fused.apply(LLAMA.make(), {"rope": True}, swiglu=True)) == {"rope": 2, "swiglu": 2}
    assert counts(ds_fused.apply(LLAMA.make(), {"geglu": True})) == {}
    assert counts(ds_fused.apply(LLAMA.make(), {"fused_linear_cross_entropy": {"chunk_mb": 256}})) == {
        "fused_linear_cross_entropy": 1
    }


def test_what_parametrizes_a_weight_is_no_layer() -> None:
    """By its name it would be a norm, and left."""
    model = LLAMA.make()
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.gate_proj)
    report = ds_fused.apply(model)
    assert counts(report)["swiglu"] == 2 and list(report.left) == []


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rmsnorm": True}, ["rmsnorm", "rms_norm", "fused_linear_cross_entropy"]),
        ({"tiled_mlp": True}, ["'tiled_mlp'", "tiles=", "rms_norm"]),
        ({"rms_norm": 1}, ["rms_norm", "1", "True"]),
        ({"rms_norm": {"eps": 1e-6}}, ["rms_norm", "eps", "none"]),
        ({"fused_linear_cross_entropy": {"chunks": 2}}, ["chunks", "chunk_mb", "keep_mb"]),
        ({"fused_linear_cross_entropy": {"chunk_mb": "2"}}, ["chunk_mb", "'2'", "int"]),
        ({"fused_linear_cross_entropy": {"chunk_mb": True}}, ["chunk_mb", "True", "int"]),
        ({"fused_linear_cross_entropy": {"accumulate": "bf16"}}, ["accumulate", "'bf16'", "'native'", "'fp32'"]),
        ({"logits": "drop"}, ["logits", "'drop'", "'defer'", "'keep'"]),
        ({"fused_linear_cross_entropy": {"keep_mb": -1}}, ["keep_mb", "-1", "at least 0"]),
        ({"fused_linear_cross_entropy": {"chunk_mb": 0}}, ["fused_linear_cross_entropy.chunk_mb", "0", "at least 1"]),
        ({"eval": True}, ["eval", "True", "'defer'", "'stock'"]),
        ({"wanted": ["rope"]}, ["wanted", "['rope']", "list", "None", "{'rope': True}"]),
        ({"strict": "no"}, ["strict", "'no'", "True or False"]),
        ({"dtype": "bf16"}, ["dtype", "'bf16'", "torch.bfloat16"]),
        ({"dtype": torch.int8}, ["dtype", "torch.int8", "floating"]),
        ({"device": "gpu"}, ["device", "'gpu'", "'cpu'"]),
        ({"device": "cuda:99"}, ["device", "cuda", "99", "that is here"]),
    ],
)
def test_wrong_wishes_are_errors_that_name_the_known(wrong: dict, words: list[str]) -> None:
    model = LLAMA.make()
    with pytest.raises(ValueError) as error:
        ds_fused.apply(model, **wrong)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert classes(model) == classes(LLAMA.make())


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (None, "got None"),
        ("meta-llama/Llama-3-8B", "got 'meta-llama/Llama-3-8B' .str."),
        (transformers.LlamaForCausalLM, "got the class LlamaForCausalLM"),
        (transformers.LlamaConfig(), "got LlamaConfig .*LlamaConfig"),
    ],
)
def test_what_is_no_model(model: object, what: str) -> None:
    for where, function in (("apply", ds_fused.apply), ("restore", ds_fused.restore)):
        with pytest.raises(ValueError, match=f"(?s){where}: the model must be a torch.nn.Module that is built, {what}"):
            function(model)


def test_compiled_parts_are_named() -> None:
    model = nn.ModuleDict({"scripted": torch.jit.script(nn.LayerNorm(32)), "norm": nn.LayerNorm(32)})
    report = ds_fused.apply(model)
    assert counts(report) == {"layer_norm": 1}
    assert [(row.what, row.count) for row in report.left] == [("LayerNorm", 1)] and "ScriptModule" in str(report)


@pytest.mark.parametrize("family", [NAMED[name] for name in ("Llama", "Phi3", "Gemma")])
def test_tiles(family) -> None:
    stock, fused = family.make(), family.make()
    report = ds_fused.apply(fused, {family.glu: True}, tiles=3, strict=True)
    assert [row.replacement for row in report.replaced] == ["glu in 3 tiles"]
    (loss, gradients), (wanted, stock_gradients) = step(fused), step(stock)
    assert torch.allclose(loss, wanted)
    for name, gradient in stock_gradients.items():
        assert torch.allclose(gradients[name], gradient, rtol=1e-4, atol=1e-6), name
    report.restore()
    assert classes(fused) == classes(stock) and not hasattr(fused.model.layers[0].mlp, "fused_tiles")


def test_tiles_without_an_mlp() -> None:
    report = ds_fused.apply(LLAMA.make(), {"rope": True}, tiles=3)
    assert [row.what for row in report.left] == ["tiled_mlp"]
    for tiles in (0, True, 2.0):
        with pytest.raises(ValueError, match=f"tiles is {tiles}; it must be a whole number"):
            ds_fused.apply(LLAMA.make(), tiles=tiles)


def test_strict() -> None:
    # alternatives count for each other: a Llama has no geglu, and that is no miss
    ds_fused.apply(LLAMA.make(), strict=True)
    model = LLAMA.make()
    with pytest.raises(ValueError, match="geglu"):
        ds_fused.apply(model, {"geglu": True, "rope": True}, strict=True)
    assert classes(model) == classes(LLAMA.make())
    with pytest.raises(ValueError, match="nothing matched rope, qk_norm_rope, swiglu"):
        ds_fused.apply(NAMED["OPT"].make(), strict=True)


@pytest.mark.parametrize(
    "switches", [{"rms_norm": False}, {"rope": False}, {"swiglu": False}, {"fused_linear_cross_entropy": False}]
)
def test_strict_asks_for_nothing_more_of_a_kind_that_is_off(switches: dict) -> None:
    counted = counts(ds_fused.apply(LLAMA.make(), strict=True, **switches))
    assert counted == {key: count for key, count in counts(ds_fused.apply(LLAMA.make())).items() if key not in switches}


@pytest.mark.parametrize("key", ["geglu", "layer_norm", "gated_rms_norm", "experts", "lora", "qk_norm_rope"])
def test_strict_wants_each_key_that_is_named(key: str) -> None:
    for wanted, switches in ((None, {key: True}), ({key: True, "rms_norm": True}, {}), (None, {key: {}})):
        with pytest.raises(ValueError, match=rf"strict, and nothing matched {key}(\n|$)"):
            ds_fused.apply(LLAMA.make(), wanted, strict=True, **switches)


def test_strict_counts_what_one_op_does_for_two_keys() -> None:
    named = {"rms_norm": True, "rope": True, "qk_norm_rope": True, "swiglu": True}
    report = ds_fused.apply(NAMED["Qwen3"].make(), named, strict=True)
    assert "rope" not in counts(report) and counts(report)["qk_norm_rope"] == 2
    # experts whose gates would be swiglu are no miss of it
    report = ds_fused.apply(NAMED["Mixtral"].make(), {"swiglu": True, "experts": True}, strict=True)
    assert counts(report) == {"experts": 2}
    with pytest.raises(ValueError, match="nothing matched geglu$"):
        ds_fused.apply(NAMED["Mixtral"].make(), {"geglu": True, "experts": True}, strict=True)


def test_strict_tells_why_a_key_yields() -> None:
    with pytest.raises(ValueError, match="nothing matched add_rms_norm(.|\n)*recompute has the layers"):
        ds_fused.apply(LLAMA.make(), add_rms_norm=True, recompute="matmuls", strict=True)


@pytest.mark.parametrize("switches", [{}, {"fused_linear_cross_entropy": {"chunk_mb": 256}}])
def test_strict_misses_a_head_whose_logits_are_computed(switches: dict) -> None:
    model = LLAMA.make()
    model.lm_head.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(ValueError, match="nothing matched fused_linear_cross_entropy(.|\n)*it has hooks"):
        ds_fused.apply(model, strict=True, **switches)
    # where it is said so, the loss of real logits is enough
    ds_fused.apply(model, strict=True, fused_linear_cross_entropy=False)


def test_strict_counts_what_the_proof_let_pass() -> None:
    class Squared(LlamaRMSNorm):
        def forward(self, hidden_states):  # noqa: ANN001, ANN202
            return super().forward(hidden_states) ** 2

    model = LLAMA.make()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            module.__class__ = Squared
    with pytest.raises(ValueError, match="nothing matched rms_norm(.|\n)*Squared"):
        ds_fused.apply(model, strict=True)


class Convolved(nn.Module):
    """By its name somebody would expect it to be replaced."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 4, 3)


def test_strangers_are_named() -> None:
    model = LLAMA.make()
    model.extra = nn.ModuleList([type("GatedRMSNorm", (Convolved,), {})(), type("MyExperts", (Convolved,), {})()])
    model.extra.append(type("Convolution", (Convolved,), {})())
    report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == LLAMA.counts
    assert [(row.what, row.count, row.reason) for row in report.left] == [
        ("GatedRMSNorm", 1, "it is of no form that an op could replace"),
        ("MyExperts", 1, "it is of no form that an op could replace"),
    ]


# a squared ReLU that is a gate is part of its MLP, one that is not is an op by itself
def test_squared_relus() -> None:
    model = LLAMA.make(hidden_act="relu2")
    assert counts(ds_fused.apply(model, LAYER_KEYS)) == {"rms_norm": 5, "rope": 2, "reglu": 2}
    assert counts(ds_fused.apply(LLAMA.make(hidden_act="relu2"), {"relu2": True})) == {"relu2": 2}
    assert counts(ds_fused.apply(NAMED["Nemotron"].make(), {"reglu": True, "relu2": True})) == {"relu2": 2}


def test_a_shared_layer_is_claimed_once() -> None:
    model = LLAMA.make()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert counts(ds_fused.apply(model, {"swiglu": True})) == {"swiglu": 1}


def test_root_keeps_its_class() -> None:
    mlp = LlamaMLP(LLAMA.make().config)
    assert counts(ds_fused.apply(mlp)) == {}
    assert type(mlp) is LlamaMLP


def test_two_claims_on_one_layer_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.make()
    path = "model.layers.0.mlp"

    def claim_loss(model: nn.Module, wanted: object, **_: object) -> tuple[list, list]:
        way = Way("fused_linear_cross_entropy", "linear_cross_entropy", LlamaMLP)
        again = SwapClaim(plan_file.find(model.get_submodule(path)), [way], model)
        again.add(path, model.get_submodule(path))
        return [again], []

    monkeypatch.setattr(plan_file, "claim_loss", claim_loss)
    with pytest.raises(ValueError, match=f"{path} is claimed twice: swiglu -> glu, fused_linear_cross_entropy"):
        ds_fused.apply(model)
    assert classes(model) == classes(LLAMA.make())


def test_plan_changes_nothing_and_is_the_same_twice() -> None:
    model = LLAMA.make()
    wanted = {key: {} for key in LAYER_KEYS}
    first, second = plan(model, wanted), plan(model, wanted)
    assert [(c.key, c.original, c.paths) for c in first.claims] == [(c.key, c.original, c.paths) for c in second.claims]
    assert classes(model) == classes(LLAMA.make())


def test_ranks_agree_before_anything_changes() -> None:
    model, seen = LLAMA.make(), []

    def agree(decisions: dict) -> None:
        seen.append(decisions)
        raise RuntimeError("rank 1 differs")

    with pytest.raises(RuntimeError, match="rank 1 differs"):
        ds_fused.apply(model, agree=agree)
    assert classes(model) == classes(LLAMA.make())
    assert json.loads(json.dumps(seen[0])) == seen[0]
    assert {claim["key"] for claim in seen[0]["claims"]} == {"rms_norm", "rope", "swiglu"} | {
        "fused_linear_cross_entropy",
        "cross_entropy",
    }
    assert all(claim["proven"] for claim in seen[0]["claims"])
    again: list[dict] = []
    ds_fused.apply(LLAMA.make(), agree=again.append)
    assert again == seen


def test_commit_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.make()
    real, calls = swap_claim.swap, []

    def fails_at_the_fourth(module: nn.Module, mixin: type, how: tuple, **state: object) -> None:
        calls.append(module)
        if len(calls) == 4:
            raise MemoryError
        real(module, mixin, how, **state)

    monkeypatch.setattr(swap_claim, "swap", fails_at_the_fourth)
    with pytest.raises(MemoryError):
        ds_fused.apply(model, LAYER_KEYS)
    assert classes(model) == classes(LLAMA.make())


def test_twice_on_one_model() -> None:
    model = LLAMA.make()
    first = ds_fused.apply(model, LAYER_KEYS)
    second = ds_fused.apply(model, LAYER_KEYS)
    assert counts(second) == {}
    assert {row.reason for row in second.left} == {"ds_fused has swapped it already"}
    second.restore()
    assert counts(first) == LLAMA.counts and first.recheck() == []


def test_another_model_in_the_process_stays_stock() -> None:
    other = LLAMA.make()
    before = step(other)
    ds_fused.apply(LLAMA.make())
    after = step(other)
    assert torch.equal(before[0], after[0])
    assert classes(other) == classes(LLAMA.make())


def test_nothing_that_others_use_is_exchanged() -> None:
    """Neither functions of PyTorch and transformers nor their classes, whether a step runs fused or not."""
    homes = (torch, torch.nn, torch.nn.functional, modeling_llama, transformers.loss.loss_utils)
    classes_of_others = (nn.Linear, nn.Module, nn.LayerNorm, transformers.LlamaForCausalLM, modeling_llama.LlamaRMSNorm)

    def everything() -> list[dict]:
        # what is no function or class may be a cache of Python's
        found = [{name: it for name, it in vars(each).items() if callable(it)} for each in (*homes, *classes_of_others)]
        return [*found, dict(dict.items(transformers.activations.ACT2FN))]

    model = LLAMA.make()
    step(model)  # transformers leaves something of its own
    before = everything()
    report = ds_fused.apply(model)
    assert everything() == before
    step(model)
    assert everything() == before
    report.restore()
    assert everything() == before


def test_report_is_a_table() -> None:
    text = str(ds_fused.apply(LLAMA.make(), LAYER_KEYS))
    lines = text.splitlines()
    assert lines[0].startswith("ds_fused: 9 layers replaced in ")
    assert [line.split() for line in lines[1:]] == [
        ["2", "x", "rope", "LlamaAttention", "->", "rope"],
        ["2", "x", "swiglu", "LlamaMLP", "->", "glu"],
        ["5", "x", "rms_norm", "LlamaRMSNorm", "->", "rms_norm"],
    ]
    assert "0 layers replaced" in str(ds_fused.apply(LLAMA.make(), {}))


def test_restore_twice_and_recheck() -> None:
    model = LLAMA.make()
    report = ds_fused.apply(model)
    assert report.recheck() == []
    model.model.norm.forward = model.model.norm.forward
    assert [claim.key for claim in report.recheck()] == ["rms_norm"]
    del model.model.norm.forward
    model.model.layers[0].mlp = LlamaMLP(model.config)
    assert [claim.key for claim in report.recheck()] == ["swiglu"]
    report.restore()
    report.restore()
    assert report.recheck() == [] and report.replaced == ()
    assert classes(model) == classes(LLAMA.make())


def test_what_cannot_be_restored_is_named_and_keeps_nothing_else() -> None:
    model = LLAMA.make()
    report = ds_fused.apply(model)
    norm = model.model.layers[0].input_layernorm
    ours = type(norm)
    norm.__class__ = type("FSDPLayer", (ours,), {})
    for undo in (report.restore, partial(ds_fused.restore, model), report.restore):
        with pytest.raises(ValueError, match="FSDPLayer was given another class after the swap"):
            undo()
        assert [module for module in model.modules() if is_fused(module)] == [norm]
    norm.__class__ = ours
    report.restore()
    assert classes(model) == classes(LLAMA.make()) and not report.claims and "_ds_fused_reports" not in vars(model)


def test_first_step_confirms_and_leaves_no_counters(caplog: pytest.LogCaptureFixture) -> None:
    model = LLAMA.make()
    report = ds_fused.apply(model, LAYER_KEYS)
    hooked = len(model._forward_hooks) + len(model._forward_pre_hooks)
    assert hooked == 2
    fused = {type(m): dict(vars(type(m))) for m in model.modules() if hasattr(type(m), "_ds_fused_original")}
    step(model)
    assert report.verify_live() == [] and not caplog.messages
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert {cls: dict(vars(cls)) for cls in fused} == fused


def test_first_step_warns_of_what_nobody_called(caplog: pytest.LogCaptureFixture) -> None:
    model = LLAMA.make()
    report = ds_fused.apply(model, LAYER_KEYS)
    for layer in model.model.layers:
        stock = LlamaMLP(model.config)
        layer.mlp.forward = stock.forward  # planted after the swap: ours is bypassed
    step(model)
    step(model)
    assert [claim.key for claim in report.verify_live()] == ["swiglu"]
    assert len(caplog.messages) == 1 and "LlamaMLP (swiglu)" in caplog.messages[0]


def test_first_step_claims_nothing_of_what_hooks_stand_before(caplog: pytest.LogCaptureFixture) -> None:
    model = LLAMA.make()
    ds_fused.apply(model, LAYER_KEYS)
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    step(model)
    (line,) = caplog.messages
    assert "LlamaMLP (swiglu); it may call ours or not" in line and "unfused" not in line


def test_a_first_step_that_fails_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    model = LLAMA.make()
    report = ds_fused.apply(model, LAYER_KEYS)
    with pytest.raises(ValueError, match="input_ids"):
        model()
    assert report.verify_live() == [] and not caplog.messages
    assert len(model._forward_pre_hooks) == 1  # the next one is the first
    model(**batch())
    assert report.verify_live() == [] and not caplog.messages
    assert not model._forward_pre_hooks


def test_a_default_device_changes_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LLAMA.make()
    wanted = counts(ds_fused.apply(LLAMA.make()))
    monkeypatch.setattr(memory, "_PROVEN", {})
    with torch.device("meta"):
        assert counts(ds_fused.apply(model)) == wanted
