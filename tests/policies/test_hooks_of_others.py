"""Hooks and forwards that come behind apply have their way."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ds_fused
from ds_fused.modules.loss.on_demand import LogitsOnDemand
from tests.policies.tiny import LLAMA, NAMED, assert_same_step, batch, counts, pair, step, twins


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


def test_a_forward_in_front_of_the_heads_own() -> None:
    model, stock = pair()
    for each in (model, stock):
        forward = each.lm_head.forward
        each.lm_head.forward = lambda x, forward=forward: 0.5 * forward(x)
    assert_same_step(model, stock, tolerance=1e-5)
