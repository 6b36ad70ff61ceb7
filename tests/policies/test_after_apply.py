"""What people do to a model behind apply: it trains as stock still, and restore finds its way back."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
import types
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.autograd import forward_ad
from transformers.loss.loss_utils import LOSS_MAPPING

import ds_fused
from ds_fused.modules.layers.product import ACT_NAMES
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.modules.swap import is_fused
from ds_fused.ops.common._say import say_once
from tests.policies.tiny import LLAMA, NAMED, VOCAB, assert_same_step, batch, classes, counts, step, twins


@pytest.fixture(autouse=True)
def say_again() -> None:
    say_once.cache_clear()


def pair(**config: object) -> tuple[nn.Module, nn.Module]:
    model, stock = twins(LLAMA, **config)
    assert counts(ds_fused.apply(model))["fused_linear_cross_entropy"] == 1
    return model, stock


def n_hooks(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


# the model's whole life in one file, as torch.save(model) writes it


@pytest.mark.parametrize("steps", [0, 1])
def test_a_pickle_of_the_model(steps: int, caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    for _ in range(steps):
        step(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert sum(map(is_fused, loaded.modules())) == sum(map(is_fused, model.modules())) == 10
    assert_same_step(loaded, stock, tolerance=1e-5)
    assert isinstance(loaded(**batch()).logits, LogitsOnDemand)
    ds_fused.restore(loaded)
    assert classes(loaded) == classes(stock) and loaded.loss_function is stock.loss_function
    assert "_loss_function" not in vars(loaded)
    assert_same_step(loaded, stock, tolerance=0.0)
    assert type(loaded(**batch()).logits) is torch.Tensor
    # nothing of it was the original's
    assert_same_step(model, stock, tolerance=1e-5)
    assert not caplog.messages


def test_a_copy_of_the_head_alone_copies_nothing_else() -> None:
    model, stock = pair()

    class Owner:
        lock = None

        def __init__(self) -> None:
            self.lock = threading.Lock()  # can't be copied

        def hook(self, *_: object) -> None: ...

    model.register_forward_hook(Owner().hook)
    head = copy.deepcopy(model.lm_head)
    x = torch.randn(3, 32)
    assert torch.equal(head(x), stock.lm_head(x)) and head._ds_fused_scope is not model.lm_head._ds_fused_scope
    assert_same_step(model, stock, tolerance=1e-5)


def test_a_copy_watches_its_own_first_step() -> None:
    model, stock = pair()
    twin = copy.deepcopy(model)
    step(twin)
    # the scope's two are left, and the first step of the other is still to come
    assert (n_hooks(twin), n_hooks(model)) == (2, 4)
    step(model)
    assert n_hooks(model) == 2
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert_same_step(averaged.module, stock, tolerance=1e-5)


# another dtype, other weights, another head


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 3e-2)])
def test_another_dtype(dtype: torch.dtype, tolerance: float) -> None:
    # ForCausalLMLoss is of fp32 also where the model is of more
    model, stock = (each.to(dtype) for each in pair())
    assert_same_step(model, stock, tolerance)


def test_weights_tied_and_untied() -> None:
    model, stock = pair(tie_word_embeddings=False)
    for each in (model, stock):
        each.config.tie_word_embeddings = True
        each.tie_weights()
        assert each.lm_head.weight is each.model.embed_tokens.weight
    assert_same_step(model, stock, tolerance=1e-5)
    for each in (model, stock):
        each.lm_head.weight = nn.Parameter(each.lm_head.weight.detach().clone())
    assert_same_step(model, stock, tolerance=1e-5)


def test_weights_that_come_later() -> None:
    model, stock = pair()
    model.to("meta").to_empty(device="cpu").load_state_dict(stock.state_dict())
    model.model.rotary_emb = copy.deepcopy(stock.model.rotary_emb)  # its buffers are in no state dict
    assert_same_step(model, stock, tolerance=1e-5)


def test_a_vocabulary_resized(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    for each in (model, stock):
        each.resize_token_embeddings(VOCAB + 12, mean_resizing=False)
    stock.load_state_dict(model.state_dict())
    assert_same_step(model, stock, tolerance=1e-5)
    assert "Its head was exchanged since" in caplog.text
    assert type(model(**batch()).logits) is torch.Tensor
    # a second apply can't know of the first head; it says what to do, and then all is fused
    assert "ds_fused.restore(model) comes before another apply" in str(ds_fused.apply(model))
    ds_fused.restore(model)
    assert classes(model) == classes(stock)
    assert counts(ds_fused.apply(model, strict=False))["fused_linear_cross_entropy"] == 1
    assert_same_step(model, stock, tolerance=1e-5)
    assert model(**batch()).logits.shape[-1] == VOCAB + 12


def own_loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **_: object) -> torch.Tensor:
    return logits.float().square().mean()


def test_a_loss_of_the_users_own_that_comes_later(caplog: pytest.LogCaptureFixture) -> None:
    model, stock = pair()
    for each in (model, stock):
        each.loss_function = own_loss
    assert_same_step(model, stock, tolerance=1e-5)
    assert "Its loss_function was exchanged since, and is now own_loss" in caplog.text
    ds_fused.restore(model)
    assert model.loss_function is own_loss
    assert_same_step(model, stock, tolerance=0.0)


@pytest.mark.parametrize(("loss_type", "is_fused"), [("ForMaskedLM", True), ("own", False)])
def test_a_loss_type_that_is_set_later(
    loss_type: str, is_fused: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(LOSS_MAPPING, "own", own_loss)
    model, stock = pair()
    step(model)
    twin = copy.deepcopy(model)
    for each in (twin, model, stock):
        each.loss_type = loss_type
    assert_same_step(model, stock, tolerance=1e-5)
    assert_same_step(twin, stock, tolerance=1e-5)
    # a loss that is PyTorch's cross entropy takes logits that wait
    assert (type(model(**batch()).logits) is LogitsOnDemand) == is_fused
    assert ("Its loss_type was exchanged since, ForCausalLM for own" in caplog.text) == (not is_fused)
    ds_fused.restore(model)
    assert classes(model) == classes(stock) and model.loss_function is stock.loss_function
    assert_same_step(model, stock, tolerance=0.0)


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


# adapters that come later


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head(options: dict, caplog: pytest.LogCaptureFixture) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["q_proj"], **options})

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    model, stock = map(adapted, pair())
    assert_same_step(model, stock, tolerance=1e-5)
    assert "PEFT has wrapped its head since" in caplog.text
    # the copies as well, which PEFT has made of what was fused
    ds_fused.restore(model)
    assert classes(model) == classes(stock)
    assert_same_step(model, stock, tolerance=1e-6)


def test_adapters_merged_and_unloaded() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "gate_proj"], modules_to_save=["input_layernorm"], init_lora_weights=False
    )
    models = []
    for model in pair():
        torch.manual_seed(3)
        models.append(peft.get_peft_model(model, config).merge_and_unload().requires_grad_())
    assert_same_step(*models, tolerance=1e-5)
    ds_fused.restore(models[0])
    assert classes(models[0]) == classes(models[1])


def test_generation_between_steps() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    models, optimizers = [], []
    for model in pair():
        torch.manual_seed(3)
        models.append(peft.get_peft_model(model, config))
        optimizers.append(torch.optim.SGD(models[-1].parameters(), lr=0.1))
    for _ in range(2):
        said = []
        for model, optimizer in zip(models, optimizers, strict=True):
            model.train()(**batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            said.append(model.eval().generate(**prompt(), max_new_tokens=4, do_sample=False))
            with model.disable_adapter(), torch.no_grad():
                said.append(model(**batch()).loss)
        assert torch.equal(said[0], said[2])
        torch.testing.assert_close(said[1], said[3])


def prompt() -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch().items() if name != "labels"}


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


# other wrappers


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


# a forward that somebody interrupts, as in a notebook


def interrupt(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    def interrupting(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupting)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    hook.remove()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("inputs", [batch, prompt])
def test_behind_an_interrupted_forward(inputs: Callable, times: int) -> None:
    model, stock = pair()
    for _ in range(times):
        interrupt(model, inputs())
    scope = model.lm_head._ds_fused_scope
    hidden = model.model(batch()["input_ids"]).last_hidden_state
    assert type(model.lm_head(hidden)) is torch.Tensor and not scope.is_running()
    interrupt(model, inputs())
    assert_same_step(copy.deepcopy(model), stock, tolerance=1e-5)
    assert_same_step(pickle.loads(pickle.dumps(model)), stock, tolerance=1e-5)
    assert_same_step(model, stock, tolerance=1e-5)
    assert isinstance(model(**batch()).logits, LogitsOnDemand) and not scope.is_running()
    assert type(model(**prompt()).logits) is torch.Tensor


def test_a_hook_that_fails_behind_the_first_forward_is_what_is_raised() -> None:
    model, stock = pair()

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = model.register_forward_hook(fail, prepend=True)
    with pytest.raises(ZeroDivisionError):
        model(**batch())
    hook.remove()
    assert_same_step(model, stock, tolerance=1e-5)
    # that was the first one
    assert n_hooks(model) == 2


def test_logits_that_are_kept_are_read_by_nobody(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = twins(LLAMA)
    ds_fused.apply(model, logits="keep")
    assert type(model(**batch()).logits) is torch.Tensor and not caplog.messages


def test_an_interrupted_forward_keeps_nothing_of_its_caller() -> None:
    model, _ = pair()

    def train() -> weakref.ref:
        local = torch.ones(3)
        interrupt(model, batch())
        return weakref.ref(local)

    assert train()() is None


def test_a_forward_that_fails_within_another_is_looked_at_before_it_ends() -> None:
    """By a hook that is called in front of ours, when the inner forward has left its frame."""
    model, stock = pair()
    running: list[bool] = []
    tries = iter([True])

    def fail_once(*_: object) -> None:
        if next(tries, False):
            with pytest.raises(ZeroDivisionError):
                model(**batch())
        elif len(running) == 0:
            raise ZeroDivisionError

    model.register_forward_hook(
        lambda *_: running.append(model.lm_head._ds_fused_scope.is_running()), always_call=True, prepend=True
    )
    hook = model.model.norm.register_forward_pre_hook(fail_once)
    outputs = model(**batch())
    hook.remove()
    assert isinstance(outputs.logits, LogitsOnDemand) and running == [True, True]
    assert_same_step(model, stock, tolerance=1e-5)


def test_replicas_in_threads() -> None:
    """As nn.DataParallel has them: one leaves its forward while another is in the middle of its own."""
    model, stock = pair()
    wanted = stock(**batch()).loss.item()
    first, second = _replica(model), _replica(model)
    entered, left = threading.Event(), threading.Event()

    def wait_for_the_first(*_: object) -> None:
        entered.set()
        assert left.wait(60)

    first.model.register_forward_pre_hook(lambda *_: entered.wait(60) and None)
    second.model.register_forward_pre_hook(wait_for_the_first)
    losses = {}

    def run(name: str, replica: nn.Module) -> None:
        losses[name] = replica(**batch()).loss.item()

    threads = [threading.Thread(target=run, args=each) for each in (("second", second), ("first", first))]
    for thread in threads:
        thread.start()
    threads[1].join(60)
    left.set()
    threads[0].join(60)
    assert losses == pytest.approx({"first": wanted, "second": wanted}, rel=1e-5)


def _replica(module: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate makes one, of a layer and all within."""
    replica = module._replicate_for_data_parallel()
    replica._forward_pre_hooks = copy.copy(replica._forward_pre_hooks)
    for name, child in module._modules.items():
        replica._modules[name] = _replica(child)
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else 1 * parameter)
    return replica


def test_an_interrupted_forward_within_another() -> None:
    """The outer one goes on."""
    model, stock = pair()
    for each in (model, stock):
        within = []

        def call_again(trunk: nn.Module, args: tuple, each: nn.Module = each, within: list = within) -> None:
            if not within:
                within.append(True)
                interrupt(each, prompt())
                within.clear()

        each.model.register_forward_pre_hook(call_again)
    assert_same_step(model, stock, tolerance=1e-5)
    assert isinstance(model(**batch()).logits, LogitsOnDemand)


# hooks and forwards that come later


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """Where they run: only these write over what projections return."""
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return device


@pytest.mark.parametrize("within", [False, True], ids=["its own", "of a layer within"])
def test_what_a_hook_keeps_of_a_projection_stays(within: bool, kernels: torch.device) -> None:
    model = pair()[0].to(kernels)
    kept = []
    mlp = model.model.layers[1].mlp
    mlp.up_proj.register_forward_hook(lambda _, x, y: kept.append((y, y.detach().clone())))
    if within:
        mlp.up_proj = nn.Sequential(mlp.up_proj)
    step(model)
    ((output, then),) = kept
    assert torch.equal(output, then)


@pytest.mark.parametrize(
    "hook",
    [lambda layer, x, y: torch.tanh(y), lambda layer, x, y: y * y.square().mean().rsqrt()],
    ids=["tanh", "product"],
)
@pytest.mark.parametrize("where", ["up_proj", "act_fn"])
def test_a_hook_within_an_mlp_has_its_way(hook: Callable, where: str, kernels: torch.device) -> None:
    model, stock = pair()
    for each in (model, stock):
        each.to(kernels).model.layers[1].mlp.get_submodule(where).register_forward_hook(hook)
    assert_same_step(model, stock, tolerance=1e-5)


def test_a_hook_on_an_activation_within_tiles() -> None:
    model, stock = twins(LLAMA)
    ds_fused.apply(model, tiles=3)
    for each in (model, stock):
        each.model.layers[1].mlp.act_fn.register_forward_hook(lambda layer, x, y: torch.tanh(y))
    assert_same_step(model, stock, tolerance=1e-5)


@pytest.mark.parametrize(
    "behind", [nn.Tanh(), nn.ReLU(), nn.Sequential(nn.Sigmoid(), nn.Unflatten(-1, (48,)))], ids=str
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_projection_whose_result_its_backward_reads(when: str, behind: nn.Module, kernels: torch.device) -> None:
    model, stock = twins(LLAMA)
    if when == "after":
        ds_fused.apply(model)
    for each in (model, stock):
        mlp = each.to(kernels).model.layers[1].mlp
        mlp.gate_proj = nn.Sequential(mlp.gate_proj, behind)
    if when == "before":
        assert counts(ds_fused.apply(model))["swiglu"] == 2
    assert_same_step(model, stock, tolerance=1e-5)


@pytest.mark.parametrize("names", [("gate_proj",), ("up_proj",), ("gate_proj", "up_proj")], ids=" and ".join)
@pytest.mark.parametrize("projection", [nn.Identity(), nn.Unflatten(-1, (32,))], ids=["itself", "a view"])
def test_a_projection_that_returns_what_it_is_given(
    projection: nn.Module, names: tuple[str, ...], kernels: torch.device
) -> None:
    model, stock = pair(intermediate_size=32)
    for each in (model, stock):
        for name in names:
            setattr(each.to(kernels).model.layers[1].mlp, name, projection)
    assert_same_step(model, stock, tolerance=1e-5)


def test_a_backward_hook_before_an_activation_has_its_way() -> None:
    model, stock = pair()
    for each in (model, stock):
        act = each.model.layers[1].mlp.act_fn
        act.register_full_backward_pre_hook(lambda layer, grads: tuple(3 * grad for grad in grads))
    assert_same_step(model, stock, tolerance=1e-5)


# which are functions of PyTorch's, and so are ZeRO-3's hooks, which are passed over
DECORATORS = {
    "no_grad": torch.no_grad(),
    "inference_mode": torch.inference_mode(),
    "compiler.disable": torch.compiler.disable,
    "autocast": torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("decorate", DECORATORS.values(), ids=DECORATORS)
@pytest.mark.parametrize("partial", [False, True], ids=["", "partial"])
@pytest.mark.parametrize("where", ["lm_head", "model.layers.1.mlp.act_fn"])
def test_a_hook_under_a_decorator_sees_what_stock_shows_it(where: str, partial: bool, decorate: Callable) -> None:
    def hook(layer: nn.Module, x: tuple, y: torch.Tensor) -> None:
        seen.append(y.detach().clone())

    found = []
    for each in pair():
        seen = []
        decorated = decorate(hook)
        each.get_submodule(where).register_forward_hook(functools.partial(decorated) if partial else decorated)
        step(each)
        found.append(seen)
    torch.testing.assert_close(*found)
    assert len(seen) == 1


def test_a_method_under_a_decorator_is_a_hook(kernels: torch.device) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.seen = []

        @torch.no_grad()
        def hook(self, layer: nn.Module, x: tuple, y: torch.Tensor) -> None:
            self.seen.append((y, y.clone()))

    recorder, model = Recorder(), pair()[0].to(kernels)
    model.model.layers[1].mlp.up_proj.register_forward_hook(recorder.hook)
    step(model)
    ((output, then),) = recorder.seen
    assert torch.equal(output, then)


# hooks of all modules: each expects of a layer what that returns without ds_fused
def changed(layer: nn.Module, x: tuple, y: object) -> object:
    return y * 1.1 if isinstance(layer, nn.Linear) or "Norm" in type(layer).__name__ else None


def changed_act(layer: nn.Module, x: tuple, y: object) -> object:
    return torch.tanh(y) if type(layer) is ACT else None


def changed_before(layer: nn.Module, x: tuple) -> object:
    return (x[0] * 1.1,) if isinstance(layer, nn.Linear) and len(x) == 1 else None


def changed_gradient(layer: nn.Module, grads: tuple) -> object:
    return (grads[0] * 1.1,) if isinstance(layer, nn.Linear) else None


ACT = type(LLAMA.make().model.layers[0].mlp.act_fn)
OF_ALL = [
    (torch.nn.modules.module.register_module_forward_hook, changed),
    (torch.nn.modules.module.register_module_forward_hook, changed_act),
    (torch.nn.modules.module.register_module_forward_pre_hook, changed_before),
    (torch.nn.modules.module.register_module_full_backward_pre_hook, changed_gradient),
]


@pytest.mark.parametrize(("register", "hook"), OF_ALL, ids=[hook.__name__ for _, hook in OF_ALL])
@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_hooks_of_all_modules_have_their_way(name: str, register: Callable, hook: Callable) -> None:
    model, stock = twins(NAMED[name])
    ds_fused.apply(model, add_rms_norm=True)
    handle = register(hook)
    try:
        assert_same_step(model, stock, tolerance=1e-5)
    finally:
        handle.remove()
    # and without them it is fused again
    assert isinstance(model(**batch()).logits, LogitsOnDemand)


@pytest.mark.parametrize("hook", [changed, torch.no_grad()(changed), changed_act], ids=["all", "no_grad", "act"])
def test_hooks_of_all_modules_compiled(hook: Callable) -> None:
    model, stock = twins(NAMED["Qwen3"])
    ds_fused.apply(model)
    handle = torch.nn.modules.module.register_module_forward_hook(hook)
    try:
        loss = torch.compile(model.forward, backend="eager", fullgraph=True)(**batch()).loss
        torch.testing.assert_close(loss, stock(**batch()).loss, rtol=1e-5, atol=0.0)
    finally:
        handle.remove()
        torch._dynamo.reset()


def test_a_layer_and_its_adapter_are_called_for_hooks_of_all_modules() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = []
    for each in twins(LLAMA):
        torch.manual_seed(3)
        wrapped.append(peft.get_peft_model(each, config))
    ds_fused.apply(wrapped[0])
    handle = torch.nn.modules.module.register_module_forward_hook(changed)
    try:
        assert_same_step(*wrapped, tolerance=1e-5)
    finally:
        handle.remove()


@pytest.mark.parametrize("of_all", [False, True], ids=["of a layer", "of all"])
def test_hooks_within_tiles_see_what_was_computed(of_all: bool) -> None:
    model, stock = twins(LLAMA)
    ds_fused.apply(model, tiles=3)
    largest = []

    def look(layer: nn.Module, x: tuple, y: object) -> None:
        if isinstance(y, torch.Tensor):
            largest.append(y.detach().abs().amax())

    handles = [each.mlp.down_proj.register_forward_hook(look) for each in model.model.layers if not of_all]
    if of_all:
        handles.append(torch.nn.modules.module.register_module_forward_hook(look))
    # with this PyTorch fills with NaN what nobody has written to
    torch.use_deterministic_algorithms(True)
    try:
        step(model)
    finally:
        torch.use_deterministic_algorithms(False)
        for handle in handles:
            handle.remove()
    # each tile once in the forward and once in the backward
    assert len(largest) >= 2 * 2 * 3 and torch.isfinite(torch.stack(largest)).all()
    assert_same_step(model, stock, tolerance=1e-5)


class Louder(nn.Module):
    """Around an activation, as quantisation puts something there."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.inside = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.5 * self.inside(x)


def tanh_function(layer: nn.Module, name: str) -> None:
    layer._modules.pop(name)
    setattr(layer, name, torch.tanh)


EXCHANGES = {
    "a layer": lambda layer, name: setattr(layer, name, nn.Tanh()),
    "a layer around": lambda layer, name: setattr(layer, name, Louder(getattr(layer, name))),
    "a function": tanh_function,
    "a hook": lambda layer, name: layer._modules[name].register_forward_hook(lambda act, x, y: torch.tanh(y)),
}


@pytest.mark.parametrize("how", EXCHANGES)
@pytest.mark.parametrize("family", ["Llama", "Phi3", "Qwen3Moe", "Llama4Text"])
@pytest.mark.parametrize("experts", [True, False])
def test_an_activation_that_comes_later(family: str, experts: bool, how: str) -> None:
    model, stock = twins(NAMED[family])
    ds_fused.apply(model, experts=experts)
    n_exchanged = 0
    for each in (model, stock):
        for layer in each.modules():
            name = next((name for name in ACT_NAMES if name in layer._modules), None)
            if name is not None:
                EXCHANGES[how](layer, name)
                n_exchanged += 1
    assert n_exchanged >= 4
    assert_same_step(model, stock, tolerance=1e-5)


@pytest.mark.parametrize("how", EXCHANGES)
def test_an_activation_that_comes_later_within_tiles(how: str) -> None:
    model, stock = twins(LLAMA)
    ds_fused.apply(model, tiles=3)
    for each in (model, stock):
        EXCHANGES[how](each.model.layers[1].mlp, "act_fn")
    assert_same_step(model, stock, tolerance=1e-5)


@pytest.mark.parametrize("how", ["a layer", "a layer around", "a function"])
def test_an_activation_that_comes_later_compiled(how: str) -> None:
    model, stock = pair()
    for each in (model, stock):
        EXCHANGES[how](each.model.layers[1].mlp, "act_fn")
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="eager")
    found, expected = (each(batch()["input_ids"])[0] for each in (compiled, stock.model))
    torch.testing.assert_close(found, expected)


def louder(function: Callable) -> Callable:
    def patched(*args: object, **named: object) -> object:
        y = function(*args, **named)
        return (1.5 * y[0], *y[1:]) if isinstance(y, tuple) else 1.5 * y

    return patched


LAYER_CLASSES = {
    "Llama": ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention", "LlamaDecoderLayer", "Linear"),
    "Qwen3": ("Qwen3RMSNorm", "Qwen3Attention"),  # with norms of heads
}
CASES = [(family, cls) for family, names in LAYER_CLASSES.items() for cls in names]


def class_in(model: nn.Module, name: str) -> type:
    return next(type(module) for module in model.modules() if type(module).__name__ == name)


@pytest.mark.parametrize(("family", "name"), CASES)
@pytest.mark.parametrize("options", [{}, {"tiles": 3}, {"add_rms_norm": True}], ids=str)
@pytest.mark.parametrize("steps", [0, 1])
def test_a_class_that_is_patched_later(
    family: str, name: str, options: dict, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stock = twins(NAMED[family])
    ds_fused.apply(model, **options)
    for _ in range(steps):
        step(model)
    cls = class_in(stock, name)
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", louder(cls.forward))
        assert_same_step(model, stock, tolerance=1e-5)
        # so does a copy, and what apply makes of another
        assert_same_step(copy.deepcopy(model), stock, tolerance=1e-5)
        another = copy.deepcopy(stock)
        ds_fused.apply(another, **options)
        assert_same_step(another, stock, tolerance=1e-5)
    assert_same_step(model, stock, tolerance=1e-5)
    assert isinstance(model(**batch()).logits, LogitsOnDemand)


@pytest.mark.parametrize("how", [louder, lambda function: lambda *args, **named: function(*args, **named)])
def test_a_rotary_function_that_is_patched_later(how: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("Llama", "Qwen3"):
        model, stock = twins(NAMED[family])
        ds_fused.apply(model)
        home = sys.modules[class_in(stock, f"{family}Attention").__module__]
        for _ in range(2):
            monkeypatch.setattr(home, "apply_rotary_pos_emb", how(home.apply_rotary_pos_emb))
            assert_same_step(model, stock, tolerance=1e-5)


def test_a_class_that_is_patched_later_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, stock = twins(LLAMA)
    report = ds_fused.apply(model)
    cls = class_in(stock, "LlamaRMSNorm")
    monkeypatch.setattr(cls, "forward", louder(cls.forward))
    for _ in range(2):
        step(model)
    (message,) = caplog.messages
    assert "LlamaRMSNorm" in message and "patched" in message
    assert {claim.key for claim in report.recheck()} == {"rms_norm"}


def test_a_class_that_is_patched_later_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = pair()
    cls = class_in(stock, "LlamaRMSNorm")
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="eager")
    for _ in range(2):
        found, expected = (each(batch()["input_ids"])[0] for each in (compiled, stock.model))
        torch.testing.assert_close(found, expected)
        monkeypatch.setattr(cls, "forward", louder(cls.forward))


# weights that PyTorch spreads over x, which no kernel reads: such a norm is its original's, and a line says so
WEIGHTS = {"one": (1,), "a number": (), "a row": (1, -1)}


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize(
    ("family", "options"),
    [("Llama", {}), ("Llama", {"add_rms_norm": True}), ("Qwen3", {}), ("Cohere", {}), ("Qwen3Next", {})],
)
def test_a_norm_that_is_given_a_weight_of_another_shape(
    family: str, options: dict, weight: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, stock = twins(NAMED[family])
    ds_fused.apply(model, **options)
    n_exchanged = 0
    for each in (model, stock):
        for layer in each.modules():
            if "Norm" in type(layer).__name__ and type(layer) is not nn.LayerNorm:
                shape = [layer.weight.numel() if n < 0 else n for n in WEIGHTS[weight]]
                layer.weight = nn.Parameter(torch.full(shape, 1.5))
                n_exchanged += 1
    assert n_exchanged >= 4
    assert_same_step(model, stock, tolerance=1e-5)
    assert "Norm runs as it is: " in caplog.messages[0] and "must be one value per column of x" in caplog.messages[0]


def test_a_norm_that_has_a_weight_of_another_shape_compiled() -> None:
    model, stock = pair()
    for each in (model, stock):
        each.model.norm.weight = nn.Parameter(torch.full((1,), 1.5))
    torch.compiler.reset()
    compiled = torch.compile(model.model, backend="eager", fullgraph=True)
    found, expected = (each(batch()["input_ids"])[0] for each in (compiled, stock.model))
    torch.testing.assert_close(found, expected)


def test_a_backward_that_keeps_its_graph(kernels: torch.device) -> None:
    model, stock = pair()
    found = []
    for each in (model, stock):
        hidden = each.to(kernels).model(batch()["input_ids"].to(kernels))[0]
        weight = each.model.layers[0].mlp.gate_proj.weight
        found.append([torch.autograd.grad(hidden[0, i].sum(), weight, retain_graph=True)[0] for i in (0, 1)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_forward_in_front_of_the_heads_own() -> None:
    model, stock = pair()
    for each in (model, stock):
        forward = each.lm_head.forward
        each.lm_head.forward = lambda x, forward=forward: 0.5 * forward(x)
    assert_same_step(model, stock, tolerance=1e-5)


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


def test_adapters_that_begin_at_a_token() -> None:
    """aLoRA: its layers are handed where a sequence's tokens begin to count, which tiles of tokens would not know."""
    peft = pytest.importorskip("peft")
    model, stock = twins(LLAMA)
    tokens = batch()["input_ids"]
    invoked = [int(token) for token in tokens[0, 2:4]]
    tokens[:, 2:4] = tokens[0, 2:4]
    config = peft.LoraConfig(target_modules=["gate_proj", "down_proj"], alora_invocation_tokens=invoked)
    losses = []
    for each, tiles in ((stock, None), (model, 3)):
        torch.manual_seed(0)
        adapted = peft.get_peft_model(each, config)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        if tiles is not None:
            ds_fused.apply(adapted, tiles=tiles)
        losses.append(adapted(input_ids=tokens, labels=tokens).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_with_labels(strict: bool) -> None:
    model, stock = pair()
    kwargs = {**batch(), "use_cache": False}
    exported = torch.export.export(model, (), kwargs, strict=strict).module()
    torch.testing.assert_close(exported(**kwargs)["loss"], stock(**kwargs).loss)


def test_a_dropout_that_is_turned_on() -> None:
    """T5Gemma's MLPs have one between the product and the last projection."""
    config = transformers.T5GemmaConfig(
        encoder=(sizes := dict(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, dropout_rate=0.0, attention_dropout=0.0,
        )),
        decoder=sizes, dropout_rate=0.0, attention_dropout=0.0, vocab_size=VOCAB,
    )  # fmt: skip
    torch.manual_seed(0)
    stock = transformers.T5GemmaForConditionalGeneration(config)
    model = copy.deepcopy(stock)
    assert counts(ds_fused.apply(model))["geglu"] == 2
    losses = []
    for each in (stock, model):
        for name, layer in each.named_modules():
            if name.endswith("mlp.dropout"):
                layer.p = 0.5
        torch.manual_seed(1)
        losses.append(each.train()(**batch()).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


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


def test_angles_that_are_trained() -> None:
    """Their gradient comes from the original function."""

    def train(model: nn.Module) -> None:
        model.model.rotary_emb.shift = shift = nn.Parameter(torch.full((model.config.head_dim,), 0.1))
        model.model.rotary_emb.register_forward_hook(lambda _, args, angles: tuple(a + shift for a in angles))

    model, stock = pair()
    for each in (model, stock):
        train(each)
    assert_same_step(model, stock, tolerance=1e-5)
    assert step(model)[1]["model.rotary_emb.shift"].norm() > 0
