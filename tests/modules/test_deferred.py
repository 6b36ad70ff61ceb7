"""Deferred logits without a model: what is recorded, what computes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.loss import head as head_module
from ds_fused.modules.loss.deferred import DeferredLogits
from ds_fused.modules.loss.head_call import HeadCall
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.modules.swap import unswap
from ds_fused.ops.common._say import say_once
from tests.modules.head_model import (
    RECORDED,
    VOCAB,
    WIDTH,
    Model,
    OwnLoss,
    batch,
    computed,
    gradients,
    own,
    pair,
    same_gradients,
    shifted,
)

NOT_RECORDED = {
    "two biases": lambda z: z + torch.ones(VOCAB) + torch.ones(VOCAB),
    "a bias behind a scale": lambda z: z * 2.0 + torch.ones(VOCAB),
    "a bias for each token": lambda z: z + torch.ones(2, 5, 1),
    "tanh twice": lambda z: z.tanh().tanh(),
    "negative cap": lambda z: z.tanh() * -2.0,
    "scale by a tensor": lambda z: z * torch.full((), 0.7),
    "functional": lambda z: F.relu(z),
    "named": lambda z: torch.tanh(input=z),
    "the other one named": lambda z: torch.mul(2.0, other=z),
    "a step on log_softmax": lambda z: F.log_softmax(z, dim=-1) * 2.0,
    "log_softmax over tokens": lambda z: F.log_softmax(z, dim=1),
    "transposed classes": lambda z: z.transpose(1, 2).transpose(1, 2),
    "slice": lambda z: z[..., :VOCAB],
    "divided": lambda z: 1.0 / (z * z + 1.0),
    "method": lambda z: z.clamp(max=0.3),
    "list": lambda z: torch.stack([z, z]).mean(0),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", RECORDED)
def test_recorded_steps_are_fused(name: str, bias: bool) -> None:
    assert_fused(*pair(RECORDED[name], bias))


def assert_fused(stock: Model, fused: Model) -> None:
    x, labels = batch()
    wanted, got = stock(x, labels), fused(x, labels)
    assert isinstance(got["logits"], LogitsOnDemand), "no loss was fused"
    torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["logits"].detach().clone(), wanted["logits"].detach(), rtol=0, atol=0)
    same_gradients(stock, fused, lambda out: out["loss"])
    # and through logits that are read after the forward
    same_gradients(stock, fused, lambda out: out["loss"] + out["logits"].square().mean())


@pytest.mark.parametrize("name", NOT_RECORDED)
def test_any_other_operation_computes_real_logits(name: str) -> None:
    stock, fused = pair(NOT_RECORDED[name])
    x, labels = batch()
    wanted, got = stock(x, labels), fused(x, labels)
    assert type(got["logits"]) is Tensor
    torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["logits"], wanted["logits"], rtol=0, atol=0)
    same_gradients(stock, fused, lambda out: out["loss"])


def _where_labelled(z: Tensor, labels: Tensor) -> Tensor:
    mask = labels != -100
    return nn.CrossEntropyLoss()(z[mask], labels[mask])


OWN_LOSSES = {
    "flat": lambda z, y: F.cross_entropy(z.view(-1, VOCAB), y.view(-1)),
    "shifted": shifted,
    "shifted, softcapped": lambda z, y: shifted(torch.tanh(z / 2.0) * 2.0, y),
    "a mask": _where_labelled,
    "a sum of smoothed ones": lambda z, y: shifted(z, y, label_smoothing=0.2, reduction="sum"),
    "each its own": lambda z, y: shifted(z, y, reduction="none").square().mean(),
    "weighted classes": lambda z, y: shifted(z, y, weight=torch.arange(VOCAB) / VOCAB),
    "one row": lambda z, y: F.cross_entropy(z.reshape((10, z.size(-1)))[2:3], y.view(-1)[3:4]),
    "twice": lambda z, y: shifted(z, y) + 0.5 * F.cross_entropy(z.view(-1, VOCAB), y.view(-1)),
    "log_softmax": lambda z, y: F.nll_loss(z.view(-1, VOCAB).log_softmax(-1), y.view(-1)),
    "log_softmax in fp32": lambda z, y: F.nll_loss(F.log_softmax(z[0], -1, dtype=torch.float32), y[0], reduction="sum"),
    "transposed": lambda z, y: F.cross_entropy(
        z.transpose(0, 1).contiguous().view(-1, VOCAB), y.t().reshape(-1), reduction="none"
    ).std(),
    "row after row": lambda z, y: sum(F.cross_entropy(row, labels) for row, labels in zip(z, y, strict=True)),
    "one of three dimensions": lambda z, y: F.cross_entropy(z.view(1, 2, 5, -1)[:, -1].view(5, -1), y[1]),
}
OTHER_LOSSES = {
    "classes in dimension 1": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "classes in dimension 1, by chance": lambda z, y: F.cross_entropy(z[:, :2], torch.zeros(2, VOCAB).long()),
    "probabilities": lambda z, y: F.cross_entropy(z.view(-1, VOCAB), torch.full((10, VOCAB), 1 / VOCAB)),
    "nll_loss of no logarithms": lambda z, y: F.nll_loss(z.view(-1, VOCAB), y.view(-1)),
    "some columns": lambda z, y: F.cross_entropy(z[..., :7].reshape(-1, 7), y.view(-1) % 7),
    "a stride": lambda z, y: z[:, ::2].square().mean(),
    "one token": lambda z, y: z[:, -1].square().mean(),
    "other shapes": lambda z, y: z.view(VOCAB, -1).square().mean(),
}


@pytest.mark.parametrize("name", [*OWN_LOSSES, *OTHER_LOSSES])
def test_a_loss_of_the_models_own(name: str) -> None:
    stock, fused = own((OWN_LOSSES | OTHER_LOSSES)[name])
    x, labels = batch()
    wanted, got = stock(x, labels), fused(x, labels)
    assert type(got["logits"]) is (LogitsOnDemand if name in OWN_LOSSES else Tensor)
    torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got["logits"].detach().clone(), wanted["logits"].detach(), rtol=0, atol=0)
    same_gradients(stock, fused, lambda out: out["loss"])
    same_gradients(stock, fused, lambda out: out["loss"] + out["logits"].square().mean())


def test_a_loss_that_is_not_fused_is_said(caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    for name in ("flat", "nll_loss of no logarithms"):
        _, fused = own((OWN_LOSSES | OTHER_LOSSES)[name])
        fused(*batch())
        fused(*batch())
        said = ["OwnLoss was given labels" in message for message in caplog.messages].count(True)
        assert said == (name != "flat")
    say_once.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_of_the_models_own_has_its_dtype(dtype: torch.dtype) -> None:
    stock, fused = (model.to(dtype) for model in own(shifted))
    x, labels = batch()
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            wanted, got = stock(x.to(dtype), labels), fused(x.to(dtype), labels)
        assert got["loss"].dtype == wanted["loss"].dtype
        torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-2, atol=1e-2)


def test_writing_is_seen_through_views() -> None:
    def written(z: Tensor, labels: Tensor) -> Tensor:
        shifted = z[:, :-1]
        z[..., 3] = -7.0
        return F.cross_entropy(shifted.reshape(-1, VOCAB), labels[:, 1:].reshape(-1))

    def written_behind(z: Tensor, labels: Tensor) -> Tensor:
        z[:, 1:][..., 3] = -7.0
        return shifted(z, labels)

    def copied(z: Tensor, labels: Tensor) -> Tensor:
        mask = labels != -100
        kept = z[mask]
        z[..., 3] = -7.0
        return F.cross_entropy(kept, labels[mask]) + z.square().mean()

    def transposed(z: Tensor, labels: Tensor) -> Tensor:
        view, copy = z.transpose(0, 1), z.transpose(0, 1).contiguous()
        z[..., 3] = -7.0
        return sum(F.cross_entropy(each.reshape(-1, VOCAB), labels.t().reshape(-1)) for each in (view, copy))

    def arranged(z: Tensor, labels: Tensor) -> Tensor:
        # a copy, and a view of it; both of one row are views
        copy = z[:, :-1].contiguous()
        flat, one = copy.view(-1, VOCAB), z[:1, :-1].reshape(-1, VOCAB)
        z[..., 3] = -7.0
        copy[..., 5] = -7.0
        return (
            F.cross_entropy(flat, labels[:, 1:].reshape(-1)) + F.cross_entropy(one, labels[0, 1:]) + z.square().mean()
        )

    for loss in (written, written_behind, copied, transposed, arranged):
        stock, fused = own(loss)
        x, labels = batch()
        wanted, got = stock(x, labels), fused(x, labels)
        torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got["logits"].detach().clone(), wanted["logits"].detach(), rtol=0, atol=0)
        same_gradients(stock, fused, lambda out: out["loss"])


def _measured(measure: Callable, without_gradients: Callable = torch.no_grad) -> Callable:
    """A loss before which the forward measures something."""

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        with without_gradients():
            measure(z, labels)
        return shifted(z, labels)

    return loss


def _between(z: Tensor, labels: Tensor) -> Tensor:
    before = shifted(z, labels)
    with torch.no_grad():
        z.argmax(-1)
        shifted(z, labels)
    return before


MEASURED = {
    "accuracy": _measured(lambda z, y: (z[:, :-1].argmax(-1) == y[:, 1:]).float().mean()),
    "entropy": _measured(lambda z, y: -(z.softmax(-1) * F.log_softmax(z.float() / 2.0, -1)).sum()),
    "another cross entropy": _measured(shifted),
    "both": _measured(lambda z, y: (z.argmax(-1), shifted(z, y), z.view(-1, VOCAB).topk(3))),
    "detached": _measured(lambda z, y: z.detach().argmax(-1), torch.enable_grad),
    "in inference mode": _measured(lambda z, y: (z.argmax(-1), (z * 2.0).argmax(-1)), torch.inference_mode),
    "after the loss": _between,
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_loss_beside_what_was_measured_without_gradients_is_fused(name: str) -> None:
    assert_fused(*own(MEASURED[name]))


def _pulled_to(target: Callable, without_gradients: Callable = torch.no_grad) -> Callable:
    """A cross entropy, and what pulls the logits to a target without gradients that was made of them."""

    def loss(z: Tensor, labels: Tensor) -> Tensor:
        with without_gradients():
            pulled_to = target(z)
        return shifted(z, labels) + F.kl_div(z.log_softmax(-1), pulled_to.softmax(-1), reduction="batchmean")

    return loss


def _written_without_gradients(z: Tensor, labels: Tensor) -> Tensor:
    others, scaled = z[:, :-1], z * 2.0
    with torch.no_grad():
        z[..., 3] = -7.0
        others[:, 0] = 1.0
    return shifted(z, labels) + F.cross_entropy(others.reshape(-1, VOCAB), labels[:, 1:].reshape(-1)) + scaled.mean()


def _written_after_a_look(z: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        z.argmax(-1)
        z.view(-1, VOCAB).clamp_(max=0.1)
    return shifted(z, labels)


def _looked_at_first(z: Tensor, labels: Tensor) -> Tensor:
    scaled = z * 2.0
    with torch.no_grad():
        z.argmax(-1), z[:, 1:].argmax(-1), scaled.argmax(-1)
    return shifted(z, labels) + 1e-2 * z.logsumexp(-1).square().mean() + scaled[:, 1:].square().mean()


WITHOUT_GRADIENTS = {
    "scaled": _pulled_to(lambda z: z / 2.0),
    "scaled, then in fp64": _pulled_to(lambda z: (z / 2.0).double().float()),
    "a view": _pulled_to(lambda z: z.view(-1, VOCAB).view(2, 5, VOCAB)),
    "some of them, stacked": _pulled_to(lambda z: torch.stack(list(z[:, :]))),
    "detached": _pulled_to(lambda z: z.detach(), torch.enable_grad),
    "detached behind a step": _pulled_to(lambda z: torch.detach(z * 3.0).float(), torch.enable_grad),
    "a cross entropy of detached ones": lambda z, y: z.square().mean() + shifted(z.detach(), y),
    "written to": _written_without_gradients,
    "written to after a look": _written_after_a_look,
    "looked at first": _looked_at_first,
}


@pytest.mark.parametrize("name", WITHOUT_GRADIENTS)
def test_what_is_made_of_logits_without_gradients_passes_none(name: str) -> None:
    stock, fused = own(WITHOUT_GRADIENTS[name])
    x, labels = batch()
    torch.testing.assert_close(fused(x, labels)["loss"], stock(x, labels)["loss"], rtol=1e-6, atol=1e-6)
    same_gradients(stock, fused, lambda out: out["loss"])


def test_detached_logits_leave_the_forward_without_a_graph() -> None:
    stock, fused = pair()
    for model in (stock, fused):
        plain = model.forward
        model.forward = lambda x, y, plain=plain: {name: value.detach() for name, value in plain(x, y).items()}
    wanted, got = stock(*batch())["logits"], fused(*batch())["logits"]
    assert isinstance(got, Tensor) and not got.requires_grad
    assert torch.equal(got.clone(), wanted)


@pytest.mark.parametrize("labelled", ["some", "none"])
def test_only_labelled_tokens_reach_a_masked_head(labelled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    op = head_module.linear_cross_entropy
    monkeypatch.setattr(head_module, "linear_cross_entropy", lambda x, *a, **n: seen.append(len(x)) or op(x, *a, **n))
    stock, fused = own(OWN_LOSSES["flat"])
    fused.head._ds_fused_scope.masked = True
    x, labels = batch()
    labels[1] = -100
    if labelled == "none":
        labels[:] = -100
    wanted, got = stock(x, labels), fused(x, labels)
    assert seen == [4 if labelled == "some" else 10]
    torch.testing.assert_close(got["loss"], wanted["loss"], rtol=1e-6, atol=1e-6, equal_nan=True)
    if labelled == "some":
        assert gradients(stock, wanted["loss"]).keys() == gradients(fused, got["loss"]).keys()


def test_logits_that_the_model_writes_to_are_used_as_written() -> None:
    def mask(z):
        z[..., 3] = -5.0
        return z

    stock, fused = pair(mask)
    x, labels = batch()
    torch.testing.assert_close(fused(x, labels)["loss"], stock(x, labels)["loss"])
    same_gradients(stock, fused, lambda out: out["loss"])


def test_a_copy_made_before_the_write_keeps_its_values() -> None:
    def mask(z):
        scaled = z * 2.0
        z.zero_()
        return scaled

    stock, fused = pair(mask)
    x, labels = batch()
    torch.testing.assert_close(fused(x, labels)["loss"], stock(x, labels)["loss"])


def test_questions_about_deferred_logits_compute_nothing() -> None:
    head = Model().fuse().head
    logits = DeferredLogits(HeadCall(head, torch.randn(2, 5, WIDTH)))
    assert logits.shape == (2, 5, VOCAB) and logits.size(-1) == VOCAB and logits.size() == logits.shape
    assert logits.dim() == logits.ndim == 3 and len(logits) == 2 and logits.numel() == torch.numel(logits) == 10 * VOCAB
    assert logits.dtype == torch.float32 and logits.device.type == "cpu" and torch.is_floating_point(logits)
    assert logits.requires_grad and logits.is_contiguous() and "steps" in repr(logits)
    assert logits.to("cpu") is logits and logits.float() is logits and logits.to(torch.bfloat16).dtype == torch.bfloat16
    assert not logits.is_real()
    with torch.no_grad():
        assert logits.requires_grad and not (logits / 2.0).requires_grad and not logits[:, 1:].requires_grad


def test_without_labels_the_forward_is_stock() -> None:
    stock, fused = pair()
    x, _ = batch()
    out = fused(x)
    assert type(out["logits"]) is Tensor and torch.equal(out["logits"], stock(x)["logits"])


def test_labels_but_no_loss_gives_real_logits() -> None:
    stock, fused = pair(RECORDED["gemma2"])
    x, labels = batch()
    for model in (stock, fused):
        model.forward_with_loss, model.calls = model.loss_function, 0
        model.loss_function = lambda logits, labels, vocab: None
    wanted, got = stock(x, labels), fused(x, labels)
    assert type(got["logits"]) is Tensor and torch.equal(got["logits"], wanted["logits"])
    same_gradients(stock, fused, lambda out: out["logits"].square().mean())


def test_labels_by_position() -> None:
    stock, fused = pair()
    x, labels = batch()
    assert isinstance(fused(x, labels)["logits"], LogitsOnDemand)
    assert isinstance(fused(x, labels=labels)["logits"], LogitsOnDemand)
    assert type(fused(x, None)["logits"]) is Tensor


def test_a_forward_that_raises_disarms_the_head() -> None:
    _, fused = pair(lambda logits: logits.no_such_attribute if fused.broken else logits)
    x, labels = batch()
    fused.broken = True
    with pytest.raises(AttributeError, match="no_such_attribute"):
        fused(x, labels)
    fused.broken = False
    assert type(fused.head(x)) is Tensor
    assert type(fused(x)["logits"]) is Tensor
    assert isinstance(fused(x, labels)["logits"], LogitsOnDemand)


def test_a_forward_within_a_forward() -> None:
    stock, fused = pair()
    x, labels = batch()

    def peek(logits):
        if not fused.inside:
            fused.inside = True
            fused.seen = [fused(x)["logits"], fused(x, labels)["logits"]]
            fused.inside = False
        return logits

    fused.inside, fused.between = False, peek
    out = fused(x, labels)
    assert type(fused.seen[0]) is Tensor and isinstance(fused.seen[1], LogitsOnDemand)
    assert isinstance(out["logits"], LogitsOnDemand)
    torch.testing.assert_close(out["loss"], stock(x, labels)["loss"])


def hook_of(library: str, act: Callable) -> Callable:
    """As if a library had written it."""
    names = {"__name__": f"{library}.hooks", "act": act}
    exec("def hook(*args):\n    return act(*args)", names)
    return names["hook"]


def test_hooks_that_gather_weights_fire_once_and_around_the_loss() -> None:
    for library in ("deepspeed", "torch"):
        _, fused = pair()
        x, labels = batch()
        seen = []
        fused.head.register_forward_pre_hook(hook_of(library, lambda module, args, to=seen: to.append("before")))
        fused.head.register_forward_hook(hook_of(library, lambda module, args, out, to=seen: to.append(type(out))))
        fused(x, labels)
        assert seen == ["before", tuple]
        seen.clear()
        fused(x)
        assert seen == ["before", Tensor]


def test_logits_that_are_kept_are_computed_by_the_heads_own_call() -> None:
    """Where hooks gather its weight, no other way has a gradient for it."""
    _, fused = pair(logits="keep")
    seen: list = []
    fused.head.register_forward_hook(hook_of("deepspeed", lambda module, args, out: seen.append(type(out))))
    fused(*batch())
    assert seen == [tuple, Tensor]


def test_other_hooks_of_the_head_get_its_logits(caplog: pytest.LogCaptureFixture) -> None:
    say_once.cache_clear()
    stock, fused = pair()
    x, labels = batch()
    for model in (stock, fused):
        model.head.register_forward_hook(lambda module, args, out: out * 0.5)
        model.head.register_full_backward_hook(lambda module, given, came: (given[0] * 2,))
    same_gradients(stock, fused, lambda out: out["loss"])
    assert type(fused(x, labels)["logits"]) is Tensor
    assert "Its head was given hooks or a forward of its own since" in caplog.text


def test_other_hooks_of_the_model_see_tensors() -> None:
    model, seen = Model(), []
    model.register_forward_hook(lambda module, args, out: seen.append(type(out["logits"])))
    model.fuse()(*batch())
    assert seen == [LogitsOnDemand]


def test_keep_and_stock() -> None:
    x, labels = batch()
    stock, fused = pair(logits="keep")
    got, wanted = fused(x, labels), stock(x, labels)
    assert type(got["logits"]) is Tensor and torch.equal(got["logits"], wanted["logits"])
    same_gradients(stock, fused, lambda out: out["loss"] + out["logits"].square().mean())

    stock, fused = pair(eval="stock")
    assert isinstance(fused(x, labels)["logits"], LogitsOnDemand)
    out = fused.eval()(x, labels)
    assert type(out["logits"]) is Tensor and torch.equal(out["loss"], stock.eval()(x, labels)["loss"])
    _, fused = pair()
    assert isinstance(fused.eval()(x, labels)["logits"], LogitsOnDemand)


class Kept(OwnLoss):
    """Leaves its logits to whoever looks at them later, as attributes and elsewhere."""

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict:
        self.logits = self.head(self.body(x))
        self.scaled, self.elsewhere = self.logits / 2.0, {"shifted": self.logits[:, :-1]}
        return {"loss": self.own_loss(self.logits, labels)}


def test_logits_that_the_forward_keeps(caplog: pytest.LogCaptureFixture) -> None:
    stock, fused = Kept(shifted), Kept(shifted).fuse()
    x, labels = batch()
    stock(x, labels), fused(x, labels)
    for name in ("logits", "scaled"):
        late, wanted = getattr(fused, name), getattr(stock, name)
        assert type(late) is LogitsOnDemand and not computed(late)
        assert torch.equal(late.clone(), wanted)
    assert torch.equal(fused.elsewhere["shifted"].clone(), stock.elsewhere["shifted"])
    for of in (
        lambda model, loss: loss + model.scaled.square().mean(),
        lambda model, loss: loss + model.elsewhere["shifted"].square().mean(),
    ):
        wanted, got = (gradients(model, of(model, model(x, labels)["loss"])) for model in (stock, fused))
        for name in wanted:
            torch.testing.assert_close(got[name], wanted[name], rtol=1e-5, atol=1e-6)

    fused(x, labels)
    with torch.no_grad():
        fused.head.weight += 1.0
    assert "weight changed" not in caplog.text
    fused.elsewhere["shifted"].argmax(-1)
    assert "weight changed" in caplog.text

    # and real ones where no loss was fused
    stock, fused = (Kept(lambda z, y: z.square().mean()) for _ in range(2))
    for model in (stock, fused.fuse()):
        model(x, labels)
    assert type(fused.scaled) is Tensor and torch.equal(fused.scaled, stock.scaled)


def test_where_in_the_output_logits_stand() -> None:
    _, fused = pair()
    x, labels = batch()
    plain = fused.forward
    for place in (
        lambda out: (out["loss"], out["logits"]),
        lambda out: [out["loss"], (out["logits"],)],
        lambda out: {"inner": {"logits": out["logits"]}, "loss": out["loss"]},
        lambda out: out["logits"],
    ):
        fused.forward = lambda *a, place=place, **k: place(plain(*a, **k))
        leaves = torch.utils._pytree.tree_leaves(fused(x, labels))
        assert any(isinstance(leaf, LogitsOnDemand) for leaf in leaves)
        assert all(isinstance(leaf, Tensor) for leaf in leaves)


@pytest.mark.parametrize("around_the_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_under_another_autocast_than_its_loss(around_the_head: bool, dtype: torch.dtype) -> None:
    class Apart(OwnLoss):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict:
            hidden = self.body(x)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=around_the_head):
                logits = self.head(hidden.to(self.head.weight))
            loss = self.own_loss(logits, labels) if self.own_loss else self.loss_function(logits, labels, VOCAB)
            return {"loss": loss, "logits": logits}

    def without_gradients(z: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            largest = z.amax()
        return shifted(z, labels) + largest

    for loss in (shifted, without_gradients, None, lambda z, y: z.float().square().mean()):
        stock, fused = (model.to(dtype) for model in (Apart(loss), Apart(loss).fuse()))
        x, labels = batch()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not around_the_head):
            wanted, got = stock(x.to(dtype), labels), fused(x.to(dtype), labels)
        assert got["loss"].dtype == wanted["loss"].dtype and got["logits"].dtype == wanted["logits"].dtype
        torch.testing.assert_close(got["logits"].clone(), wanted["logits"], rtol=0, atol=0)
        # of fp32 logits a sum in fp32; of others what autocast makes of them
        bound = 1e-2 if wanted["logits"].dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(got["loss"], wanted["loss"], rtol=bound, atol=bound)
        ours, theirs = gradients(fused, got["loss"]), gradients(stock, wanted["loss"])
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=4 * bound, atol=bound)


def test_hidden_states_that_are_written_to(caplog: pytest.LogCaptureFixture) -> None:
    class Written(OwnLoss):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict:
            hidden = self.body(x)
            logits = self.head(hidden)
            hidden.mul_(self.factor)
            return {"loss": self.own_loss(logits, labels), "logits": logits, "hidden": hidden}

    for loss in (shifted, lambda z, y: z.square().mean()):
        model = Written(loss).fuse()
        model.factor = 0.5
        with torch.no_grad(), pytest.raises(RuntimeError, match="hidden states .* written to.*fused_linear_cross_ent"):
            model(*batch())
    # nothing tells of it there
    with torch.inference_mode():
        model(*batch())

    class Given(OwnLoss):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict:
            hidden = self.body(x)
            logits = self.head(hidden)
            return {"loss": self.own_loss(logits, labels), "logits": logits, "hidden": hidden}

    with torch.no_grad():
        first, second = (Given(shifted).fuse()(*batch()) for _ in range(2))
        wanted = first["logits"].clone()
        for out in (first, second):
            out["hidden"].zero_()
        assert torch.equal(first["logits"].clone(), wanted)
        with pytest.raises(RuntimeError, match="hidden states .* written to"):
            second["logits"].clone()


@pytest.mark.parametrize("options", [{}, {"grad_in_forward": False}], ids=str)
def test_a_second_derivative_is_refused(options: dict) -> None:
    fused = Model().fuse()
    fused.head._ds_fused_scope.linear = options
    loss = fused(*batch())["loss"]
    # without a hidden state to find back by, the first is refused at once
    with pytest.raises(RuntimeError, match="once_differentiable"):  # noqa: PT012
        gradients = torch.autograd.grad(loss, list(fused.parameters()), create_graph=True)
        sum(gradient.square().sum() for gradient in gradients).backward()


def test_half_precision_loss_is_fp32() -> None:
    stock, fused = Model(dtype=torch.bfloat16), Model(dtype=torch.bfloat16).fuse()
    x, labels = batch()
    got = fused(x.bfloat16(), labels)
    assert got["loss"].dtype == torch.float32
    torch.testing.assert_close(got["loss"], stock(x.bfloat16(), labels)["loss"], rtol=2e-2, atol=2e-2)


def test_a_deep_copy_is_fused_on_its_own() -> None:
    stock, fused = pair()
    twin = copy.deepcopy(fused)
    x, labels = batch()
    assert isinstance(twin(x, labels)["logits"], LogitsOnDemand)
    assert twin.head._ds_fused_scope is not fused.head._ds_fused_scope
    assert type(fused.head(x)) is Tensor
    same_gradients(stock, twin, lambda out: out["loss"])


def test_unswapped_head_is_a_plain_linear() -> None:
    _, fused = pair()
    before = set(vars(nn.Linear(1, 1)))
    unswap(fused.head)
    assert type(fused.head) is nn.Linear and set(vars(fused.head)) == before
