"""Uses of a model beside the plain step: equal to stock with everything fused, for three families."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import ds_fused
from tests.policies.tiny import FAMILIES, VOCAB, Tiny, assert_same_step

TINY = {family.name: family for family in FAMILIES}
# rotary in halves and gated MLPs; norms on q and k, experts; softcapped, sliding windows, norms of 1 + weight
SEED = [TINY["Llama"], TINY["Qwen3Moe"], TINY["Gemma2"]]
each_family = pytest.mark.parametrize("family", SEED, ids=lambda family: family.name)


def pair(family: Tiny, attention: str = "eager", prepare: Callable[[nn.Module], nn.Module] = lambda model: model):
    """Fused and stock; ``prepare`` is what a user does to a model before the training."""
    model = family.make()
    model.set_attn_implementation(attention)
    stock = prepare(copy.deepcopy(model))
    model = prepare(model)
    assert ds_fused.apply(model).replaced
    return model, stock


def ids(shape: tuple[int, int] = (2, 11)) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(4))


def assert_same_outputs(model: nn.Module, stock: nn.Module, **inputs) -> None:
    """Loss, logits and every hidden state, and the gradient of the embedding, which all others pass."""
    outputs = [each(**inputs) for each in (model, stock)]
    for key in ("loss", "logits"):
        torch.testing.assert_close(outputs[0][key].clone(), outputs[1][key].clone(), rtol=1e-5, atol=1e-5)
    for ours, wanted in zip(outputs[0].hidden_states or (), outputs[1].hidden_states or (), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(output.loss, each.get_input_embeddings().weight)[0]
        for output, each in zip(outputs, (model, stock), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@each_family
def test_adapters(family: Tiny, dora: bool) -> None:
    peft = pytest.importorskip("peft")
    # PEFT adapts experts, which are no Linears, too, but not with DoRA
    targets = ["q_proj", "o_proj"] if dora else ["q_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, use_dora=dora, init_lora_weights=False)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return peft.get_peft_model(model, config)

    assert_same_step(*pair(family, prepare=adapted), tolerance=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@each_family
def test_gradient_checkpointing(family: Tiny, reentrant: bool) -> None:
    def checkpointed(model: nn.Module) -> nn.Module:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    assert_same_step(*pair(family, prepare=checkpointed), tolerance=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@each_family
def test_generation(family: Tiny, cache: str) -> None:
    model, stock = (each.eval() for each in pair(family))
    padded = ids((2, 6))
    padded[0, :2] = 0
    mask = (torch.arange(6) >= torch.tensor([[2], [0]])).long()
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    ours, wanted = (each.generate(padded, attention_mask=mask, **options) for each in (model, stock))
    assert torch.equal(ours.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(wanted.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@each_family
def test_hidden_states(family: Tiny, attention: str) -> None:
    model, stock = pair(family, attention)
    assert_same_outputs(model, stock, input_ids=ids(), labels=ids(), output_hidden_states=True)


@each_family
def test_packed_sequences(family: Tiny) -> None:
    model, stock = pair(family, "sdpa")
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])
    labels = ids((1, 11)).masked_fill(positions == 0, -100)
    assert_same_outputs(model, stock, input_ids=ids((1, 11)), position_ids=positions, labels=labels)


@each_family
def test_left_padding(family: Tiny) -> None:
    model, stock = pair(family)
    mask = (torch.arange(11) >= torch.tensor([[4], [0]])).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    labels = ids().masked_fill(mask == 0, -100)
    assert_same_outputs(model, stock, input_ids=ids(), attention_mask=mask, position_ids=positions, labels=labels)
