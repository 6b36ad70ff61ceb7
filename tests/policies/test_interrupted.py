"""A forward that somebody interrupts, as in a notebook: the next one is as if it had never been."""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ds_fused
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from tests.policies.tiny import LLAMA, assert_same_step, batch, n_hooks, pair, prompt, twins


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
