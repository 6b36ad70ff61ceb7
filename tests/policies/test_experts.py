"""Experts of a mixture: fused inside whichever implementation multiplies them, the rest as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import ds_fused
from ds_fused.modules.layers import experts, mlp, product
from ds_fused.modules.layers.mlp import Gate
from ds_fused.policies.kinds import Way, choose, find
from ds_fused.policies.kinds import experts as experts_kind
from tests.policies.tiny import NAMED, Tiny, assert_same_step, batch, counts, twins

# the plain gate, in the eager loop itself; clamped and with an offset, interleaved; clamped; without a gate
MIXTURES = [NAMED[name] for name in ("Mixtral", "GptOss", "DeepseekV4", "NemotronH")]


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("Experts")]


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", MIXTURES, ids=lambda family: family.name)
def test_each_implementation(family: Tiny, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = twins(family)
    calls = {"product": 0, "gate": 0, "relu2": 0}

    def counted(name: str, op: Callable) -> Callable:
        def call(*args: object, **named: object) -> Tensor:
            calls[name] += 1
            return op(*args, **named)

        return call

    for each in (model, stock):
        each.set_experts_implementation(implementation)
    ds_fused.apply(model, {"swiglu": True, "relu2": True})
    monkeypatch.setattr(product, "glu", counted("product", product.glu))
    monkeypatch.setattr(mlp, "glu", counted("gate", mlp.glu))
    monkeypatch.setattr(mlp, "relu2", counted("relu2", mlp.relu2))
    assert_same_step(model, stock, tolerance=1e-5)
    # eager: an expert after the other, unless nobody came to it
    least = 2 * len(experts_of(model)) if implementation == "eager" else len(experts_of(model))
    used = {"NemotronH": "relu2"}.get(
        family.name, "product" if (family.name, implementation) == ("Mixtral", "eager") else "gate"
    )
    assert calls[used] >= least, calls


# of the first kinds: plain; clamped; with layers that have none; without a bias, GPT-OSS's has one
@pytest.mark.parametrize("name", ["Mixtral", "DeepseekV4", "Qwen3Moe", "GraniteMoe", "GptOss"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_in_one_op(name: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, stock = twins(NAMED[name])
    for each in (model, stock):
        each.set_experts_implementation(implementation)
    there = len(experts_of(model))
    found = counts(ds_fused.apply(model, {"experts": True, "swiglu": True}))
    # with biases, inside the other implementation
    assert found.get("experts", 0) == (0 if name == "GptOss" else there)
    assert found.get("swiglu", 0) == {"Mixtral": 0, "GraniteMoe": 0, "Qwen3Moe": 1}.get(name, there)
    calls = []
    stock_op = experts.experts_by
    monkeypatch.setattr(experts, "experts_by", lambda *args, **form: calls.append(form) or stock_op(*args, **form))
    assert_same_step(model, stock, tolerance=1e-5)
    assert len(calls) >= found.get("experts", 0)
    assert all((form["limit"] is None) == (name != "DeepseekV4") for form in calls)


def test_in_one_op_only_where_its_key_is_on() -> None:
    assert counts(ds_fused.apply(NAMED["Mixtral"].make(), {"swiglu": True})) == {"swiglu": 2}
    assert counts(ds_fused.apply(NAMED["Mixtral"].make(), {"experts": True})) == {"experts": 2}
    assert counts(ds_fused.apply(NAMED["Mixtral"].make()))["experts"] == 2
    assert counts(ds_fused.apply(NAMED["Mixtral"].make(), experts=False))["swiglu"] == 2


@pytest.mark.parametrize("draw", range(10))
def test_what_is_drawn_for_the_proof_does_not_decide_it(draw: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other numbers, and products by another number of threads, round otherwise."""
    drawn = experts_kind.randn
    monkeypatch.setattr(experts_kind, "randn", lambda seed, *shape: drawn(seed + 1000 * draw, *shape))
    (layer, *_) = experts_of(NAMED["Mixtral"].make())
    threads = torch.get_num_threads()
    torch.set_num_threads(1 + draw % 2)
    try:
        assert isinstance(outcome(layer, MixtralExperts, torch.bfloat16, asked=True), Way)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("wanted", [{"experts": True, "swiglu": True}, {"experts": True}])
def test_what_was_asked_for_and_is_not_to_be_had_is_told(
    wanted: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock_op = experts.experts_by
    monkeypatch.setattr(experts, "experts_by", lambda *args, **form: -stock_op(*args, **form))
    report = ds_fused.apply(NAMED["Mixtral"].make(), wanted)
    assert counts(report) == ({"swiglu": 2} if "swiglu" in wanted else {})
    (row,) = [row for row in report.left if row.what == "MixtralExperts"]
    assert row.count == 2 and row.reason.startswith("experts: its output differs")


def test_weights_that_are_stored_the_other_way() -> None:
    class Turned(MixtralExperts):
        """As GPT-OSS's, without biases."""

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            turned = MixtralExperts.__new__(MixtralExperts)
            turned.__dict__.update(vars(self))
            turned._parameters = {name: p.transpose(1, 2) for name, p in self._parameters.items()}
            return turned(hidden_states, top_k_index, top_k_weights)

    (layer, *_) = experts_of(NAMED["Mixtral"].make())
    layer.is_transposed = True
    found = outcome(layer, Turned, asked=True)
    assert dict(found.state)["fused_transposed"]
    for cls in (MixtralExperts, Flipped):
        assert isinstance(outcome(layer, cls, asked=True), str)


def test_switched_after_the_replacement() -> None:
    model, stock = twins(NAMED["Mixtral"])
    ds_fused.apply(model, {"swiglu": True})
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for each in (model, stock):
            each.set_experts_implementation(implementation)
        assert_same_step(model, stock, tolerance=1e-5)


def test_router_and_auxiliary_loss_are_as_they_were() -> None:
    model, stock = twins(NAMED["Qwen3Moe"], output_router_logits=True, router_aux_loss_coef=0.5)
    ds_fused.apply(model)
    mine, theirs = model(**batch()), stock(**batch())
    torch.testing.assert_close(mine.aux_loss, theirs.aux_loss)
    for a, b in zip(mine.router_logits, theirs.router_logits, strict=True):
        torch.testing.assert_close(a, b)
    assert_same_step(model, stock, tolerance=1e-5)


def outcome(experts: nn.Module, cls: type, dtype: torch.dtype = torch.float32, asked: bool = False) -> Way | str:
    """``asked``: of the ways into one op, else of those inside another implementation."""
    experts.__class__ = cls
    kind = find(experts)
    ways = [way for way in kind.ways(experts) if way.asked == asked]
    return choose(kind, experts, ways, torch.device("cpu"), dtype)


class Flipped(MixtralExperts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return -super()._apply_gate(gate_up)


class Unsquashed(GptOssExperts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


class Halves(GptOssExperts):
    """Its gate is in the first half."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return super()._apply_gate(torch.stack(gate_up.chunk(2, -1), -1).flatten(-2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "cls", "gate"),
    [
        ("Mixtral", MixtralExperts, Gate()),
        ("Mixtral", Flipped, "output differs"),
        ("GptOss", GptOssExperts, Gate("silu", True, 1.702, 7.0, 1.0)),
        ("GptOss", Halves, Gate("silu", False, 1.702, 7.0, 1.0)),
        ("GptOss", Unsquashed, "output differs"),
    ],
)
def test_forms(family: str, cls: type, gate: Gate | str, dtype: torch.dtype) -> None:
    (experts, *_) = experts_of(NAMED[family].make())
    found = outcome(experts, cls, dtype)
    if isinstance(gate, str):
        assert isinstance(found, str) and gate in found
    else:
        assert dict(found.state)["fused_gate"] == gate


def test_a_loop_of_its_own_is_proven_as_well() -> None:
    class Forgetful(MixtralExperts):
        """Only the implementations with ``_apply_gate`` multiply by up."""

        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return super().forward(hidden_states, top_k_index, top_k_weights).tanh()

    (experts, *_) = experts_of(NAMED["Mixtral"].make())
    assert isinstance(outcome(experts, Forgetful), Way)  # whatever is around the product stays around it

    class OtherLoop(MixtralExperts):
        def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            gate, up = (hidden_states @ self.gate_up_proj[0].T).chunk(2, -1)
            return (self.act_fn(gate) + up) @ self.down_proj[0].T

    assert isinstance(outcome(experts, OtherLoop), Way)  # no product in it: what it adds is the activation's own


def test_without_values_or_on_meta() -> None:
    model = NAMED["Mixtral"].make()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert counts(ds_fused.apply(model, {"swiglu": True})) == {"swiglu": 2}
    assert counts(ds_fused.apply(NAMED["GptOss"].make().to("meta"), {"swiglu": True})) == {"swiglu": 2}


@pytest.mark.parametrize("first", ["adapters", "ds_fused"])
def test_adapters_on_the_weights_of_experts(first: str) -> None:
    """PEFT parametrizes the layer for the time of a forward."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"], init_lora_weights=False
    )

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    model, stock = twins(NAMED["Mixtral"])
    model = adapted(model) if first == "adapters" else model
    assert counts(ds_fused.apply(model))["experts"] == 2
    assert_same_step(model if first == "adapters" else adapted(model), adapted(stock), tolerance=1e-5)


@pytest.mark.parametrize("wide", ["model", "experts"])
def test_of_another_dtype_than_their_tokens(wide: str) -> None:
    """What transformers' grouped products cast, they cast still."""
    model, stock = (each.bfloat16() for each in twins(NAMED["Qwen3Moe"]))
    for each in (model, stock):
        layers = experts_of(each)
        assert layers
        if wide == "model":
            each.float()
        for layer in layers:
            layer.to(torch.bfloat16 if wide == "model" else torch.float32)
    ds_fused.apply(model, {"experts": True})
    assert_same_step(model, stock, tolerance=2e-2)


def test_more_weights_than_choices() -> None:
    """Of which the loop of transformers 5.0 takes the first, as Phimoe's router there gives it."""
    model, stock = twins(NAMED["Mixtral"])
    for each in (model, stock):
        each.set_experts_implementation("eager")
    ds_fused.apply(model, {"experts": True})
    found = []
    for each in (model, stock):
        (layer, *_) = experts_of(each)
        x = torch.linspace(-1, 1, 6 * layer.hidden_dim).view(6, -1)
        ids = torch.tensor([[0, 1], [1, 0], [2, 3], [3, 1], [0, 2], [2, 0]])
        found.append(layer(x, ids, torch.linspace(0, 1, 24).view(6, 4)))
    torch.testing.assert_close(*found)
