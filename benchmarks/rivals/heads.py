"""Losses and log-probabilities of a vocabulary, from logits and from hidden states."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.rivals.provider import Call, Provider, Tensors, compiled, eager, liger_ops, our_ops

# --- cross_entropy: logits [N, V], labels [N] ---


def _hf_loss(t: Tensors):
    from transformers.loss.loss_utils import ForCausalLMLoss

    n_vocab = t["logits"].shape[-1]

    def loss(logits, labels):
        return ForCausalLMLoss(logits, None, n_vocab, shift_labels=labels)

    return loss, (t["logits"], t["labels"])


def _liger_loss(t: Tensors) -> Call:
    loss = liger_ops().liger_cross_entropy
    return lambda: loss(t["logits"], t["labels"])


def _our_loss(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = our_ops().cross_entropy
        return lambda: loss(t["logits"], t["labels"], **options)

    return build


def loss_providers(upstream: float) -> dict[str, Provider]:
    """``upstream``: the gradient that the loss is given, which ours may know in the forward."""
    in_forward = "gradient made in forward, over the logits; restored untimed"
    ours = {
        "ds_fused": Provider(_our_loss()),
        "ds_fused overwrite_logits": Provider(
            _our_loss(overwrite_logits=True), ("logits",), "writes the gradient over the logits; restored untimed"
        ),
        "ds_fused grad_in_forward": Provider(
            _our_loss(grad_in_forward=True, upstream=upstream), ("logits",), f"{in_forward}; told upstream={upstream:g}"
        ),
    }
    if upstream != 1.0:
        ours["ds_fused grad_in_forward scaled"] = Provider(
            _our_loss(grad_in_forward=True), ("logits",), f"{in_forward}; not told, so scaled in backward"
        )
    return ours | {
        "hf_eager": Provider(eager(_hf_loss)),
        "compile": Provider(compiled(_hf_loss)),
        "liger": Provider(_liger_loss, ("logits",), in_forward),
    }


# --- linear_cross_entropy: x [M, H], weight [V, H], labels [M] ---


def _hf_linear_loss(t: Tensors):
    from transformers.loss.loss_utils import ForCausalLMLoss

    n_vocab = t["weight"].shape[0]

    def loss(x, weight, labels):
        return ForCausalLMLoss(F.linear(x, weight), None, n_vocab, shift_labels=labels)

    return loss, (t["x"], t["weight"], t["labels"])


def _liger_linear_loss(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = liger_ops().liger_fused_linear_cross_entropy
        return lambda: loss(t["x"], t["weight"], t["labels"], **options)

    return build


def _our_linear_loss(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        loss = our_ops().linear_cross_entropy
        return lambda: loss(t["x"], t["weight"], t["labels"], **options)

    return build


IN_FORWARD = "gradients made in forward"
LINEAR_CROSS_ENTROPY = {
    "ds_fused": Provider(_our_linear_loss(), note=f"6 MHV: {IN_FORWARD}"),
    "ds_fused fp32": Provider(
        _our_linear_loss(accumulate="fp32"), note=f"6 MHV: {IN_FORWARD}, dweight added up in fp32"
    ),
    # as many tokens at a time as Liger takes of Llama-3's vocabulary
    "ds_fused chunk_mb=64": Provider(
        _our_linear_loss(chunk_mb=64, accumulate="native"), note=f"6 MHV: {IN_FORWARD}, dweight added up in its dtype"
    ),
    "ds_fused keep": Provider(
        _our_linear_loss(grad_in_forward=False), note="6 MHV for the tiles that fit keep_mb, 8 MHV for the others"
    ),
    "ds_fused keep_mb=0": Provider(
        _our_linear_loss(grad_in_forward=False, keep_mb=0), note="8 MHV: logits computed again in backward"
    ),
    "hf_eager": Provider(eager(_hf_linear_loss)),
    "compile": Provider(compiled(_hf_linear_loss)),
    "liger": Provider(_liger_linear_loss(), note=IN_FORWARD),
    "liger chunk_mem_const=8": Provider(_liger_linear_loss(chunk_mem_const=8), note=IN_FORWARD),
    "liger chunk_mem_const=16": Provider(_liger_linear_loss(chunk_mem_const=16), note=IN_FORWARD),
}


# --- linear_log_probs: x [M, H], weight [V, H], labels [M] ---


def _plain_log_probs(entropy: bool):
    def build(t: Tensors):
        def log_probs(x, weight, labels):
            logits = F.linear(x, weight).float()
            picked = -F.cross_entropy(logits, labels, reduction="none")
            if not entropy:
                return picked
            log_p = torch.log_softmax(logits, -1)
            return picked, -(log_p.exp() * log_p).sum(-1).masked_fill(labels == -100, 0.0)

        return log_probs, (t["x"], t["weight"], t["labels"])

    return build


def _our_log_probs(**options) -> Callable[[Tensors], Call]:
    def build(t: Tensors) -> Call:
        log_probs = our_ops().linear_log_probs
        return lambda: log_probs(t["x"], t["weight"], t["labels"], **options)

    return build


def log_probs_providers(entropy: bool) -> dict[str, Provider]:
    plain = _plain_log_probs(entropy)
    return {
        "ds_fused": Provider(
            _our_log_probs(entropy=entropy), note="6 MHV for the tiles that fit keep_mb, 8 for others"
        ),
        "ds_fused keep_mb=0": Provider(
            _our_log_probs(entropy=entropy, keep_mb=0), note="8 MHV: logits computed again in backward"
        ),
        "ds_fused keep_mb=8192": Provider(
            _our_log_probs(entropy=entropy, keep_mb=8192), note="6 MHV, all logits of these shapes kept"
        ),
        "hf_eager": Provider(eager(plain), note="plain PyTorch"),
        "compile": Provider(compiled(plain)),
    }
