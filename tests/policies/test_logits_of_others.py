"""Logits that others than the model's own loss read, then or later: they are stock's."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ds_fused
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from tests.policies.tiny import LLAMA, VOCAB, assert_same_step, batch, pair, prompt, step

# logits that are read when the head has another weight, or none that is trained


class Rounded(nn.Module):
    """As quantisation-aware training rounds: its gradient passes."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + ((8 * weight).round() / 8 - weight).detach()


def frozen_since(model: nn.Module) -> torch.Tensor:
    out = model(**batch())
    out.loss.backward()
    model.requires_grad_(False)
    return out.logits


def parametrized(model: nn.Module) -> torch.Tensor:
    for name in ("lm_head", "model.layers.0.mlp.gate_proj"):
        nn.utils.parametrize.register_parametrization(model.get_submodule(name), "weight", Rounded())
    out = model(**batch())
    out.loss.backward()
    return out.logits


def with_other_weights(model: nn.Module) -> torch.Tensor:
    weights = {name: 1.1 * p for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, weights, (), batch())
    out.loss.backward()
    return out.logits


def with_another_parameter(model: nn.Module) -> torch.Tensor:
    out = model.eval()(**batch())
    model.lm_head.weight = nn.Parameter(2 * model.lm_head.weight.detach())
    return out.logits


@pytest.mark.parametrize("read", [frozen_since, parametrized, with_other_weights, with_another_parameter])
@pytest.mark.parametrize("tied", [True, False])
def test_logits_that_are_read_later(read: Callable, tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    found = []
    for model in pair(tie_word_embeddings=tied):
        logits = read(model)
        found.append([logits.argmax(-1), logits.detach().clone(), *(p.grad for p in model.parameters())])
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert "after the head's weight changed" not in caplog.text


@pytest.mark.parametrize("frozen", [True, False])
def test_a_weight_that_is_written_before_logits_are_read(frozen: bool, caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    model.requires_grad_(not frozen)
    # as an average of weights that takes their place for an evaluation
    before = copy.deepcopy(stock.state_dict())
    model.load_state_dict({name: 1.1 * x for name, x in before.items()})
    with torch.no_grad():
        out = model(**batch())
    model.load_state_dict(before)
    out.logits.argmax(-1)
    assert "after the head's weight changed" in caplog.text


# losses of the user's own, of real logits: log-probabilities of DPO and GRPO, distillation, penalties


def log_probs(model: nn.Module) -> torch.Tensor:
    logits = model(**prompt()).logits
    return logits.log_softmax(-1).gather(-1, batch()["input_ids"][..., None]).mean()


def distilled(model: nn.Module) -> torch.Tensor:
    teacher = LLAMA.make(hidden_size=16)
    ds_fused.apply(teacher, verify=False)
    with torch.no_grad():
        wanted = teacher(**batch()).logits
    out = model(**batch())
    return out.loss + nn.functional.kl_div(out.logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")


def penalised(model: nn.Module) -> torch.Tensor:
    out = model(**batch())
    entropy = torch.distributions.Categorical(logits=out.logits).entropy().mean()
    return out.loss + 1e-2 * out.logits.logsumexp(-1).square().mean() - 1e-2 * entropy


def weighted(model: nn.Module) -> torch.Tensor:
    # as most overrides of Trainer.compute_loss read: labels go in, and the model's own loss is not looked at
    logits, labels = model(**batch()).logits, batch()["labels"]
    losses = nn.CrossEntropyLoss(reduction="none")(logits[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1))
    return (losses * torch.linspace(0, 1, len(losses))).mean()


@pytest.mark.parametrize("loss_of", [log_probs, distilled, penalised, weighted], ids=lambda f: f.__name__)
def test_losses_of_logits(loss_of: Callable[[nn.Module], torch.Tensor], caplog: pytest.LogCaptureFixture) -> None:
    results = []
    for model in pair():
        loss = loss_of(model)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert ("a forward that was given no labels" in caplog.text) == (loss_of is log_probs)


def test_logits_that_nobody_trains_on_are_nothing_to_say(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = pair()
    assert model(**prompt()).logits.requires_grad
    with torch.no_grad():
        model(**prompt())
    model.generate(prompt()["input_ids"], max_new_tokens=2, do_sample=False)
    model(**batch()).loss.backward()
    assert not caplog.messages


def test_who_waits_for_a_gradient_of_logits_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = pair()
    outputs = model(**batch())
    # as DeepSpeed's on all outputs
    outputs.logits.register_hook(types.FunctionType((lambda gradient: None).__code__, {"__name__": "deepspeed.utils"}))
    assert not caplog.messages
    outputs.logits.retain_grad()
    outputs.logits.register_hook(lambda gradient: None)
    (message,) = caplog.messages
    assert "gradient of outputs.logits" in message and '"fused_linear_cross_entropy": false' in message


@pytest.mark.parametrize("detached", [True, False])
def test_a_compiled_function_of_the_logits(detached: bool) -> None:
    model, stock = pair()
    metric = torch.compile(lambda logits: logits.float().softmax(-1).square().sum(), backend="eager")
    found = []
    for each in (model, stock):
        outputs = each(**batch())
        value = metric(outputs.logits.detach() if detached else outputs.logits)
        each.zero_grad()
        (outputs.loss + value).backward()
        found.append((value.detach(), each.model.embed_tokens.weight.grad))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_a_head_that_has_other_rows_since(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair(tie_word_embeddings=True)
    for each in (model, stock):
        torch.manual_seed(3)
        each.set_input_embeddings(nn.Embedding(VOCAB + 11, each.config.hidden_size))
        each.tie_weights()
        each.config.vocab_size = VOCAB + 11
    assert_same_step(model, stock, tolerance=1e-5)
    logits = model(**batch()).logits
    assert type(logits) is LogitsOnDemand and logits.shape[-1] == VOCAB + 11
    # what stock finds wrong stays so
    for each in pair():
        each.lm_head.weight = nn.Parameter(torch.randn(VOCAB + 11, each.config.hidden_size))
        with pytest.raises((ValueError, RuntimeError)):
            each(**batch())


def test_a_parametrized_head_computes_its_weight_as_often_as_stock() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return weight

    found = []
    for each in pair():
        counting = Counting()
        nn.utils.parametrize.register_parametrization(each.lm_head, "weight", counting, unsafe=True)
        counting.calls = 0
        found.append((counting.calls, step(each)[0], counting.calls))
    assert [calls for *_, calls in found] == [1, 1]
    torch.testing.assert_close(found[0][1], found[1][1])
