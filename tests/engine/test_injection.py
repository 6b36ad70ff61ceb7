"""Our policies through DeepSpeed's own ``replace_module``: the same layers, equal outputs."""

import copy

import pytest
import torch
from deepspeed.module_inject.policy import DSPolicy
from deepspeed.module_inject.replace_module import replace_module
from transformers import LlamaConfig, LlamaForCausalLM, NemotronConfig, NemotronForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from ds_fused.engine.injection import policies_for, replace_layer
from ds_fused.modules.swap import is_fused, unswap

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    return LlamaForCausalLM(config)


def norms(model) -> list[LlamaRMSNorm]:
    return [m for m in model.modules() if isinstance(m, LlamaRMSNorm)]


def policy_of(model, cls):
    return next(p for p in policies_for(model) if p._orig_layer_class is cls)


def test_all_norms_through_replace_module(model):
    stock = copy.deepcopy(model)
    policy = policy_of(model, LlamaRMSNorm)
    before = dict(model.named_parameters())

    replaced = replace_module(model, orig_class=LlamaRMSNorm, replace_fn=replace_layer, _replace_policy=policy)

    assert replaced is model
    assert len(norms(model)) == 5 and all(is_fused(m) for m in norms(model))
    assert all(before[name] is p for name, p in model.named_parameters())
    tokens = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits)

    for m in norms(model):
        unswap(m)
    assert torch.equal(model(tokens).logits, stock(tokens).logits)


def test_every_policy_of_the_family(model):
    stock = copy.deepcopy(model)
    names = [policy.__name__ for policy in policies_for(model)]
    assert sorted(names) == ["FusedLlamaAttentionPolicy", "FusedLlamaMLPPolicy", "FusedLlamaRMSNormPolicy"]
    for policy in policies_for(model):
        replace_module(model, policy._orig_layer_class, replace_layer, policy)
    assert sum(is_fused(m) for m in model.modules()) == 5 + 2 + 2
    assert policies_for(model) == []

    tokens = torch.randint(0, 64, (2, 9))
    for m in (model, stock):
        m(tokens, labels=tokens).loss.backward()
    for (name, p), (_, expected) in zip(model.named_parameters(), stock.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, expected.grad, msg=name)


def test_the_protocol(model):
    cls = policy_of(model, LlamaMLP)
    mlp = model.model.layers[0].mlp
    # DeepSpeed makes them with nothing, with None and with the layer
    for policy in (cls(), cls(None), cls(mlp)):
        assert isinstance(policy, DSPolicy)
        assert policy.match(mlp) and not policy.match_replaced(mlp)
        assert not policy.match(norms(model)[0])
    assert cls(mlp).apply(mlp, enable_cuda_graph=True) is mlp
    assert cls().match_replaced(mlp) and not cls().match(mlp)


def test_a_layer_that_computes_something_else_stays(model, caplog, monkeypatch):
    policy = policy_of(model, LlamaRMSNorm)
    stock_forward = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, x: 2 * stock_forward(self, x))
    replace_module(model, LlamaRMSNorm, replace_layer, policy)
    assert not any(is_fused(m) for m in norms(model))
    assert "LlamaRMSNorm stays as it is" in caplog.text


def test_a_layer_with_its_own_forward_stays(model, caplog):
    norm = model.model.norm
    norm.forward = lambda x: x
    policy = policy_of(model, LlamaRMSNorm)
    replace_module(model, LlamaRMSNorm, replace_layer, policy)
    assert [is_fused(m) for m in norms(model)] == [True] * 4 + [False]
    assert "forward of its own" in caplog.text


def test_a_squared_relu_without_a_gate():
    config = NemotronConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32)
    model = NemotronForCausalLM(config)
    stock = copy.deepcopy(model)
    for policy in policies_for(model):
        replace_module(model, policy._orig_layer_class, replace_layer, policy)
    assert is_fused(model.model.layers[0].mlp.act_fn) and not is_fused(model.model.layers[0].mlp)
    tokens = torch.randint(0, 64, (2, 9))
    torch.testing.assert_close(model(tokens).logits, stock(tokens).logits)
