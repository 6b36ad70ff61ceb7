"""Swapped models among the tools that also reach into models: adapters, hooks, other kernels, saving, compiling."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import ds_fused
from ds_fused.modules.swap import is_fused
from tests.policies.tiny import (
    LAYER_KEYS,
    LLAMA,
    NAMED,
    assert_same_state,
    assert_same_step,
    batch,
    classes,
    counts,
    step,
    twins,
)

LORA = peft.LoraConfig(r=4, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"], init_lora_weights=False)


def with_adapters(model: nn.Module) -> nn.Module:
    torch.manual_seed(3)
    return peft.get_peft_model(model, LORA)


@pytest.mark.parametrize("when", ["before", "after"])
def test_peft(when: str) -> None:
    model, stock = twins(LLAMA)
    stock = with_adapters(stock)
    if when == "before":
        report = ds_fused.apply(model, LAYER_KEYS)
        model = with_adapters(model)
    else:
        model = with_adapters(model)
        report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == LLAMA.counts
    assert isinstance(model.base_model.model.model.layers[0].mlp.gate_proj, peft.tuners.lora.Linear)
    assert_same_step(model, stock, tolerance=1e-5)
    assert_same_state(model, stock)
    assert report.recheck() == []
    report.restore()
    assert classes(model) == classes(stock)
    assert_same_step(model, stock, tolerance=1e-7)


# the wrapped copy and the trainable one of a norm are both layers of the model
def test_peft_trains_the_norms() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["input_layernorm"])
    models = [peft.get_peft_model(model, config) for model in twins(LLAMA)]
    for model in models:
        torch.manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter)
    assert counts(ds_fused.apply(models[0], LAYER_KEYS))["rms_norm"] == 5 + 2
    assert_same_step(*models, tolerance=1e-5)


def test_gradient_checkpointing() -> None:
    model, stock = twins(LLAMA)
    ds_fused.apply(model)
    model.gradient_checkpointing_enable()
    assert_same_step(model, stock, tolerance=1e-5)


def test_tied_weights() -> None:
    model, stock = twins(LLAMA, tie_word_embeddings=True)
    report = ds_fused.apply(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_step(model, stock, tolerance=1e-5)
    report.restore()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_deepcopy_is_fused_and_independent() -> None:
    model = LLAMA.make()
    report = ds_fused.apply(model, LAYER_KEYS)
    twin = copy.deepcopy(model)
    assert sum(map(is_fused, twin.modules())) == sum(map(is_fused, model.modules())) == 9
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    assert_same_step(twin, model, tolerance=0.0)
    report.restore()
    assert sum(map(is_fused, twin.modules())) == 9


def test_saved_and_loaded(tmp_path: Path) -> None:
    model, stock = twins(LLAMA)
    ds_fused.apply(model)
    for name, each in (("fused", model), ("stock", stock)):
        each.save_pretrained(tmp_path / name)
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("fused", "stock")]
    assert config[0] == config[1] and config[0]["architectures"] == ["LlamaForCausalLM"]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("fused", "stock")]
    assert weights[0] == weights[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert classes(loaded) == classes(stock)
    assert_same_state(loaded, stock)
    ds_fused.apply(loaded)
    assert_same_step(loaded, stock, tolerance=1e-5)
    model.load_state_dict(torch.load(_saved(stock, tmp_path), weights_only=True))


def _saved(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


# what Accelerate plants on the instance would run instead of ours
def test_accelerate_hooks_are_left() -> None:
    model, stock = twins(LLAMA)
    for layer in model.model.layers:
        add_hook_to_module(layer.mlp, ModelHook())
    report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == {"rms_norm": 5, "rope": 2}
    (row,) = report.left
    assert (row.what, row.count) == ("LlamaMLP", 2)
    assert "a forward of its own, from accelerate.hooks" in row.reason
    assert_same_step(model, stock, tolerance=1e-5)
    remove_hook_from_module(model, recurse=True)


class LigerRMSNorm(nn.Module):
    """Named and placed as Liger's, which its patch puts into the modelling file before the model is built."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))


LigerRMSNorm.__module__ = "liger_kernel.transformers.rms_norm"


def theirs(package: str, of: object) -> object:
    """A function written in another package, under any name."""
    names: dict[str, object] = {"__name__": package, "of": of}
    exec("def patched(*args, **named):\n    return of(*args, **named)", names)
    return names["patched"]


def test_liger_classes_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "LlamaRMSNorm", LigerRMSNorm)
    report = ds_fused.apply(LLAMA.make(), LAYER_KEYS)
    assert counts(report) == {"rope": 2, "swiglu": 2}
    assert [(row.what, row.count, row.reason) for row in report.left] == [("LigerRMSNorm", 5, "Liger has replaced it")]


@pytest.mark.parametrize(("package", "name"), [("liger_kernel.transformers", "Liger"), ("deepspeed.ops", "DeepSpeed")])
def test_patched_forwards_and_functions_are_left(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", theirs(package, LlamaMLP.forward))
    rotary = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", theirs(package, rotary))
    model = LLAMA.make()
    norm = model.model.norm
    norm.forward = theirs(package, LlamaRMSNorm.forward).__get__(norm)
    report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == {"rms_norm": 4}
    assert {(row.what, row.count, row.reason) for row in report.left} == {
        ("LlamaMLP", 2, f"{name} has patched its forward"),
        ("LlamaRMSNorm", 1, f"{name} has patched its forward"),
        ("LlamaAttention", 2, f"{name} has replaced apply_rotary_pos_emb"),
    }


# by DeepSpeed's own hand: it leaves the wrapped function's name on what it puts in its place
def test_deepspeed_replacements_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = pytest.importorskip("deepspeed.ops.triton_ops.fused_rms_norm")
    rotary = pytest.importorskip("deepspeed.ops.triton_ops.fused_rotary_pos_emb")
    monkeypatch.setattr(LlamaRMSNorm, "forward", LlamaRMSNorm.forward)
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", modeling_llama.apply_rotary_pos_emb)
    model = LLAMA.make()
    assert norms.replace_rms_norm(model) == 5
    assert rotary.replace_rotary_pos_emb(model) == 1
    report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == {"swiglu": 2}
    assert {(row.what, row.count, row.reason) for row in report.left} == {
        ("LlamaRMSNorm", 5, "DeepSpeed has patched its forward"),
        ("LlamaAttention", 2, "DeepSpeed has replaced apply_rotary_pos_emb"),
    }


class MyNorm(LlamaRMSNorm):
    """A user's own class, in the user's own file, with the parent's forward."""


def test_a_users_subclass_is_claimed() -> None:
    model, stock = twins(LLAMA)
    for each in (model, stock):
        each.model.norm.__class__ = MyNorm
    report = ds_fused.apply(model, {"rms_norm": True})
    assert [(row.original.rpartition(".")[2], row.count) for row in report.replaced] == [
        ("LlamaRMSNorm", 4),
        ("MyNorm", 1),
    ]
    assert isinstance(model.model.norm, MyNorm)
    assert_same_step(model, stock, tolerance=1e-5)


def test_by_keyword_as_the_original_names_it() -> None:
    model = LLAMA.make()
    ds_fused.apply(model, LAYER_KEYS)
    x = torch.randn(2, 32)
    assert torch.equal(model.model.norm(hidden_states=x), model.model.norm(x))
    assert torch.equal(model.model.layers[0].mlp(x=x), model.model.layers[0].mlp(x))


# in one graph, before any step: neither the mix-ins nor the check of the first step may break it
@pytest.mark.parametrize(
    "name",
    ["Llama", "DeepseekV3", "Qwen3Next", *(pytest.param(n, marks=pytest.mark.all) for n in ("Glm4", "GptOss"))],
)
def test_compiles_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    model, stock = twins(NAMED[name])
    report = ds_fused.apply(model, LAYER_KEYS)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = batch()["input_ids"]
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)
    assert report.verify_live() == []


def test_first_forward_may_be_without_labels(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = twins(LLAMA)
    report = ds_fused.apply(model)
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits)
    assert report.verify_live() == [] and not caplog.messages
    assert torch.allclose(step(model)[0], step(stock)[0])


class HalfInEvaluation:
    """A mix-in for a layer that computes something else where it does not train."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.training else 0.5 * y


class HalfNorm(HalfInEvaluation, LlamaRMSNorm):
    pass


class HalfMLP(HalfInEvaluation, LlamaMLP):
    pass


class HalfHead(HalfInEvaluation, nn.Linear):
    pass


@pytest.mark.parametrize(
    ("cls", "path"), [(HalfNorm, "norm"), (HalfMLP, "mlp"), (HalfHead, "lm_head")], ids=["norm", "mlp", "head"]
)
def test_a_layer_that_is_another_in_evaluation_is_so_still(cls: type[nn.Module], path: str) -> None:
    model, stock = twins(LLAMA)
    for each in (model, stock):
        for name, layer in each.named_modules():
            if name.rpartition(".")[2] == path:
                layer.__class__ = cls
    report = ds_fused.apply(model)
    # of an MLP the product alone is replaced, within its own code
    assert cls is HalfMLP or any("in evaluation its output differs" in row.reason for row in report.left)
    assert_same_step(model, stock, tolerance=1e-5)
    losses = [each.eval()(**batch()).loss for each in (model, stock)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0.0)


# what estimates of memory run: no value is there to be read
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "bert"])
def test_fake_tensors(name: str) -> None:
    if name == "bert":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=128))
    else:
        model = NAMED[name].make(torch.bfloat16)
    assert counts(ds_fused.apply(model))["fused_linear_cross_entropy"] == 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        loss = model(**batch()).loss
        loss.backward()
    assert isinstance(loss, FakeTensor) and loss.shape == ()
    assert isinstance(model.get_output_embeddings().weight.grad, FakeTensor)
