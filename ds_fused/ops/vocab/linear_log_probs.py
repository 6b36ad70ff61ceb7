"""Log-probability of each token's label from hidden states, without the whole logits: what RLHF, GRPO and DPO ask for.

Per token, with ``z = softcap * tanh(logit_scale * F.linear(x, weight, bias) / softcap) / temperature`` (without a cap
``logit_scale * F.linear(x, weight, bias) / temperature``):

    log_prob = z[label] - logsumexp(z)                      dz = dlog_prob * (onehot - softmax(z))
    entropy  = logsumexp(z) - sum(softmax(z) * z)           dz = -dentropy * softmax(z) * (log_softmax(z) + entropy)

A log-probability is the negative of linear_cross_entropy's loss without a reduction, so that is who computes it: its
tiles, its softmax passes, its slabs under ZeRO-3. A temperature comes after the cap, as in generation, and is the same
as another scale and another cap. The true backward takes any upstream gradient of each token.

Saved for backward, work and traffic: as linear_cross_entropy; with an entropy 4 bytes a token more. Per logit the
forward has a third accumulator then, and the backward one exponential more; without, nothing of it is compiled.

Sizes: M tokens (every leading dimension of x, flattened), H hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.common._options import check_numbers, check_numbers_or_none
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab.linear_cross_entropy import token_losses
from ds_fused.ops.vocab.slabs import WeightSlabs
from ds_fused.ops.vocab.vocab_shard import VocabShard


def linear_log_probs_reference(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """What this file computes, in PyTorch and with all logits at once: the specification and the tests' yardstick."""
    logits = F.linear(x, weight, bias)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    ignored = labels == ignore_index
    log_p = torch.log_softmax(z / temperature, -1)
    picked = log_p.gather(-1, labels.long().masked_fill(ignored, 0)[..., None])[..., 0]
    log_probs = picked.masked_fill(ignored, 0.0)
    if not entropy:
        return log_probs
    # a word without any probability adds nothing, though its logarithm is -inf
    entropies = -(log_p.exp() * log_p.masked_fill(log_p == float("-inf"), 0.0)).sum(-1)
    return log_probs, entropies.masked_fill(ignored, 0.0)


def linear_log_probs(
    x: Tensor,  # [..., H]
    weight: Tensor | WeightSlabs | VocabShard,  # [V, H]
    labels: Tensor,  # [...] int64 or int32
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    chunk_mb: int = 512,
    keep_mb: int = 2048,
) -> Tensor | tuple[Tensor, Tensor]:
    """``log_softmax(logit_scale * F.linear(x, weight, bias) / temperature)`` at the labels: [...] in fp32.

    ``entropy=True`` returns (log-probs, entropy of each token's distribution). Tokens whose label is ``ignore_index``
    have zeros in both and no gradient. ``softcap`` caps before the temperature divides.

    ``chunk_mb``: MiB of logits that are worked on at a time. ``keep_mb``: MiB of logits kept for backward; the rest is
    computed again. Kept logits make way for their gradient, so a second backward raises unless ``keep_mb=0``.
    """
    op = "linear_log_probs"
    check_numbers(op, temperature=temperature, logit_scale=logit_scale)
    check_numbers_or_none(op, softcap=softcap)
    if not temperature > 0.0:
        raise ValueError(f"{op}: temperature is {temperature}; it must be positive")
    # cap * tanh(scale * x / cap) / t, with scale and cap each divided by t
    cap = None if softcap is None else softcap / temperature
    options = LossOptions(ignore_index, softcap=cap, logit_scale=logit_scale / temperature)
    found = token_losses(
        op, x, weight, labels, bias, options, "none", chunk_mb=chunk_mb, keep_mb=keep_mb, entropy=entropy
    )
    log_probs = -found.loss.view(labels.shape)
    return (log_probs, found.entropy.view(labels.shape)) if entropy else log_probs
