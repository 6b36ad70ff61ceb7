"""Real causal LMs, tiny, without layers fused: a model, its copy with a fused loss, and what is compared."""

from __future__ import annotations

import copy

import torch
import transformers
from torch import Tensor, nn

from ds_fused.modules.loss.on_demand import LogitsOnDemand
from ds_fused.policies.loss import LINEAR, claim_loss

VOCAB = 61
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# what each adds: nothing; softcap; division; scale; a bias; tied weights under other names
FAMILIES = {
    "Llama": {},
    "Gemma2": {"final_logit_softcapping": 1.5, "head_dim": 8},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {"num_key_value_heads": 2},
    "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
}


def build(family: str = "Llama", **config) -> nn.Module:
    settings = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES.get(family, {}) | config)
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    cls = getattr(transformers, f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM")
    model = cls(settings).train()
    if family == "GPT2":
        # no dropout: both models must compute the same
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    return model


def fuse(model: nn.Module, keys: tuple[str, ...] = (LINEAR,), **options):
    """The claims, proved and committed, and what was left."""
    claims, left = claim_loss(model, {key: {} for key in keys}, **options)
    for claim in claims:
        assert claim.prove(torch.device("cpu"), torch.float32) is None
    for claim in claims:
        claim.commit()
        assert claim.in_place()
    return claims, left


def pair(family: str = "Llama", keys: tuple[str, ...] = (LINEAR,), options: dict | None = None, **config):
    stock = build(family, **config)
    fused = copy.deepcopy(stock)
    claims, left = fuse(fused, keys, **options or {})
    assert left == [] and len(claims) == len(keys)
    return stock, fused


def batch(shape: tuple[int, int] = (2, 9)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def compare(stock: nn.Module, fused: nn.Module, logits: type = LogitsOnDemand, **inputs) -> None:
    """Loss, logits and all gradients."""
    results = []
    for model in (stock, fused):
        model.zero_grad()
        out = model(**inputs)
        loss, found = (out.loss, out.logits) if isinstance(out, transformers.utils.ModelOutput) else out[:2]
        if loss.requires_grad:
            loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((loss, found, gradients))
    (loss, found, gradients), (our_loss, our_found, our_gradients) = results
    assert type(our_found) is logits and our_loss.dtype == loss.dtype and our_loss.shape == loss.shape
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(our_found.clone(), found, rtol=1e-6, atol=1e-6)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-5, atol=1e-6, equal_nan=True)


BART = {
    "d_model": 16,
    "max_position_embeddings": 32,
    "dropout": 0.0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}


# heads and losses that are left alone


def left_alone(model: nn.Module, reason: str) -> None:
    claims, left = fuse(model)
    assert claims == [] and [entry.count for entry in left] == [1]
    assert reason in left[0].reason, left
