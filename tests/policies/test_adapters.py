"""Layers under PEFT's adapters: which become one node with their adapter, and when their own code runs all the same."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import ds_fused
from ds_fused.engine.warmup import _lora_ranks
from ds_fused.modules.layers import lora
from ds_fused.ops.mlp._pieces import LEFT, RIGHT, added
from ds_fused.ops.registry import op
from tests.policies.tiny import LAYERS, LLAMA, assert_same_step, batch

peft = pytest.importorskip("peft")
lora_linear_module = op("lora_linear").module
TARGETS = ["q_proj", "v_proj", "down_proj"]


def pieces(v: torch.Tensor, side: bool) -> torch.Tensor:
    """As the kernel makes them."""
    first = v.bfloat16()
    second = (v - first).bfloat16()
    third = (v - first - second).bfloat16()
    right = (first, first, first, second, third, second)
    order = right if side == RIGHT else (first, second, third, first, first, second)
    return torch.cat(order, 1)


def pieces_of_rows(v: torch.Tensor, side: bool) -> torch.Tensor:
    return pieces(v.view(1, -1), side).view(6 * v.shape[0], -1)


def times_narrow(rows: torch.Tensor, narrow: torch.Tensor, scale: float) -> torch.Tensor:
    return pieces(scale * rows.float() @ narrow, LEFT)


def narrow_times(six: torch.Tensor, rows: torch.Tensor, *, turned: bool = False) -> torch.Tensor:
    out = added(six).t() @ rows.float()
    return out.t().contiguous() if turned else out


def have_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were kernels; what they make has tests of its own."""
    monkeypatch.setattr(lora_linear_module, "runs_kernels", lambda *_: True)
    for function in (pieces, pieces_of_rows, times_narrow, narrow_times):
        monkeypatch.setattr(lora_linear_module, function.__name__, function)


def adapted(**options: object) -> nn.Module:
    torch.manual_seed(3)
    return peft.get_peft_model(LLAMA.make(), peft.LoraConfig(r=2, init_lora_weights=False, **options))


def pair(**options: object) -> tuple[nn.Module, nn.Module]:
    """Replaced and stock."""
    stock = adapted(target_modules=TARGETS, **options)
    model = copy.deepcopy(stock)
    report = ds_fused.apply(model, {"lora": True}, strict=True)
    assert [(claim.replacement, len(claim.paths)) for claim in report.claims] == [("lora_linear", LAYERS * 3)]
    return model, stock


@pytest.fixture
def nodes(monkeypatch) -> list[object]:
    """Every node that is made, those of the proof among them."""
    made: list[object] = []

    def noted(*args: object) -> object:
        made.append(args)
        return function.apply(*args)

    function = lora.LoRALinearFunction
    monkeypatch.setattr(lora, "LoRALinearFunction", type("Noted", (), {"apply": staticmethod(noted)}))
    return made


def test_a_step_is_stocks(nodes):
    model, stock = pair()
    nodes.clear()
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(nodes) == LAYERS * 3


def test_with_a_dropout_before_the_adapter(nodes):
    model, stock = pair(lora_dropout=0.5)
    nodes.clear()
    losses = []
    for each in (model, stock):
        torch.manual_seed(5)
        losses.append(each.train()(**batch()).loss)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, [p for p in each.parameters() if p.requires_grad])
                 for loss, each in zip(losses, (model, stock), strict=True)]  # fmt: skip
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert len(nodes) == LAYERS * 3


def test_an_adapter_in_fp32_over_bf16_as_peft_makes_it(nodes, monkeypatch):
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=TARGETS)
    stock = peft.get_peft_model(LLAMA.make().bfloat16(), config)
    assert {p.dtype for p in stock.parameters() if p.requires_grad} == {torch.float32}
    model = copy.deepcopy(stock)
    ds_fused.apply(model, {"lora": True}, strict=True)
    nodes.clear()
    # without kernels the layers' own code runs
    assert_same_step(model, stock, tolerance=0)
    assert not nodes

    have_pieces(monkeypatch)
    assert_same_step(model, stock, tolerance=2e-2)
    assert len(nodes) == LAYERS * 3


def test_with_a_dropout_before_an_adapter_in_fp32(nodes, monkeypatch):
    have_pieces(monkeypatch)
    config = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=TARGETS, lora_dropout=0.5)
    torch.manual_seed(3)
    stock = peft.get_peft_model(LLAMA.make().bfloat16(), config).train()
    model = copy.deepcopy(stock)
    ds_fused.apply(model, {"lora": True}, strict=True)
    nodes.clear()
    found = []
    for each in (model, stock):
        torch.manual_seed(5)
        loss = each(**batch()).loss
        found.append([loss, *torch.autograd.grad(loss, [p for p in each.parameters() if p.requires_grad])])
    assert len(nodes) == LAYERS * 3
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def merged(model: nn.Module) -> None:
    model.merge_adapter()


def switched_off(model: nn.Module) -> None:
    model.base_model.disable_adapter_layers()


def another_added(model: nn.Module) -> None:
    torch.manual_seed(7)
    config = peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights=False)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])


def hooked(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_hook(lambda module, args, y: 2 * y)


@pytest.mark.parametrize("prepare", [merged, switched_off, another_added, hooked])
def test_where_its_own_code_runs(prepare: Callable[[nn.Module], None], nodes):
    model, stock = pair()
    nodes.clear()
    for each in (model, stock):
        prepare(each)
    ours, theirs = (each(**batch()) for each in (model, stock))
    torch.testing.assert_close(ours.logits.clone(), theirs.logits, rtol=1e-5, atol=1e-5)
    assert not nodes


@pytest.mark.parametrize("cls", [peft.tuners.lora.Linear, nn.Linear])
def test_where_its_class_or_its_childrens_is_patched(cls: type[nn.Module], nodes, monkeypatch):
    model, stock = pair()
    nodes.clear()
    forward = cls.forward
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda *args, **named: 1.1 * forward(*args, **named))
        assert_same_step(model, stock, tolerance=1e-5)
        assert not nodes
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(nodes) == LAYERS * 3


def test_a_second_adapter_takes_the_place_of_the_first(nodes):
    model, stock = pair()
    nodes.clear()
    for each in (model, stock):
        another_added(each)
        each.set_adapter("second")
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(nodes) == LAYERS * 3


def test_under_autocast_its_own_code_runs(nodes):
    model, stock = pair()
    nodes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (each(**batch()).logits.clone() for each in (model, stock))
    assert torch.equal(ours, theirs) and not nodes


def test_a_variant_stays_and_the_report_says_why():
    report = ds_fused.apply(adapted(target_modules=["q_proj"], use_dora=True), {"lora": True})
    assert not report.claims
    assert [(row.count, row.reason) for row in report.left] == [(LAYERS, "its adapter is a variant, DoraLinearVariant")]


def test_saving_merging_and_the_way_back(tmp_path):
    model, stock = pair()
    assert list(model.state_dict()) == list(stock.state_dict())
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(LLAMA.make(), tmp_path)
    ids = batch()["input_ids"]
    with torch.no_grad():
        wanted = stock(ids).logits
        torch.testing.assert_close(again(ids).logits, wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model.merge_and_unload()(ids).logits.clone(), wanted, rtol=1e-4, atol=1e-5)


def test_the_ranks_of_adapters_are_found_for_a_warm_up():
    assert _lora_ranks(adapted(target_modules=TARGETS, rank_pattern={"down_proj": 3})) == [2, 3]


def test_strict_misses_an_adapter_where_there_is_one():
    with pytest.raises(ValueError, match="strict, and nothing matched lora"):
        ds_fused.apply(adapted(target_modules=["q_proj"], use_dora=True), strict=True)
    ds_fused.apply(LLAMA.make(), strict=True)
