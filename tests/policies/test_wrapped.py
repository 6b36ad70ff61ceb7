"""A fused model within what others make of a model: traces, exports, transforms, wrappers, trainers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.autograd import forward_ad

import ds_fused
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from tests.policies.tiny import LLAMA, NAMED, assert_same_step, batch, classes, counts, pair, twins


def test_under_transforms_of_torch_func(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    gradients, outputs = [], []
    for each in (model, stock):
        parameters = {name: p.detach() for name, p in each.named_parameters()}

        def loss(parameters: dict, each: nn.Module = each) -> torch.Tensor:
            return torch.func.functional_call(each, parameters, (), batch()).loss

        def logits(ids: torch.Tensor, each: nn.Module = each) -> torch.Tensor:
            return each(input_ids=ids[None], use_cache=False).logits

        gradients.append(torch.func.grad(loss)(parameters))
        outputs.append(torch.func.vmap(logits)(batch()["input_ids"]))
    for name, wanted in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*outputs)
    assert "a transform of torch.func" in caplog.text


def test_derivatives_that_go_forward(caplog: pytest.LogCaptureFixture) -> None:
    models = pair(attn_implementation="eager")
    ids = batch()["input_ids"]
    found = []
    for each in models:
        with forward_ad.dual_level():
            embeddings = each.get_input_embeddings()(ids).detach()
            dual = forward_ad.make_dual(embeddings, torch.linspace(-1, 1, 32).expand_as(embeddings))
            loss = each(inputs_embeds=dual, labels=batch()["labels"]).loss
            found.append(forward_ad.unpack_dual(loss))
    torch.testing.assert_close(*(each.tangent for each in found), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*(each.primal for each in found))
    assert "forward_ad" in caplog.text
    assert_same_step(*models, tolerance=1e-5)


def test_a_trace_with_labels(kernels: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    class Loss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, labels=labels, use_cache=False).loss

    model, stock = (each.to(kernels) for each in pair())
    ids, labels = batch()["input_ids"].to(kernels), batch()["labels"].to(kernels)
    traced = torch.jit.trace(Loss(model), (ids, labels))
    assert "torch.jit.trace" in caplog.text
    torch.testing.assert_close(traced(ids.flip(0), labels.flip(0)), Loss(stock)(ids.flip(0), labels.flip(0)))
    assert_same_step(model, stock, tolerance=1e-5)


def test_a_wrapped_model_is_fused_within() -> None:
    class Wrapped(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.inside = model

        def forward(self, **inputs: object) -> object:
            return self.inside(**inputs)

    for wrap in (Wrapped, nn.DataParallel):
        model, stock = twins(LLAMA)
        wrapped = wrap(model)
        assert sum(counts(ds_fused.apply(wrapped)).values()) == 11
        assert_same_step(wrapped, wrap(stock), tolerance=1e-5)
        # either is restored alone; the other then finds nothing
        ds_fused.restore(model)
        assert classes(model) == classes(stock)
        ds_fused.restore(wrapped)
        assert_same_step(wrapped, wrap(stock), tolerance=0.0)


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_in_ddp_logits_wait_as_well(options: dict, tmp_path: Path) -> None:
    """Where parameters may be unused it clones every output, which is no read."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, stock = (nn.parallel.DistributedDataParallel(each, **options) for each in pair())
        assert_same_step(model, stock, tolerance=1e-5)
        found = []
        for each in (model, stock):
            outputs = each(**batch())
            if each is model:
                assert isinstance(outputs.logits, LogitsOnDemand) and outputs.logits._source._values is None
            kept = outputs.logits.detach().clone()
            loss = outputs.loss + 1e-2 * outputs.logits.logsumexp(-1).square().mean()
            loss.backward()
            found.append([loss.detach(), kept, *(p.grad for p in each.parameters())])
        for ours, wanted in zip(*found, strict=True):
            assert type(ours) is torch.Tensor
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_trls_head_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """TRL 1.16 gives every model that it trains a forward of its own, which computes past the head."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL has no fused head")
    results = []
    for model in pair():
        utils.add_fused_lm_head(model)
        out = model(**batch(), fused_lm_head=True)
        out.loss.backward()
        results.append([out.loss.detach(), out.log_probs.detach(), *(p.grad for p in model.parameters())])
        # and without its switch the model's own, whose loss is fused
        found = model(**batch())
        assert isinstance(found.logits, LogitsOnDemand) == (len(results) == 1)
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-6)
    assert "Its instance has a forward of its own, from trl.trainer.utils" in caplog.text


def test_metrics_of_preprocessed_logits(tmp_path: Path) -> None:
    rows = [{name: x[0] for name, x in batch(seed).items()} for seed in range(4)]
    found = []
    for model in pair():
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(tmp_path, report_to=[], use_cpu=True, disable_tqdm=True),
            eval_dataset=rows,
            preprocess_logits_for_metrics=lambda logits, labels: _first(logits).argmax(-1),
            compute_metrics=lambda p: {"sum": int(p.predictions.sum()), "shape": p.predictions.shape},
        )
        metrics = trainer.evaluate()
        found.append([metrics["eval_sum"], metrics["eval_shape"], pytest.approx(metrics["eval_loss"], rel=1e-5)])
    assert found[0] == found[1] and found[0][1] == (4, 11)


def _first(logits: object) -> torch.Tensor:
    return logits[0] if isinstance(logits, tuple) else logits


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_with_labels(strict: bool) -> None:
    model, stock = pair()
    kwargs = {**batch(), "use_cache": False}
    exported = torch.export.export(model, (), kwargs, strict=strict).module()
    torch.testing.assert_close(exported(**kwargs)["loss"], stock(**kwargs).loss)


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_gradients_of_each_sample(family: str, caplog: pytest.LogCaptureFixture) -> None:
    """vmap of grad: neither the head's loss nor that of real logits stands in its way, nor experts."""
    gradients = []
    model, stock = twins(NAMED[family])
    assert counts(ds_fused.apply(model))["fused_linear_cross_entropy"] == 1
    for each in (model, stock):
        each.set_attn_implementation("eager")
        parameters = {name: p.detach() for name, p in each.named_parameters()}

        def loss(parameters: dict, ids: torch.Tensor, each: nn.Module = each) -> torch.Tensor:
            return torch.func.functional_call(each, parameters, (), {"input_ids": ids, "labels": ids}).loss

        ids = batch()["input_ids"][:, None]
        gradients.append(torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, ids))
    torch.testing.assert_close(*gradients)
