"""Heads and losses that are left alone, and those that only look as if they had to be."""

from __future__ import annotations

import copy
import functools
import logging
import types
from collections.abc import Callable
from functools import partial

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.loss import head as head_file
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.ops.common._say import say_once
from ds_fused.policies.loss import LINEAR, REAL, claim_loss
from tests.policies import losses_by_functions as library
from tests.policies.tiny_losses import VOCAB, batch, build, compare, fuse, left_alone


def test_a_head_of_the_users_own_class() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = build()
    model.lm_head = Scaled(16, VOCAB, bias=False)
    left_alone(model, "Scaled")


def test_a_head_of_another_class_that_computes_as_linear() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("...h,vh->...v", x, self.weight)

    class Dropped(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(nn.functional.dropout(x, 1e-6, self.training))

    class Wider(nn.Linear):
        def __init__(self, n_in: int, n_out: int) -> None:
            super().__init__(n_in, n_out - 2, bias=False)
            self.more = nn.Linear(n_in, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat((super().forward(x), self.more(x)), -1)

    stock = build()
    stock.lm_head = Own(16, VOCAB, bias=False)
    fused = copy.deepcopy(stock)
    (claim,), left = fuse(fused)
    assert left == [] and claim.original.endswith("Own") and claim.watched() == (type(fused.lm_head),)
    compare(stock, fused, **batch())
    claim.restore()
    assert type(fused.lm_head) is Own
    for cls, reason in ((Dropped, "random numbers"), (Wider, "no plain Linear")):
        model = build()
        model.lm_head = cls(16, VOCAB)
        left_alone(model, reason)


def test_a_head_with_a_forward_or_hooks_of_its_own() -> None:
    model = build()
    model.lm_head.forward = types.MethodType(lambda self, x: nn.Linear.forward(self, x) * 2, model.lm_head)
    left_alone(model, "forward of its own")
    model = build()
    model.lm_head.register_forward_hook(lambda module, args, out: out)
    left_alone(model, "hooks")


def test_a_forward_with_another_librarys_loss() -> None:
    def lce_forward(self, input_ids=None, labels=None):
        return self.loss_function(None, labels, VOCAB)

    for package, name in (("liger_kernel.transformers.model.llama", "Liger"), ("trl.trainer.utils", "TRL")):
        model = build()
        theirs = types.FunctionType(lce_forward.__code__, {"__name__": package})
        # as TRL does: the original's name and signature on top
        model.forward = types.MethodType(functools.wraps(type(model).forward)(theirs), model)
        left_alone(model, name)
    # a wrapped forward that leads to the original is none
    model = build()
    model.forward = functools.wraps(model.forward)(functools.partial(model.forward))
    fuse(model)
    assert isinstance(model(**batch()).logits, LogitsOnDemand)


class Sharded(Tensor):
    """As FSDP2's DTensors and torchao's quantised weights are: a tensor of another class."""


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(VOCAB, 16, dtype=torch.int8), "its weight is a Tensor of torch.int8"),
        (torch.zeros(VOCAB, 16).as_subclass(Sharded), "its weight is a Sharded of torch.float32"),
    ],
)
def test_a_weight_of_another_kind(weight: Tensor, reason: str) -> None:
    model = build(tie_word_embeddings=False)
    model.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    left_alone(model, reason)


@pytest.mark.parametrize("change", [parametrizations.weight_norm, partial(prune.identity, name="weight")])
def test_a_head_whose_weight_is_computed(change: Callable) -> None:
    model = build(tie_word_embeddings=False)
    change(model.lm_head)
    left_alone(model, "its weight is computed from other parameters")


def test_a_loss_of_the_users_own() -> None:
    model = build()
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.square().mean()
    left_alone(model, "not ForCausalLMLoss")
    assert type(model(**batch()).logits) is Tensor


def test_a_loss_of_the_users_own_around_stocks() -> None:
    """It has stock's name and module, and does more only where it is given more."""
    model, stock = build(), build()
    for each in (model, stock):
        original = each.loss_function

        @functools.wraps(original)
        def weighed(*args: object, importance: float = 1.0, original: object = original, **kwargs: object) -> Tensor:
            return importance * original(*args, **kwargs)

        each.loss_function = weighed
    left_alone(model, f"its loss is {__name__}.ForCausalLMLoss, not ForCausalLMLoss")
    losses = [each(**batch(), importance=3.0).loss for each in (model, stock)]
    torch.testing.assert_close(*losses)


def test_a_forward_that_computes_the_loss_itself() -> None:
    class Own(transformers.LlamaPreTrainedModel):
        def __init__(self, config) -> None:
            super().__init__(config)
            self.lm_head = nn.Linear(16, VOCAB)

        def get_output_embeddings(self) -> nn.Module:
            return self.lm_head

        def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
            return -self.lm_head(x).log_softmax(-1).gather(-1, labels[:, None]).mean()

    left_alone(Own(build().config), "computes the loss itself")


class ByTorchsClass(library.OnItsOwn):
    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.nn.CrossEntropyLoss()(logits, labels)


class ByTorchsName(library.OnItsOwn):
    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        from torch.nn.functional import cross_entropy as torchs

        return torchs(logits, labels)


def made(cls: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    stock = build()
    stock.__class__ = cls
    if cls is library.ByLayer:
        stock.loss_of = library.CrossEntropyLoss()
    return stock, copy.deepcopy(stock)


@pytest.mark.parametrize("cls", [ByTorchsClass, ByTorchsName], ids=lambda cls: cls.__name__)
def test_torchs_cross_entropy_by_any_road(cls: type[nn.Module]) -> None:
    stock, fused = made(cls)
    claims, left = fuse(fused)
    assert [claim.key for claim in claims] == [LINEAR] and left == []
    ids = batch()["input_ids"]
    compare(stock, fused, input_ids=ids, labels=ids)


@pytest.mark.parametrize(
    "cls",
    [library.ByFunction, library.ByClass, library.ByName, library.ByLayer, library.BesideTheModels],
    ids=lambda cls: cls.__name__,
)
def test_a_loss_by_a_function_of_autograd(cls: type[nn.Module]) -> None:
    stock, fused = made(cls)
    left_alone(fused, "losses_by_functions.Scored, an autograd.Function, which may be given the logits")
    ids = batch()["input_ids"]
    compare(stock, fused, logits=Tensor, input_ids=ids, labels=ids)


def of_itself(self: nn.Module, input_ids: Tensor, labels: Tensor) -> transformers.modeling_outputs.CausalLMOutput:
    hidden = self.model(input_ids).last_hidden_state
    logits = self.lm_head(hidden)
    loss = library.Scored.apply(logits.flatten(0, 1), labels.flatten()) + 1e-2 * hidden.square().mean()
    return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def around(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def forward(*args: Tensor, labels: Tensor, **named: Tensor) -> transformers.utils.ModelOutput:
        output = stock(*args, labels=labels, **named)
        output.loss = output.loss + library.Scored.apply(output.logits.flatten(0, 1), labels.flatten())
        return output

    return forward


@pytest.mark.parametrize("where", ["instance", "around the instance's", "around the class's"])
def test_a_loss_by_a_function_in_a_forward_that_was_patched_in(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if where == "around the class's":
        cls = transformers.LlamaForCausalLM
        monkeypatch.setattr(cls, "forward", around(cls.forward))
    stock, fused = build(), build()
    if where != "around the class's":
        for model in (stock, fused):
            model.forward = types.MethodType(of_itself, model) if where == "instance" else around(model.forward)
    left_alone(fused, "losses_by_functions.Scored, an autograd.Function, which may be given the logits")
    ids = batch()["input_ids"]
    compare(stock, fused, logits=Tensor, input_ids=ids, labels=ids)


@torch.jit.script
def scripted(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels)


class ByScript(library.OwnForward):
    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return scripted(logits, labels)


class ByScriptedLayer(library.OwnForward):
    def loss_of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.criterion(logits, labels)


@pytest.mark.parametrize(
    ("cls", "what"),
    [(ByScript, "scripted, a function of TorchScript"), (ByScriptedLayer, "CrossEntropyLoss, a layer of TorchScript")],
    ids=["function", "layer"],
)
def test_a_loss_by_torch_script(cls: type[nn.Module], what: str) -> None:
    stock, fused = made(cls)
    if cls is ByScriptedLayer:
        for model in (stock, fused):
            model.criterion = torch.jit.script(nn.CrossEntropyLoss())
    left_alone(fused, f"{what}, which may be given the logits")
    ids = batch()["input_ids"]
    compare(stock, fused, logits=Tensor, input_ids=ids, labels=ids)


@pytest.mark.parametrize("cls", [library.ByClassOnItsOwn, library.ByNameOnItsOwn], ids=lambda cls: cls.__name__)
def test_a_loss_that_has_but_the_name_of_torchs(cls: type[nn.Module]) -> None:
    left_alone(made(cls)[1], "its forward computes the loss itself, and not by torch's cross_entropy")


def test_a_loss_by_a_function_beside_real_logits() -> None:
    stock, fused = made(library.BesideTheModels)
    claims, left = fuse(fused, (LINEAR, REAL))
    assert [claim.key for claim in claims] == [REAL] and len(left) == 1
    ids = batch()["input_ids"]
    compare(stock, fused, logits=Tensor, input_ids=ids, labels=ids)


class Measured(transformers.LlamaForCausalLM):
    """Logs what it computes under no_grad before its loss, and has another loss beside it."""

    def forward(self, input_ids, labels=None, **kwargs):
        hidden = self.model(input_ids).last_hidden_state
        logits = self.lm_head(hidden)
        with torch.no_grad():
            self.accuracy = (logits[:, :-1].argmax(-1) == labels[:, 1:]).float().mean()
        loss = self.loss_function(logits, labels, VOCAB) + 1e-2 * hidden.square().mean()
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("options", [{}, {"logits": "keep"}, {"eval": "stock"}], ids=str)
def test_a_metric_without_gradients_before_the_loss(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, original = [], head_file.linear_cross_entropy
    monkeypatch.setattr(head_file, "linear_cross_entropy", lambda *a, **k: losses.append(1) or original(*a, **k))
    stock, fused = made(Measured)
    assert fuse(fused, **options)[1] == []
    compare(stock, fused, logits=Tensor if "logits" in options else LogitsOnDemand, **batch())
    assert torch.equal(fused.accuracy, stock.accuracy) and len(losses) == 1


def test_a_model_without_a_head_is_nobodys_matter() -> None:
    assert claim_loss(nn.Linear(2, 2), {LINEAR: {}, REAL: {}}) == ([], [])
    assert claim_loss(build().model, {LINEAR: {}}) == ([], [])
    assert claim_loss(build(), {}) == ([], [])


def test_a_subclass_that_reads_logits_in_its_forward() -> None:
    class Penalised(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.loss = out.loss + 1e-2 * out.logits.float().logsumexp(-1).square().mean()
            return out

    stock = build()
    stock.__class__ = Penalised
    fused = copy.deepcopy(stock)
    fuse(fused)
    # inside the forward the logits are computed, so what leaves is a real tensor
    compare(stock, fused, logits=Tensor, **batch())


def test_a_subclass_with_a_loss_on_its_own_logits() -> None:
    class Own(transformers.LlamaForCausalLM):
        def forward(self, input_ids, labels=None, **kwargs):
            logits = self.lm_head(self.model(input_ids).last_hidden_state)
            loss = nn.functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))
            return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)

    stock = build()
    stock.__class__ = Own
    fused = copy.deepcopy(stock)
    fuse(fused)
    compare(stock, fused, **batch())


class Checkpointed(transformers.LlamaForCausalLM):
    """The last norm, the head and, where ``with_loss``, the loss are run again in the backward."""

    use_reentrant, with_loss = False, True

    def forward(self, input_ids, labels=None, **kwargs):
        def tail(hidden: Tensor) -> Tensor:
            logits = self.lm_head(hidden.tanh())
            return self.loss_function(logits, labels, VOCAB) if self.with_loss else logits

        hidden = self.model(input_ids).last_hidden_state
        out = checkpoint(tail, hidden, use_reentrant=self.use_reentrant)
        loss = out if self.with_loss else self.loss_function(out, labels, VOCAB)
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=hidden.detach())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("with_loss", [True, False])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_the_head(use_reentrant: bool, with_loss: bool, tied: bool, monkeypatch, caplog) -> None:
    stock = build(tie_word_embeddings=tied)
    stock.__class__ = Checkpointed
    stock.use_reentrant, stock.with_loss = use_reentrant, with_loss
    fused = copy.deepcopy(stock)
    fuse(fused)
    calls, original = [], head_file.linear_cross_entropy

    def counted(*args: object, **options: object) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return original(*args, **options)

    monkeypatch.setattr(head_file, "linear_cross_entropy", counted)
    say_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="ds_fused")
    # evaluation between a forward and its backward changes nothing of what is repeated
    for between in (lambda model: None, evaluate):
        results = []
        for model in (stock, fused):
            model.zero_grad()
            loss = model(**batch()).loss
            between(model)
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters())])
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # of each step the loss of the forward and, where it is repeated, of the repetition; and that of the evaluation
    of_step = [] if use_reentrant else [True] * (1 + with_loss)
    assert calls == [*of_step, *of_step[:1], False, *of_step[1:]]
    assert ("use_reentrant=False" in caplog.text) == use_reentrant


def evaluate(model: nn.Module) -> None:
    with torch.no_grad():
        model.eval()(**batch())
    model.train()


class Outer(transformers.LlamaPreTrainedModel):
    """As vision-language models do: a causal LM within, and its logits or its labels handled outside."""

    def __init__(self, inner: nn.Module, loss_outside: bool) -> None:
        super().__init__(inner.config)
        self.inner, self.loss_outside = inner, loss_outside

    def get_output_embeddings(self) -> nn.Module:
        return self.inner.get_output_embeddings()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kwargs):
        if not self.loss_outside:
            return self.inner(input_ids, labels=labels, **kwargs)
        out = self.inner(input_ids, **kwargs)
        out.loss = self.loss_function(logits=out.logits, labels=labels, vocab_size=VOCAB)
        return out


@pytest.mark.parametrize("loss_outside", [True, False])
def test_a_causal_lm_within_another_model(loss_outside: bool) -> None:
    stock = Outer(build("Gemma2"), loss_outside)
    fused = copy.deepcopy(stock)
    claims, left = fuse(fused)
    assert left == [] and claims[0].site.owner is fused
    compare(stock, fused, **batch())
    claims[0].restore()
    compare(stock, fused, logits=Tensor, **batch())
