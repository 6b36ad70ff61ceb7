"""The fused loss in one graph of torch.compile, without a model, and the deferred logits that leave it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.trainer_pt_utils import nested_detach

from ds_fused.modules.loss.head import linear_loss
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.modules.loss.out_of_graph import LogitsOutOfGraph
from tests.modules.head_model import RECORDED, VOCAB, OwnLoss, batch, gradients, pair
from tests.modules.test_deferred import MEASURED, OWN_LOSSES, WITHOUT_GRADIENTS


def compiled(model: nn.Module, **options: object) -> tuple[nn.Module, CompileCounterWithBackend]:
    """The model in one graph, unless options say otherwise, and what counts the graphs."""
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("eager")
    return torch.compile(model, backend=graphs, **{"fullgraph": True} | options), graphs


def same(stock: nn.Module, fused: nn.Module, whole: nn.Module, *inputs: Tensor, **more: object) -> None:
    """Loss and all gradients."""
    wanted, got = stock(*inputs, **more)["loss"], whole(*inputs, **more)["loss"]
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    ours = gradients(fused, got)
    for name, gradient in gradients(stock, wanted).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


def test_what_a_trainer_passes() -> None:
    stock, fused = pair(RECORDED["gemma2"])
    whole, graphs = compiled(fused)
    x, labels = batch()
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    for n, more in enumerate(({}, {"num_items_in_batch": torch.tensor(7)}, {"shift_labels": shifted}), 1):
        for scale in (1.0, 2.0):
            same(stock, fused, whole, scale * x, labels.flip(0), **more)
        assert graphs.frame_count == n
    same(stock, fused, whole, x, labels.masked_fill(labels < 0, 0), ignore_index=0)


def test_an_evaluation_and_batches_of_other_lengths() -> None:
    stock, fused = pair(RECORDED["gemma2"])
    whole, graphs = compiled(fused)
    x, labels = batch()
    for length in (5, 4, 3):
        same(stock, fused, whole, x[:, :length], labels[:, :length])
    # one for a length, one for all others
    assert graphs.frame_count == 2
    with torch.no_grad():
        torch.testing.assert_close(whole(x, labels)["loss"], stock(x, labels)["loss"])
        assert torch.equal(whole(x)["logits"], stock(x)["logits"])


@pytest.mark.parametrize("name", ["shifted, softcapped", "weighted classes", "each its own", "log_softmax"])
def test_a_loss_of_the_models_own(name: str) -> None:
    stock, fused = OwnLoss(OWN_LOSSES[name]), OwnLoss(OWN_LOSSES[name]).fuse()
    # of a masked model all tokens are looked at: how many have a label is nothing that a graph can depend on
    fused.head._ds_fused_scope.masked = True
    same(stock, fused, compiled(fused)[0], *batch())


# torch.compile has no inference mode
@pytest.mark.parametrize("name", [*sorted(MEASURED.keys() - {"in inference mode"}), *WITHOUT_GRADIENTS])
def test_what_is_done_without_gradients(name: str) -> None:
    loss = (MEASURED | WITHOUT_GRADIENTS)[name]
    stock, fused = OwnLoss(loss), OwnLoss(loss).fuse()
    same(stock, fused, compiled(fused)[0], *batch())


@pytest.mark.parametrize("what", ["the model", "more than the model"])
def test_logits_are_computed_when_they_are_read(what: str, caplog: pytest.LogCaptureFixture) -> None:
    stock, fused = pair(RECORDED["gemma2"], bias=True)
    whole, graphs = compiled(fused if what == "the model" else lambda *inputs: fused(*inputs))
    x, labels = batch()
    wanted, got = stock(x, labels), whole(x, labels)
    logits = got["logits"]
    assert type(logits) is (LogitsOnDemand if what == "the model" else LogitsOutOfGraph) and graphs.frame_count == 1
    for fact in ("shape", "dtype", "device", "ndim", "layout", "is_cuda"):
        assert getattr(logits, fact) == getattr(wanted["logits"], fact)
    assert repr(logits) and "are computed now" not in caplog.text
    assert torch.equal(logits.clone(), wanted["logits"])
    # as the Trainer's evaluation does
    assert torch.equal(torch.cat([nested_detach(logits), logits])[2:], wanted["logits"])
    # they have their place in the graph of the loss
    ours = gradients(fused, got["loss"] + logits.square().mean())
    for name, gradient in gradients(stock, wanted["loss"] + wanted["logits"].square().mean()).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)

    late = whole(x, labels)["logits"]
    assert "weight changed" not in caplog.text
    with torch.no_grad():
        fused.head.weight += 1.0
    assert not torch.equal(late.clone(), logits.clone())
    assert "weight changed" in caplog.text


def test_the_autocast_of_the_forward() -> None:
    stock, fused = pair()
    whole, _ = compiled(fused)
    x, labels = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted, got = stock(x, labels), whole(x, labels)
    torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-2, atol=1e-2)
    assert got["logits"].dtype == got["logits"].clone().dtype == torch.bfloat16
    assert torch.equal(got["logits"].clone(), wanted["logits"])


def test_logits_to_keep_are_in_the_graph() -> None:
    stock, fused = pair(RECORDED["gemma2"], logits="keep")
    whole, _ = compiled(fused)
    x, labels = batch()
    logits = whole(x, labels)["logits"]
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, stock(x, labels)["logits"])
    same(stock, fused, whole, x, labels)


def _written_to(z: Tensor) -> Tensor:
    views, copies = z[:, 1:], z.transpose(0, 1).contiguous()
    z.mul_(2.0)
    return z + views.sum() + copies.square().sum()


def test_logits_that_the_model_computes_and_writes_to() -> None:
    stock, fused = pair(_written_to)
    same(stock, fused, compiled(fused)[0], *batch())


def test_logits_that_are_read_in_the_graph() -> None:
    stock, fused = pair(RECORDED["gemma2"])
    x, labels = batch()

    def step(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = fused(x, labels)
        return out["loss"], out["logits"].argmax(-1)

    whole, graphs = compiled(step)
    wanted = stock(x, labels)
    loss, best = whole(x, labels)
    torch.testing.assert_close(loss, wanted["loss"])
    assert torch.equal(best, wanted["logits"].argmax(-1)) and graphs.frame_count == 1


def test_a_loss_behind_the_graph() -> None:
    stock, fused = pair()
    whole, _ = compiled(fused)
    x, labels = batch()
    scope = fused.head._ds_fused_scope
    scope.loss_outside = True
    assert type(whole(x)["logits"]) is LogitsOnDemand
    arguments = {"reduction": "mean", "ignore_index": -100, "label_smoothing": 0.1}
    ours = gradients(fused, linear_loss(scope.left[-1].view(-1, VOCAB), labels.view(-1), **arguments))
    wanted = F.cross_entropy(stock(x)["logits"].view(-1, VOCAB), labels.view(-1), label_smoothing=0.1)
    for name, gradient in gradients(stock, wanted).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-6)


def test_hooks_on_the_head_act_between_two_graphs() -> None:
    stock, fused = pair()
    calls = []
    fused.head.register_forward_pre_hook(torch.compiler.disable(lambda head, inputs: calls.append(head)))
    x, labels = batch()
    with pytest.raises(Unsupported, match="the lm head has hooks"):
        compiled(fused)[0](x, labels)
    calls.clear()
    whole, _ = compiled(fused, fullgraph=False)
    assert type(whole(x, labels)["logits"]) is LogitsOnDemand
    assert calls == [fused.head]
    same(stock, fused, whole, x, labels)
