"""TRL's trainers on a model that was fused before they had it: what they log, and the weights, are stock's.

Of its loss TRL 1.16 has a version of its own, in a forward that it puts on the model; the layers under it are fused.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import material
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import ds_fused

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

# what is generated ends where the template says so
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<eos>{% endgeneration %}"
    "{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
)
WORDS = [[f"word{(i * step) % 19}" for i in range(12)] for step in range(1, 17)]
PROMPTS = [" ".join(words[:5]) for words in WORDS]
ANSWERS = [" " + " ".join(words[5:]) for words in WORDS]
WORSE = [" " + " ".join(words[3:9]) for words in WORDS]
TALKS = [
    [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
]
DATA = {
    "text": {"text": [" ".join(words) for words in WORDS]},
    "talks": {"messages": TALKS},
    "completions": {"prompt": PROMPTS, "completion": ANSWERS},
    "preferences": {"prompt": PROMPTS, "chosen": ANSWERS, "rejected": WORSE},
    "ratings": {"prompt": PROMPTS, "completion": ANSWERS, "label": [i % 2 == 0 for i in range(len(WORDS))]},
    "prompts": {"prompt": PROMPTS},
}


def variety(completions: list[str], **_: object) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


# name -> trainer, data, arguments of the trainer's configuration and of the trainer
USES: dict[str, tuple[str, str, dict, dict]] = {
    "packed": ("SFT", "text", {"packing": True, "max_length": 24}, {}),
    "assistant only": ("SFT", "talks", {"assistant_only_loss": True}, {}),
    "completion only": ("SFT", "completions", {"completion_only_loss": True}, {}),
    "smoothed": ("SFT", "text", {"label_smoothing_factor": 0.1}, {}),
    "dpo": ("DPO", "preferences", {}, {}),
    "ipo": ("DPO", "preferences", {"loss_type": ["ipo"]}, {}),
    "kto": ("KTO", "ratings", {}, {}),
    "grpo": ("GRPO", "prompts", {"num_generations": 2, "max_completion_length": 6}, {"reward_funcs": variety}),
    "rloo": ("RLOO", "prompts", {"num_generations": 2, "max_completion_length": 6}, {"reward_funcs": variety}),
    "gkd": ("GKD", "talks", {"max_new_tokens": 4, "lmbda": 0.5}, {}),
    "distilled": ("Distillation", "prompts", {"max_completion_length": 6}, {}),
    "orpo": ("ORPO", "preferences", {}, {}),
    "cpo": ("CPO", "preferences", {}, {}),
    "reward": ("Reward", "preferences", {}, {}),
}
QUICK = ("packed", "dpo")
EXPERIMENTAL = ("GKD", "ORPO", "CPO")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    where = str(tmp_path_factory.mktemp("model"))
    material.make(where)
    return where


def trainer_of(folder: str, out: Path, use: str, prepare: Callable[[nn.Module], object]) -> trl.SFTTrainer:
    kind, data, settings, more = USES[use]
    home = import_module(f"trl.experimental.{kind.lower()}") if kind in EXPERIMENTAL else trl
    arguments = {
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "seed": 0,
    }
    torch.manual_seed(0)
    head = AutoModelForSequenceClassification if kind == "Reward" else AutoModelForCausalLM
    model = head.from_pretrained(folder, dtype=torch.float32, **({"num_labels": 1} if kind == "Reward" else {}))
    prepare(model)
    if kind in ("GKD", "Distillation"):
        more = {"teacher_model": AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)}
        prepare(more["teacher_model"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    return getattr(home, f"{kind}Trainer")(
        model=model,
        args=getattr(home, f"{kind}Config")(**arguments | settings),
        train_dataset=datasets.Dataset.from_dict(DATA[data]),
        processing_class=tokenizer,
        **more,
    )


def trained(trainer: trl.SFTTrainer) -> tuple[dict, dict]:
    """What was logged, by name, and the weights."""
    trainer.train()
    logged: dict[str, list[float]] = {}
    for row in trainer.state.log_history:
        for name, value in row.items():
            if isinstance(value, float) and not any(word in name for word in ("time", "per_second", "flos", "epoch")):
                logged.setdefault(name, []).append(value)
    return logged, {name: p.detach() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("use", [use if use in QUICK else pytest.param(use, marks=pytest.mark.all) for use in USES])
def test_trains_as_stock(use: str, folder: str, tmp_path: Path) -> None:
    wanted, weights = trained(trainer_of(folder, tmp_path, use, lambda model: None))
    found, ours = trained(trainer_of(folder, tmp_path, use, ds_fused.apply))
    assert found.keys() == wanted.keys() and len(wanted["loss"]) == 2
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("use", ["packed", pytest.param("completion only", marks=pytest.mark.all)])
def test_a_loss_that_is_left_to_the_model(use: str, folder: str, tmp_path: Path) -> None:
    wanted, weights = trained(trainer_of(folder, tmp_path, use, lambda model: None))
    trainer = trainer_of(folder, tmp_path, use, lambda model: None)
    if "forward" not in vars(trainer.model):
        pytest.skip("this TRL has no fused head")
    left = [row.reason for row in ds_fused.apply(trainer.model).left if row.what.startswith("loss of ")]
    assert len(left) == 1 and "TRL has patched its forward" in left[0] and "fuse_sft_loss(trainer)" in left[0]
    ds_fused.restore(trainer.model)

    ds_fused.fuse_sft_loss(trainer)
    report = ds_fused.apply(trainer.model)
    assert {"fused_linear_cross_entropy"} <= {claim.key for claim in report.claims}
    found, ours = trained(trainer)
    assert trainer.model.lm_head._ds_fused_scope.fused
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
    assert wanted.keys() - found.keys() == {"entropy", "mean_token_accuracy", "num_tokens"}
    for name, weight in weights.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-3, atol=1e-4)


def test_a_loss_that_is_not_the_models_is_named(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it takes an SFTTrainer of TRL, got a DPOTrainer"):
        ds_fused.fuse_sft_loss(trainer_of(folder, tmp_path, "dpo", lambda model: None))
    with pytest.raises(ValueError, match="smooths labels, for which there is fuse_label_smoother"):
        ds_fused.fuse_sft_loss(trainer_of(folder, tmp_path, "smoothed", lambda model: None))
    trainer = trainer_of(folder, tmp_path, "packed", lambda model: None)
    trainer.args.loss_type = "dft"
    with pytest.raises(ValueError, match="loss_type is 'dft'"):
        ds_fused.fuse_sft_loss(trainer)
    trainer.args.loss_type = "nll"
    forward, compute_loss = trainer.model.forward, trainer.compute_loss
    undo = ds_fused.fuse_sft_loss(trainer)
    assert "forward" not in vars(trainer.model)
    with pytest.raises(ValueError, match="TRL has put no forward of its own"):
        ds_fused.fuse_sft_loss(trainer)
    undo()
    assert (trainer.model.forward, trainer.compute_loss) == (forward, compute_loss)
