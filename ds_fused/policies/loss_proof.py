"""The comparisons of a fused loss with the original one, by which loss.py proves its claims."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.code import Code
from ds_fused.modules.loss.deferred import DeferredLogits
from ds_fused.modules.loss.head import CausalLMLoss, Head
from ds_fused.modules.loss.head_call import HeadCall
from ds_fused.modules.loss.scope import Scope
from ds_fused.modules.swap import swap
from ds_fused.policies.kinds.kind import compared, unproven
from ds_fused.policies.proof import compare, randn, replica

# a small head with random labels, some ignored, through the whole mechanism, against the original loss
TOKENS, WIDTH, VOCAB = 37, 64, 131


def head_differs(head: nn.Linear) -> str | None:
    """What a subclass of Linear with a forward of its own computes otherwise than Linear does."""
    tensors = {"x": randn(1, 2, TOKENS, WIDTH), "weight": randn(2, VOCAB, WIDTH) / WIDTH**0.5}
    if head.bias is not None:
        tensors["bias"] = randn(3, VOCAB)
    runs = [lambda t, cls=cls: replica(head, cls, t, {})(t["x"]) for cls in (type(head), nn.Linear)]
    try:
        return compared(runs, tensors, torch.device("cpu"), torch.bfloat16)
    except Exception as error:
        return unproven(error)


def _labels(device: torch.device) -> Tensor:
    labels = torch.randint(VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    labels[:, ::7] = -100
    return labels.to(device)


def code_of(original: Callable[..., Tensor] | None) -> Code:
    """Of the loss, and of PyTorch's, which others replace as well."""
    return Code(original, F.cross_entropy)


@functools.cache
def linear_differs(
    original: Callable[..., Tensor] | None,
    bias: bool,
    options: tuple,
    device: torch.device,
    dtype: torch.dtype,
    code: Code,
) -> str | None:
    names = ("x", "weight", "bias") if bias else ("x", "weight")
    tensors = {"x": randn(1, 2, TOKENS, WIDTH), "weight": randn(2, VOCAB, WIDTH) / WIDTH**0.5, "bias": randn(3, VOCAB)}
    tensors = {name: tensors[name] for name in names}

    def steps(logits: Tensor | DeferredLogits) -> Tensor | DeferredLogits:
        # what models do to logits: Granite's and Cohere's scale, then Gemma 2's softcap
        return torch.tanh(logits * 0.7 / 5.0) * 5.0

    def cross_entropy(logits: Tensor | DeferredLogits) -> Tensor:
        # as models do that compute their loss themselves
        labels = _labels(logits.device)
        return F.cross_entropy(logits[:, :-1].contiguous().view(-1, VOCAB), labels[:, 1:].reshape(-1))

    def stock(t: Mapping[str, Tensor]) -> Tensor:
        logits = steps(F.linear(t["x"], t["weight"], t.get("bias")))
        if original is None:
            return cross_entropy(logits)
        return original(logits, _labels(t["x"].device), VOCAB)

    def fused(t: Mapping[str, Tensor]) -> Tensor:
        head = nn.Linear(WIDTH, VOCAB, bias=bias, device="meta")
        head._parameters.update({name: t[name] for name in names[1:]})
        scope = Scope(None)
        scope.linear = dict(options)
        swap(head, Head, _ds_fused_scope=scope)
        logits = steps(DeferredLogits(HeadCall(head, t["x"])))
        if original is None:
            value = cross_entropy(logits)
        else:
            value = CausalLMLoss(original, scope)(logits, _labels(t["x"].device), VOCAB)
        assert logits.call.on_demand is not None
        return value

    return compare(stock, fused, tensors, dict.fromkeys(tensors, dtype), device)


@functools.cache
def real_differs(original: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, code: Code) -> str | None:
    def stock(t: Mapping[str, Tensor]) -> Tensor:
        return original(t["logits"], _labels(t["logits"].device), VOCAB)

    def fused(t: Mapping[str, Tensor]) -> Tensor:
        loss = CausalLMLoss(original, Scope(None))
        loss.real = True
        return loss(t["logits"], _labels(t["logits"].device), VOCAB)

    return compare(stock, fused, {"logits": randn(4, 2, TOKENS, VOCAB)}, {"logits": dtype}, device)
