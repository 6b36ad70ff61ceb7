"""Tiny random models of many families, and what is compared between a stock and a fused one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import ds_fused
from ds_fused.policies.report import Report
from tests.policies.tiny_families import COVERED, FIRST, LONG_TAIL

LAYERS = 2
VOCAB = 128
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
NORM_KEYS = ("rms_norm", "layer_norm", "group_norm", "gated_rms_norm")
LAYER_KEYS = dict.fromkeys((*NORM_KEYS, "rope", "swiglu", "geglu", "reglu", "relu2"), True)
# functional ones too, which draw numbers in an order of their own
NO_DROPOUT = dict.fromkeys(
    ("dropout", "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout_rate")
    + ("hidden_dropout_prob", "attention_probs_dropout_prob", "feat_proj_dropout", "activation_dropout", "layerdrop"),
    0.0,
)


@dataclass(frozen=True)
class Tiny:
    """A family: what its configuration needs beyond the sizes, and how many layers of each kind are fused."""

    name: str
    counts: dict[str, int]
    config: dict = field(default_factory=dict)
    left: int = 0  # MLPs that have no gate

    @property
    def glu(self) -> str:
        return "geglu" if "geglu" in self.counts else "swiglu"

    def make(self, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
        kind = getattr(transformers, f"{self.name}Config")
        settings = kind(**SIZES | NO_DROPOUT | self.config | config)
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.name.removesuffix('Text')}ForCausalLM")(settings)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # they start at 0 or 1, where a squared or forgotten weight would not show
                nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
        return model.to(dtype)


def _rows(rows: Iterable[tuple[str, str, dict]]) -> list[Tiny]:
    made = []
    for name, layers, config in rows:
        counts = {key: int(count) for key, count in (each.split() for each in layers.split(", "))}
        made.append(Tiny(name, left=counts.pop("plain", 0), counts=counts, config=config))
    return made


FAMILIES = _rows(FIRST)
COVERED_FAMILIES = _rows(COVERED)
LLAMA = FAMILIES[0]
NAMED = {family.name: family for family in (*FAMILIES, *COVERED_FAMILIES)}
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
every_family = pytest.mark.parametrize(
    "family",
    [*FAMILIES, *COVERED_FAMILIES, *(pytest.param(family, marks=pytest.mark.all) for family in _rows(LONG_TAIL))],
    ids=lambda family: family.name,
)


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Two rows of 11 tokens; some labels are ignored."""
    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def step(model: nn.Module, inputs: Mapping[str, object] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of every parameter of one training step, on ``batch()`` where nothing else is given."""
    model.train()
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    given = batch() if inputs is None else inputs
    loss = model(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in given.items()}).loss
    loss.backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def assert_same_step(
    model: nn.Module, stock: nn.Module, tolerance: float, inputs: Mapping[str, object] | None = None
) -> None:
    """Loss and gradients agree; ``tolerance`` is relative to the largest value of each.

    A gradient that is 0 but for rounding (a router's, where the chosen weights sum to 1) is measured by the others.
    """
    loss, grads = step(model, inputs)
    stock_loss, stock_grads = step(stock, inputs)
    assert abs(loss - stock_loss) <= tolerance * abs(stock_loss)
    assert grads.keys() == stock_grads.keys()
    noise = 1e-3 * max(grad.double().norm() for grad in stock_grads.values())
    for name, expected in stock_grads.items():
        error = (grads[name].double() - expected.double()).norm() / expected.double().norm().clamp_min(noise)
        assert error <= tolerance, f"{name}: {error:.1e}"


def assert_same_state(model: nn.Module, stock: nn.Module) -> None:
    """Parameter names in order, and every tensor of the state dict."""
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in stock.named_parameters()]
    mine, theirs = model.state_dict(), stock.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


def classes(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


def counts(report: Report) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in report.replaced:
        found[row.key] = found.get(row.key, 0) + row.count
    return found


def twins(family: Tiny, dtype: torch.dtype = torch.float32, **config: object) -> tuple[nn.Module, nn.Module]:
    """A model and its copy."""
    model = family.make(dtype, **config)
    return model, copy.deepcopy(model)


def pair(**config: object) -> tuple[nn.Module, nn.Module]:
    """A Llama that is fused with its loss, and its stock copy."""
    model, stock = twins(LLAMA, **config)
    assert counts(ds_fused.apply(model))["fused_linear_cross_entropy"] == 1
    return model, stock


def prompt() -> dict[str, torch.Tensor]:
    return {name: x for name, x in batch().items() if name != "labels"}


def n_hooks(model: nn.Module) -> int:
    return len(model._forward_hooks) + len(model._forward_pre_hooks)


def twins_fused_by(
    keys: dict[str, bool], key: str, family: Tiny, calls: list, **config: object
) -> tuple[nn.Module, nn.Module]:
    """A model fused by ``keys``, by ``key`` in every layer, and its stock copy; ``calls`` are those since."""
    model, stock = twins(family, **config)
    assert counts(ds_fused.apply(model, keys))[key] == LAYERS
    calls.clear()  # of the proof
    return model, stock


def shapes_of_calls(monkeypatch: pytest.MonkeyPatch, home: ModuleType, op: str) -> list[tuple[int, ...]]:
    """The shapes of the first argument in the calls of an op, as a module has it."""
    found, stock = [], getattr(home, op)

    def counting(x: Tensor, *others: Any, **form: Any) -> Any:
        found.append(tuple(x.shape))
        return stock(x, *others, **form)

    monkeypatch.setattr(home, op, counting)
    return found


def assert_as_accurate(family: Tiny, dtype: torch.dtype, device: str, keys: dict[str, bool] = LAYER_KEYS) -> Report:
    """Gradients of a fused step are at most 1.5 times as far from those in fp32 as stock's."""
    model, stock = (each.to(device) for each in twins(family, dtype))
    exact = twins(family, dtype)[1].float()
    report = ds_fused.apply(model, keys)
    _, want = step(exact)
    (_, mine), (_, theirs) = step(model), step(stock)
    assert mine.keys() == theirs.keys()

    def distance(grads: dict[str, Tensor]) -> float:
        known = [(grads[n].cpu().double() - want[n].double()).square().sum().item() for n in want if n in grads]
        return sum(known) ** 0.5

    assert distance(mine) <= 1.5 * distance(theirs)
    return report
