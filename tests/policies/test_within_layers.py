"""What holds for both fusions within layers, a sum with its norm and norms with their rotation: they train as stock."""

from __future__ import annotations

import copy
from typing import NamedTuple

import peft
import pytest
import torch
from torch import nn

import ds_fused
from ds_fused.modules.layers import norm, qk_norm
from tests.policies.tiny import (
    LAYERS,
    NAMED,
    assert_as_accurate,
    assert_same_state,
    assert_same_step,
    batch,
    classes,
    counts,
    shapes_of_calls,
    twins_fused_by,
)


class Fusion(NamedTuple):
    key: str
    needs: tuple[str, ...]
    op: tuple[object, str]  # the module that calls it, and its name there
    usual: str  # the family of the tests that need one
    families: tuple[str, ...]
    in_16_bits: tuple[str, ...]
    compiled: tuple[str, ...]

    @property
    def keys(self) -> dict[str, bool]:
        return dict.fromkeys((*self.needs, self.key), True)


RESIDUAL = Fusion(
    "add_rms_norm", ("rms_norm",), (norm, "add_rms_norm"), "Llama",
    families=(
        "Llama",
        "Mistral",
        "Qwen3",
        "Phi3",  # a dropout before the sum
        "Mixtral",
        "Gemma2",  # norms before the sum as well
        "Gemma4Text",  # and a scalar that the layer's output is multiplied by in place
        "Granite",  # what is added is scaled
        "FalconH1",  # the sum of two
        "Qwen3Next",  # asks what its MLP has returned
    ),
    in_16_bits=("Llama", "Gemma2", "Granite"), compiled=("Llama", "Gemma2", "Qwen3Next"),
)  # fmt: skip
QK_NORM = Fusion(
    "qk_norm_rope", ("rms_norm", "rope"), (qk_norm, "rms_norm_rope"), "Qwen3",
    families=(
        "Qwen3",  # norms before heads and tokens are transposed
        "Qwen3Moe",
        "Gemma3Text",  # behind that; 1 + weight, rounded once
        "Exaone4",  # some layers do not turn
    ),
    in_16_bits=("Qwen3", "Gemma3Text"), compiled=("Qwen3", "Gemma3Text"),
)  # fmt: skip
FUSIONS = (RESIDUAL, QK_NORM)


class Run(NamedTuple):
    """One fusion at work: the shapes of the calls of its op since the twins were made."""

    fusion: Fusion
    calls: list[tuple[int, ...]]

    def twins(self, name: str | None = None) -> tuple[nn.Module, nn.Module]:
        return twins_fused_by(self.fusion.keys, self.fusion.key, NAMED[name or self.fusion.usual], self.calls)


def each(of: str = "usual") -> pytest.MarkDecorator:
    """Every fusion, or every one with each of its families of a kind."""
    pairs = [(f, name) for f in FUSIONS for name in ((f.usual,) if of == "usual" else getattr(f, of))]
    return pytest.mark.parametrize(
        ("run", "name"), pairs, indirect=["run"], ids=[f"{f.key}-{name}" for f, name in pairs]
    )


@pytest.fixture
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(request.param, shapes_of_calls(monkeypatch, *request.param.op))


@each("families")
def test_it_trains_as_stock(run: Run, name: str) -> None:
    model, stock = run.twins(name)
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(run.calls) == LAYERS
    assert_same_state(model, stock)
    ds_fused.restore(model)
    assert classes(model) == classes(stock)
    assert all("fused_waits" not in vars(module) for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each("in_16_bits")
def test_is_as_accurate_as_stock_in_16_bits(run: Run, name: str, dtype: torch.dtype) -> None:
    report = assert_as_accurate(NAMED[name], dtype, "cpu", run.fusion.keys)
    assert counts(report)[run.fusion.key] == LAYERS


@pytest.mark.gpu
@each("families")
def test_is_as_accurate_as_stock_on_a_gpu(run: Run, name: str) -> None:
    report = assert_as_accurate(NAMED[name], torch.bfloat16, "cuda", run.fusion.keys)
    assert counts(report)[run.fusion.key] == LAYERS


@each()
def test_autocast(run: Run, name: str) -> None:
    model, stock = run.twins(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_step(model, stock, tolerance=0.02)
    assert len(run.calls) == LAYERS


@pytest.mark.parametrize("reentrant", [False, True])
@each()
def test_gradient_checkpointing(run: Run, name: str, reentrant: bool) -> None:
    model, stock = run.twins(name)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(run.calls) == 2 * LAYERS


@each()
def test_generation_with_a_cache(run: Run, name: str) -> None:
    model, stock = run.twins(name)
    ids = batch()["input_ids"]
    made = [twin.eval().generate(ids, max_new_tokens=5, do_sample=False) for twin in (model, stock)]
    assert torch.equal(*made)
    assert len(run.calls) == 5 * LAYERS
    # the prompt, and then a token at a time
    assert {11, 1} <= {n for shape in run.calls for n in shape}


@each()
def test_peft(run: Run, name: str) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    both = list(run.twins(name))
    for i, twin in enumerate(both):
        torch.manual_seed(3)
        both[i] = peft.get_peft_model(twin, config)
    assert_same_step(*both, tolerance=1e-5)
    assert len(run.calls) == LAYERS


@each("compiled")
def test_compiles_in_one_graph(run: Run, name: str) -> None:
    torch.compiler.reset()
    model, stock = run.twins(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = batch()["input_ids"]
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, stock(ids, use_cache=False).logits)
    assert len(run.calls) >= LAYERS


@each()
def test_a_copy_is_fused_too(run: Run, name: str) -> None:
    model, stock = run.twins(name)
    assert_same_step(copy.deepcopy(model), stock, tolerance=1e-5)
    assert len(run.calls) == LAYERS


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion.key)
def test_whether_it_is_on_where_nothing_is_said(fusion: Fusion) -> None:
    make = NAMED[fusion.usual].make
    assert (fusion.key in counts(ds_fused.apply(make()))) == (fusion is QK_NORM)
    assert fusion.key not in counts(ds_fused.apply(make(), **{fusion.key: False}))
