"""Label smoothing by HuggingFace's Trainer: the values of stock, and no logits."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import ds_fused
from ds_fused.modules.loss import head as head_module
from tests.policies.tiny_losses import BART, SIZES, batch, build


def bart() -> nn.Module:
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**SIZES | BART))


def trainer_of(
    model: nn.Module, folder: Path, smoothing: float = 0.1, kind: type = transformers.Trainer, **more: object
) -> transformers.Trainer:
    rows = []
    for i in range(4):
        row = {key: value[i % 2] for key, value in batch((2, 9)).items()}
        if model.config.is_encoder_decoder:
            # as its collator does
            row["decoder_input_ids"] = row["labels"].clamp_min(0).roll(1)
        rows.append(row)
    arguments = transformers.TrainingArguments(
        folder,
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        label_smoothing_factor=smoothing,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
        **more,
    )
    return kind(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=lambda p: {"accuracy": float((_logits(p).argmax(-1) == p.label_ids).mean())},
    )


def _logits(prediction: transformers.EvalPrediction):
    found = prediction.predictions
    return found[0] if isinstance(found, tuple) else found


@pytest.fixture
def fused_losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The smoothing of every linear_cross_entropy."""
    seen = []
    op = head_module.linear_cross_entropy

    def noted(*args, **named):
        seen.append(named["label_smoothing"])
        return op(*args, **named)

    monkeypatch.setattr(head_module, "linear_cross_entropy", noted)
    return seen


@pytest.mark.parametrize("make", [build, bart], ids=["llama", "bart"])
def test_trains_as_stock(make, tmp_path: Path, fused_losses: list[float], caplog) -> None:
    stock = make()
    fused = copy.deepcopy(stock)
    seen = []
    for model in (stock, fused):
        trainer = trainer_of(model, tmp_path)
        if model is fused:
            ds_fused.fuse_label_smoother(trainer)
            # a proof would be a loss, too
            ds_fused.apply(model, verify=False)
        trainer.train()
        metrics = trainer.evaluate()
        seen.append([metrics["eval_loss"], metrics["eval_accuracy"], *(p.detach().sum() for p in model.parameters())])
    torch.testing.assert_close(torch.tensor(seen[1]), torch.tensor(seen[0]), rtol=1e-4, atol=1e-5)
    # 2 steps of 2 batches, and an evaluation
    assert fused_losses == [0.1] * 5 and "not called" not in caplog.text


def test_a_compiled_model(tmp_path: Path, fused_losses: list[float]) -> None:
    model = build()
    ds_fused.apply(model, verify=False)
    trainer = trainer_of(model, tmp_path, torch_compile=True, torch_compile_backend="eager")
    ds_fused.fuse_label_smoother(trainer)
    trainer.train()
    assert fused_losses == [0.1] * 4


def test_mixed_precision(tmp_path: Path, fused_losses: list[float]) -> None:
    losses = []
    for model in (stock := build(), copy.deepcopy(stock)):
        trainer = trainer_of(model, tmp_path, bf16=True)
        if model is not stock:
            ds_fused.fuse_label_smoother(trainer)
            ds_fused.apply(model, verify=False)
        trainer.train()
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2) and fused_losses == [0.1] * 5


@pytest.mark.parametrize("items", [None, 7, torch.tensor(7)])
def test_a_loss_and_its_gradients(items, tmp_path: Path, fused_losses: list[float]) -> None:
    stock = build("Gemma2")
    fused = copy.deepcopy(stock)
    ds_fused.apply(fused, verify=False)
    results = []
    for model in (stock, fused):
        trainer = trainer_of(model, tmp_path)
        if model is fused:
            ds_fused.fuse_label_smoother(trainer)
        loss, outputs = trainer.compute_loss(model, batch(), return_outputs=True, num_items_in_batch=items)
        # a reader, and a gradient that comes through it
        (loss + outputs.logits.square().mean()).backward()
        results.append([loss.detach(), outputs.logits.detach().clone(), *(p.grad for p in model.parameters())])
    assert fused_losses == [0.1]
    for ours, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def both(trainer, model, inputs, labels):
    """Two forwards, and the loss of each."""
    first, second = model(**inputs), model(**inputs | {"input_ids": inputs["input_ids"].flip(-1)})
    smoothed = functools.partial(trainer.label_smoother, labels=labels, shift_labels=True)
    return smoothed(first) + 3 * smoothed(second)


def changed(trainer, model, inputs, labels):
    outputs = model(**inputs)
    outputs.logits = outputs.logits / 4
    return trainer.label_smoother(outputs, labels, shift_labels=True)


def written(trainer, model, inputs, labels):
    outputs = model(**inputs)
    with torch.no_grad():
        outputs.logits.detach()[..., 1] += 2.0
    return trainer.label_smoother(outputs, labels, shift_labels=True)


def detached(trainer, model, inputs, labels):
    outputs = model(**inputs)
    outputs.logits = outputs.logits.detach()
    return trainer.label_smoother(outputs, labels, shift_labels=True) + model(**inputs).logits.mean()


@pytest.mark.parametrize(("loss_of", "n_fused"), [(both, 2), (changed, 0), (written, 0), (detached, 0)])
def test_the_logits_that_are_smoothed_are_those_given(
    loss_of, n_fused: int, tmp_path: Path, fused_losses: list[float]
) -> None:
    class Trainer(transformers.Trainer):
        def compute_loss(self, model, inputs, *_, **__):
            return loss_of(self, model, inputs, inputs.pop("labels"))

    stock = build()
    fused = copy.deepcopy(stock)
    ds_fused.apply(fused, verify=False)
    results = []
    for model in (stock, fused):
        trainer = trainer_of(model, tmp_path, kind=Trainer)
        if model is fused:
            ds_fused.fuse_label_smoother(trainer)
        loss = trainer.compute_loss(model, batch())
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert fused_losses == [0.1] * n_fused
    for ours, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)


def test_elsewhere_forwards_without_labels_are_stock(tmp_path: Path, fused_losses: list[float]) -> None:
    model = build()
    ds_fused.apply(model, verify=False)
    trainer = trainer_of(model, tmp_path)
    undo = ds_fused.fuse_label_smoother(trainer)
    inputs = batch()
    trainer.compute_loss(model, dict(inputs))
    assert type(model(input_ids=inputs["input_ids"]).logits) is torch.Tensor
    with pytest.raises(ValueError, match="fused already"):
        ds_fused.fuse_label_smoother(trainer)
    # labels of which the trainer's own smoother has to say what is wrong
    with pytest.raises((RuntimeError, IndexError)):
        trainer.compute_loss(model, {**inputs, "labels": inputs["labels"][:, :4]})
    undo()
    trainer.compute_loss(model, dict(inputs))
    assert fused_losses == [0.1] and "compute_loss" not in vars(trainer)


def test_no_smoothing_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor is 0"):
        ds_fused.fuse_label_smoother(trainer_of(build(), tmp_path, smoothing=0.0))
    with pytest.raises(ValueError, match="it takes a Trainer of transformers, got a LlamaForCausalLM"):
        ds_fused.fuse_label_smoother(build())
