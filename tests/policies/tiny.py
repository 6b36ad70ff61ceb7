"""The ten families as tiny random models, and what is compared between a stock and a fused one."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from torch import Tensor, nn

from ds_fused.policies.report import Report

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
LAYER_KEYS = {"rms_norm": True, "rope": True, "swiglu": True, "geglu": True}


@dataclass(frozen=True)
class Tiny:
    """A family: what its configuration needs beyond the sizes, and how many layers of each kind are fused."""

    name: str
    norms: int
    mlps: int = LAYERS
    glu: str = "swiglu"
    experts: int = 0
    config: dict = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        found = {"rms_norm": self.norms, "rope": LAYERS}
        return found | ({self.glu: self.mlps} if self.mlps else {})

    def make(self, dtype: torch.dtype = torch.float32, **config: object) -> nn.Module:
        kind = getattr(transformers, f"{self.name}Config")
        settings = kind(**SIZES | self.config | config)
        torch.manual_seed(0)
        model = getattr(transformers, f"{self.name.removesuffix('Text')}ForCausalLM")(settings)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                # they start at 0 or 1, where a squared or forgotten weight would not show
                nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
        return model.to(dtype)


MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
# norms of a layer: before attention and MLP 2, after them 2 more (Gemma 2, 3), on q and k 2 (Qwen3, Gemma 3); 1 last
FAMILIES = [
    Tiny("Llama", norms=5),
    Tiny("Mistral", norms=5),
    Tiny("Mixtral", norms=5, mlps=0, experts=2, config={"num_local_experts": 4}),
    Tiny("Qwen2", norms=5),
    Tiny("Qwen3", norms=9, config={"head_dim": 8}),
    Tiny("Qwen3Moe", norms=9, mlps=1, experts=1, config=MOE),
    Tiny("Gemma", norms=5, glu="geglu", config={"head_dim": 8}),
    Tiny("Gemma2", norms=9, glu="geglu", config={"head_dim": 8}),
    Tiny("Gemma3Text", norms=13, glu="geglu", config={"head_dim": 8}),
    Tiny("Phi3", norms=5),
]
LLAMA = FAMILIES[0]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


def batch(seed: int = 1) -> dict[str, Tensor]:
    """Two rows of 11 tokens; some labels are ignored."""
    ids = torch.randint(3, VOCAB, (2, 11), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :4] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of every parameter of one training step."""
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(**batch()).loss
    loss.backward()
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), grads


def assert_same_step(model: nn.Module, stock: nn.Module, tolerance: float) -> None:
    """Loss and gradients agree; ``tolerance`` is relative to the largest value of each."""
    loss, grads = step(model)
    stock_loss, stock_grads = step(stock)
    assert abs(loss - stock_loss) <= tolerance * abs(stock_loss)
    assert grads.keys() == stock_grads.keys()
    for name, expected in stock_grads.items():
        error = (grads[name].double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)
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
