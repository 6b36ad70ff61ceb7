"""restore, the auto classes, and Liger's functions by their names."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import ds_fused
from ds_fused import compat
from ds_fused.doctor.architectures import architectures, config_for, model_class
from ds_fused.doctor.tiny import build, default_config, tiny_config
from ds_fused.modules.swap import is_fused
from tests.policies.tiny import FAMILIES, LLAMA, NAMED, assert_same_step, classes, counts, step, twins


def n_fused(model: nn.Module) -> int:
    return sum(map(is_fused, model.modules()))


def test_restore_undoes_every_apply() -> None:
    model, stock = twins(LLAMA)
    attributes = set(vars(model))
    ds_fused.apply(model.model, {"rms_norm": True})
    ds_fused.apply(model, {"swiglu": True})
    report = ds_fused.apply(model, {"rope": True, "fused_linear_cross_entropy": True})
    assert n_fused(model) == 5 + 2 + 2 + 1
    ds_fused.restore(model)
    assert classes(model) == classes(stock) and set(vars(model)) == attributes
    assert_same_step(model, stock, tolerance=0.0)
    report.restore()
    ds_fused.restore(model)
    assert classes(model) == classes(stock)


def test_a_copy_is_restored_alone() -> None:
    model = LLAMA.make()
    ds_fused.apply(model)
    twin = copy.deepcopy(model)
    ds_fused.restore(twin)
    assert n_fused(twin) == 0 and n_fused(model) == 10
    assert_same_step(model, twin, tolerance=1e-5)


def test_what_was_applied_is_no_part_of_a_pickle() -> None:
    model = LLAMA.make()
    ds_fused.apply(model, {"rms_norm": True, "swiglu": True})
    step(model)  # takes out what watches the first one
    loaded = pickle.loads(pickle.dumps(model))
    assert n_fused(loaded) == n_fused(model) == 7
    ds_fused.restore(loaded)
    ds_fused.restore(model)
    assert n_fused(model) == 0


def test_auto_classes(tmp_path: Path) -> None:
    stock = LLAMA.make()
    stock.save_pretrained(tmp_path)
    model = ds_fused.AutoModelForCausalLM.from_pretrained(tmp_path, fused={"rope": False})
    assert type(model) is transformers.LlamaForCausalLM and n_fused(model) == 5 + 2 + 1
    assert_same_step(model, stock, tolerance=1e-5)
    model, info = ds_fused.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert n_fused(model) == 10 and not info["missing_keys"]
    assert n_fused(ds_fused.AutoModelForCausalLM.from_config(stock.config)) == 10
    assert n_fused(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) == 0
    assert n_fused(ds_fused.AutoModelForCausalLM.from_config(stock.config, fused=False)) == 0
    assert n_fused(ds_fused.AutoModelForCausalLM.from_pretrained(tmp_path, fused=True)) == 10
    with pytest.raises(ValueError, match="AutoModelForCausalLM: fused is 'all'; it can be True, False or an object"):
        ds_fused.AutoModelForCausalLM.from_pretrained(tmp_path, fused="all")
    with pytest.raises(ValueError, match="there is no 'ropes'"):
        ds_fused.AutoModelForCausalLM.from_config(stock.config, fused={"ropes": True})


def test_compat_on_a_model() -> None:
    model, stock = twins(LLAMA)
    report = ds_fused.compat.apply_liger_kernel_to_llama(rope=False, model=model)
    assert counts(report) == {"rms_norm": 5, "swiglu": 2, "fused_linear_cross_entropy": 1}
    assert_same_step(model, stock, tolerance=1e-5)
    report.restore()
    assert classes(model) == classes(stock)
    # by position, as Liger's
    assert counts(compat.apply_liger_kernel_to_llama(False, True, False, False, True, model)) == {
        "swiglu": 2,
        "cross_entropy": 1,
    }


def test_compat_on_models_built_later(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    llama, qwen = LLAMA.make(), FAMILIES[3].make()
    llama.save_pretrained(tmp_path)
    before = {cls: dict(vars(cls)) for cls in (transformers.LlamaForCausalLM, transformers.LlamaModel)}
    patch = compat.apply_liger_kernel_to_llama()
    try:
        built = (
            transformers.AutoModelForCausalLM.from_pretrained(tmp_path),
            transformers.AutoModelForCausalLM.from_config(llama.config),
            transformers.LlamaForCausalLM(llama.config),
            transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[0],
        )
        assert [n_fused(model) for model in built] == [10] * 4
        assert [n_fused(each) for each in (llama, type(qwen)(qwen.config))] == [0, 0]
        assert_same_step(built[0], llama, tolerance=1e-5)
        with torch.device("meta"):
            assert n_fused(transformers.LlamaForCausalLM(llama.config)) == 0
        assert "has no weights yet" in caplog.text
    finally:
        patch.restore()
    assert before == {cls: dict(vars(cls)) for cls in before}
    assert n_fused(transformers.LlamaForCausalLM(llama.config)) == 0
    assert n_fused(built[0]) == 10
    ds_fused.restore(built[0])
    assert n_fused(built[0]) == 0


def test_what_compat_has_not_is_said() -> None:
    with pytest.raises(
        TypeError, match="apply_liger_kernel_to_llama: .*'rop'; it takes rope, cross_entropy, .*, model"
    ):
        compat.apply_liger_kernel_to_llama(rop=False)
    with pytest.raises(TypeError, match="apply_liger_kernel_to_llava: there is no 'rop'; there are .*rope"):
        compat.apply_liger_kernel_to_llava(rop=False)
    with pytest.raises(ValueError, match="the model must be a torch.nn.Module"):
        compat.apply_liger_kernel_to_llama(model="llama")
    with pytest.raises(AttributeError, match="'apply_liger_kernel_to_lama'; its families are deepseek_v2, .*llama"):
        _ = compat.apply_liger_kernel_to_lama


def test_a_text_family_within_another_module() -> None:
    names = {cls.__name__ for cls in compat._classes("gemma3_text")}
    assert "Gemma3ForCausalLM" in names and "Gemma3ForConditionalGeneration" not in names
    assert "Gemma3ForConditionalGeneration" in {cls.__name__ for cls in compat._classes("gemma3")}


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
def test_signatures_are_ligers() -> None:
    from liger_kernel.transformers import monkey_patch

    theirs = {name for name in vars(monkey_patch) if name.startswith("apply_liger_kernel_to_")}
    assert theirs == set(compat._FUNCTIONS)
    for name in theirs:
        wanted = inspect.signature(getattr(monkey_patch, name)).parameters.values()
        found = inspect.signature(getattr(compat, name)).parameters.values()
        assert [(p.name, p.default, p.kind) for p in found] == [(p.name, p.default, p.kind) for p in wanted], name


@pytest.mark.parametrize("family", compat.FAMILIES)
def test_every_family_has_models(family: str) -> None:
    assert compat._classes(family)


def tiny(family: str) -> Iterator[nn.Module]:
    """A model of each class of a family."""
    for name in architectures()[family]:
        cls = model_class(name)
        yield build(cls, config_for(cls, tiny_config(default_config(family))))


# a tower alone, no language model
@pytest.mark.parametrize("family", sorted(compat.FAMILIES.keys() - {"pixtral"}))
def test_every_switch_replaces_something(family: str) -> None:
    function = getattr(compat, f"apply_liger_kernel_to_{family}")
    wanted = {compat._RENAMED.get(name, name) for name, is_on in compat.FAMILIES[family].items() if is_on}
    models = list(tiny(family))
    found = {key for model in models for key in counts(function(model=model))}
    # ops that have others within, which are what Liger switches
    within = {"qk_norm_rope": {"rope"}, "experts": wanted & {"swiglu", "geglu"}}
    found = set().union(*(within.get(key, {key}) for key in found))
    # of the parts of some, more
    assert found == wanted or (found > wanted and family in compat._PARTS)
    patch = function()
    try:
        built = list(tiny(family))
    finally:
        patch.restore()
    assert list(map(n_fused, built)) == list(map(n_fused, models))


@pytest.mark.parametrize(
    ("switches", "found"),
    [
        ({}, {"experts", "qk_norm_rope"}),
        ({"swiglu": False}, {"qk_norm_rope"}),
        ({"rope": False}, {"experts"}),
    ],
)
def test_ops_that_have_others_within_follow_their_switches(switches: dict[str, bool], found: set[str]) -> None:
    report = compat.apply_liger_kernel_to_qwen3_moe(model=NAMED["Qwen3Moe"].make(), **switches)
    assert counts(report).keys() & {"experts", "qk_norm_rope"} == found


def test_parts_are_fused_as_their_own_families_are() -> None:
    text = {"rope", "rms_norm", "swiglu"}
    for model in (*tiny("llava"), *tiny("internvl"), *tiny("smolvlm")):
        function = getattr(compat, f"apply_liger_kernel_to_{model.config.model_type}")
        assert text <= counts(function(model=model)).keys()
        ds_fused.restore(model)
        assert counts(function(rope=False, model=model)).keys() & text == {"rms_norm", "swiglu"}
    patch = compat.apply_liger_kernel_to_llava(swiglu=False)
    try:
        (model,) = tiny("llava")
    finally:
        patch.restore()
    fused = {type(module).__name__ for module in model.modules() if is_fused(module)}
    assert {"LlamaRMSNorm", "LlamaAttention"} <= fused and "LlamaMLP" not in fused
