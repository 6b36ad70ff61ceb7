"""The doctor of models: tiny configurations, and what it says of a model that agrees and of one that doesn't."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from ds_fused.doctor import __main__ as doctor
from ds_fused.doctor.diagnosis import diagnose, errors
from ds_fused.doctor.shrink import LEFT_OUT, SPECIAL, VOCAB, shrink
from ds_fused.doctor.tiny import batches, build, tiny_config
from ds_fused.modules.layers import norm


def test_one_layer_of_each_kind_is_kept() -> None:
    config = {
        "num_hidden_layers": 6,
        "layer_types": ["a", "a", "a", "b", "a", "b"],
        "windows": [1, 1, 1, 1, 1, 2],
        "depths": [1, 2],
        "per_layer_config": {"3": {"hidden_size": 512}, "4": {"hidden_size": 99}},
    }
    assert shrink(config, {}) == {
        "num_hidden_layers": 3,
        "layer_types": ["a", "b", "b"],
        "windows": [1, 1, 2],
        "depths": [1, 2],
        "per_layer_config": {1: {"hidden_size": 64}},
    }
    assert shrink({"num_hidden_layers": 40}, {}) == {"num_hidden_layers": 2}


def test_sizes_by_their_names() -> None:
    config = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 1000, "expand": 2}
    small = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": VOCAB, "expand": 2}
    assert shrink(config, {}) == small
    # as many heads of keys as of queries stay as many
    assert shrink(config | {"num_key_value_heads": 32}, {})["num_key_value_heads"] == 4
    assert shrink(config | {"num_key_value_heads": 1, "head_dim": None}, {})["num_key_value_heads"] == 1


def test_special_tokens_stay_apart() -> None:
    config = {
        "image_token_id": 50001,
        "video_token_id": 50002,
        "eos_token_id": [7, 8],
        "text": {"image_token_id": 50001},
    }
    small = shrink(config, {})
    assert small["image_token_id"] == small["text"]["image_token_id"] >= SPECIAL
    assert small["image_token_id"] != small["video_token_id"] and small["eos_token_id"] == [2, 2]


def test_changes_come_last() -> None:
    config = {"text_config": {"hidden_size": 512, "head_dim": 99}, "quantization_config": {"bits": 4}}
    changes = {"text_config.hidden_size": 8, "text_config.head_dim": LEFT_OUT, "vision_config.depth": 3}
    assert shrink(config, changes) == {"text_config": {"hidden_size": 8}, "vision_config": {"depth": 3}}


def test_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = transformers.Gemma2Config(num_hidden_layers=12, vocab_size=5000, architectures=["Gemma2ForCausalLM"])
    config.save_pretrained(tmp_path)
    for model in (tmp_path, tmp_path / "config.json"):
        assert doctor.main([str(model)]) == doctor.AGREES
        told = capsys.readouterr().out
        assert "Gemma2ForCausalLM" in told and "loss: fused" in told and "gradients agree with stock" in told
    tiny_config(config).save_pretrained(tmp_path)
    assert doctor.main([str(tmp_path), "--whole"]) == doctor.AGREES
    tiny = tiny_config(config)
    assert tiny.num_hidden_layers == 2 and sorted(tiny.layer_types) == ["full_attention", "sliding_attention"]


def test_a_type_and_what_is_none(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["bart"]) == doctor.AGREES
    assert capsys.readouterr().out.count("loss: fused") == 2
    assert doctor.main(["no/such-model"]) == doctor.NOT_RUN
    assert doctor.main(["fast_vlm"]) == doctor.NOT_RUN or transformers.utils.is_timm_available()
    assert "FastVlmForConditionalGeneration can't be built or run: ImportError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ('{"model_type": "llama", "hidden_size": "big"}', "'hidden_size' expected int"),
        ('{"model_type": "llama", "num_attention_heads": 7}', "not a multiple of the number of attention heads"),
        ("[]", "TypeError"),
        ("[", "not a valid JSON file"),
    ],
)
def test_a_configuration_that_is_none(config, says, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(config)
    assert doctor.main([str(tmp_path / "config.json")]) == doctor.NOT_RUN
    [line] = capsys.readouterr().out.splitlines()
    assert says in line


# words of several codebooks at once, a spectrogram instead of words, one configuration for two directions
@pytest.mark.parametrize("model_type", ["musicgen", "pop2piano", "reformer"])
def test_batches_of_other_kinds(model_type: str) -> None:
    assert doctor.main([model_type]) == doctor.AGREES


def test_a_type_without_a_loss_of_words(capsys: pytest.CaptureFixture) -> None:
    assert doctor.main(["pi0"]) == doctor.NOT_RUN
    assert "its forward takes no labels" in capsys.readouterr().out


def test_a_wrong_replacement_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    right = norm.rms_norm
    # right in what the proof draws, wrong in a width of a model's
    wrong = lambda x, *args, **named: right(x, *args, **named) * (1.01 if x.shape[-1] == 64 and x.ndim == 3 else 1.0)  # noqa: E731
    monkeypatch.setattr(norm, "rms_norm", wrong)
    monkeypatch.setattr("ds_fused.policies.plan._outcome", lambda *_: None)
    assert doctor.main(["llama"]) == doctor.DIFFERS
    assert "gradients DIFFERENT: " in capsys.readouterr().out


def test_a_model_that_disagrees_with_itself_is_no_judge() -> None:
    config = tiny_config(transformers.LlamaConfig())
    model = build(transformers.LlamaForCausalLM, config)
    calls = []
    model.model.norm.register_forward_hook(lambda module, args, out: out * (1 + len(calls) + (calls.append(0) or 0)))
    with pytest.raises(ValueError, match="two stock steps differ"):
        diagnose(model, next(batches(model)))
    assert type(model.lm_head) is nn.Linear


def test_errors() -> None:
    wanted = {"loss": torch.tensor(2.0), "gradient of a": torch.tensor([3.0, 4.0]), "gradient of b": torch.zeros(2)}
    assert set(errors(wanted, wanted).values()) == {0.0}
    found = errors(wanted | {"gradient of a": torch.tensor([3.0, 4.5])}, wanted)
    assert found["gradient of a"] == pytest.approx(0.1) and found["loss"] == found["gradient of b"] == 0.0
    assert errors(wanted | {"loss": torch.tensor(float("nan"))}, wanted)["loss"] == math.inf
    assert errors({"loss": wanted["loss"]}, wanted) == {"gradient of a": math.inf, "gradient of b": math.inf}
    # against the largest gradient, where its own is nothing
    assert errors(wanted | {"gradient of b": torch.tensor([1e-9, 0.0])}, wanted)["gradient of b"] < 1e-5


def test_fp64_is_the_judge() -> None:
    model = build(transformers.LlamaForCausalLM, tiny_config(transformers.LlamaConfig()))
    # as if stock's fp32 were exact: no model is
    found = diagnose(model, next(batches(model)), tolerance=2e-8)
    assert 2e-8 < found.worst < 1e-6 and found.differs == ""
    assert next(model.parameters()).dtype == torch.float32
