"""Losses of preferences and policies, of the log-probabilities that ``linear_log_probs`` finds.

Each is a few operations on numbers by answer or by token, for which no kernel pays; what takes time and memory is the
head before them. The modules of ``ds_fused.nn`` put head and loss together. Who has logits takes
``-cross_entropy(logits, ids, reduction="none", logit_scale=1 / temperature)`` for them, which reads them once each way.

Sizes: B answers (or pairs of them), T tokens of an answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["cpo_loss", "dpo_loss", "grpo_loss", "kto_loss", "orpo_loss", "simpo_loss"]


class _Pairs(NamedTuple):
    """How much likelier than the reference each answer has become, [B] each, and the numbers of a loss of pairs."""

    chosen: Tensor
    rejected: Tensor
    beta: float
    smoothing: float
    tau: float

    @property
    def margin(self) -> Tensor:
        return self.beta * (self.chosen - self.rejected)


def _bits(margin: Tensor, smoothing: float) -> Tensor:
    """The cross entropy of "the chosen one is better", which is wrong with a probability of ``smoothing``."""
    return -(1.0 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)


def _exo_pair(p: _Pairs) -> Tensor:
    won, lost = F.logsigmoid(p.margin), F.logsigmoid(-p.margin)
    return won.exp() * (won - math.log1p(-p.smoothing)) + lost.exp() * (lost - math.log(p.smoothing))


def _nca_pair(p: _Pairs) -> Tensor:
    chosen, rejected = p.beta * p.chosen, p.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * (F.logsigmoid(-chosen) + F.logsigmoid(-rejected))


def _discopop(p: _Pairs) -> Tensor:
    far = torch.sigmoid(p.margin / p.tau)
    return -F.logsigmoid(p.margin) * (1.0 - far) + torch.exp(-p.margin) * far


# by TRL's names; of what each is the loss says the paper behind it
DPO_LOSSES: Mapping[str, Callable[[_Pairs], Tensor]] = {
    "sigmoid": lambda p: _bits(p.margin, p.smoothing),  # DPO (arXiv 2305.18290); smoothed: conservative DPO
    "hinge": lambda p: torch.relu(1.0 - p.margin),  # SLiC (2305.10425)
    "ipo": lambda p: (p.chosen - p.rejected - 0.5 / p.beta).square(),  # 2310.12036; of mean log-probabilities
    "exo_pair": _exo_pair,  # 2402.00856
    "nca_pair": _nca_pair,  # 2402.05369
    "robust": lambda p: (_bits(p.margin, p.smoothing) + 2.0 * p.smoothing * F.logsigmoid(-p.margin))
    / (1.0 - 2.0 * p.smoothing),  # 2403.00409
    "bco_pair": lambda p: -F.logsigmoid(p.beta * p.chosen) - F.logsigmoid(-p.beta * p.rejected),  # 2404.04656
    "sppo_hard": lambda p: (p.chosen - 0.5 / p.beta).square() + (p.rejected + 0.5 / p.beta).square(),  # 2405.00675
    "apo_zero": lambda p: torch.sigmoid(-p.beta * p.chosen) + torch.sigmoid(p.beta * p.rejected),  # 2408.06266
    "apo_down": lambda p: torch.sigmoid(p.beta * p.chosen) + torch.sigmoid(-p.margin),  # 2408.06266
    "discopop": _discopop,  # 2406.08414
}


def dpo_loss(
    chosen: Tensor,  # [B]
    rejected: Tensor,  # [B]
    ref_chosen: Tensor | None = None,  # [B]; None: 0
    ref_rejected: Tensor | None = None,  # [B]
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
) -> Tensor:
    """Direct preference optimisation, of log-probabilities of whole answers: the mean over the pairs.

    ``loss_type``: see DPO_LOSSES. ``label_smoothing``: how often the rejected answer is in truth the better one, for
    "sigmoid", "robust" (below 0.5) and "exo_pair" (above 0).
    """
    check_dpo(beta, loss_type, label_smoothing)
    if (ref_chosen is None) != (ref_rejected is None):
        missing = "ref_chosen" if ref_chosen is None else "ref_rejected"
        raise ValueError(f"dpo_loss: {missing} is missing; a reference gives both answers of a pair")
    _check_shapes("dpo_loss", "chosen", chosen, rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected)
    if ref_chosen is not None:
        chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
    return DPO_LOSSES[loss_type](_Pairs(chosen, rejected, beta, label_smoothing, discopop_tau)).mean()


def check_dpo(beta: float, loss_type: str, label_smoothing: float) -> None:
    if loss_type not in DPO_LOSSES:
        raise ValueError(f"dpo_loss: loss_type is {loss_type!r}; known are {', '.join(DPO_LOSSES)}")
    if loss_type in ("ipo", "sppo_hard") and beta == 0.0:
        raise ValueError(f"dpo_loss: beta is 0; {loss_type} divides by it")
    most = 0.5 if loss_type == "robust" else 1.0
    if not 0.0 <= label_smoothing < most or (loss_type == "exo_pair" and label_smoothing == 0.0):
        least = "above 0" if loss_type == "exo_pair" else "at least 0"
        raise ValueError(
            f"dpo_loss: label_smoothing is {label_smoothing}; for {loss_type} it must be {least} and below {most}"
        )


def _check_shapes(op: str, name: str, like: Tensor, **others: Tensor | None) -> None:
    """All of one shape: what is broadcast gives a loss of pairs that nobody has made."""
    for other, given in others.items():
        if given is not None and given.shape != like.shape:
            raise ValueError(f"{op}: {other} {tuple(given.shape)} must have the shape of {name}, {tuple(like.shape)}")


def _check_smoothing(op: str, label_smoothing: float) -> None:
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {label_smoothing}; it must lie in [0, 1]")


def cpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Contrastive preference optimisation (arXiv 2401.08417) of [B] and [B], without its likelihood of the chosen.

    ``-logsigmoid(beta * (chosen - rejected))``, the mean over the pairs; ``label_smoothing`` as in dpo_loss.
    """
    _check_smoothing("cpo_loss", label_smoothing)
    _check_shapes("cpo_loss", "chosen", chosen, rejected=rejected)
    return _bits(beta * (chosen - rejected), label_smoothing).mean()


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 0.1, gamma: float = 0.5, label_smoothing: float = 0.0
) -> Tensor:
    """SimPO (arXiv 2405.14734): of mean log-probabilities [B] and [B], which have to be ``gamma`` apart.

    ``-logsigmoid(beta * (chosen - rejected) - gamma)``, the mean over the pairs; ``label_smoothing`` as in dpo_loss.
    """
    _check_smoothing("simpo_loss", label_smoothing)
    _check_shapes("simpo_loss", "chosen", chosen, rejected=rejected)
    return _bits(beta * (chosen - rejected) - gamma, label_smoothing).mean()


def orpo_loss(chosen: Tensor, rejected: Tensor, *, beta: float = 0.1) -> Tensor:
    """ORPO's odds ratio (arXiv 2403.07691), of mean log-probabilities [B] and [B]; without the likelihood.

    ``-beta * logsigmoid(log_odds(chosen) - log_odds(rejected))``, the mean, with ``log_odds(x) = x - log(1 - exp(x))``.
    """
    _check_shapes("orpo_loss", "chosen", chosen, rejected=rejected)
    return -beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected)).mean()


def _log_odds(log_prob: Tensor) -> Tensor:
    # log(1 - p): near 1, p is no longer told from it
    near = log_prob > -math.log(2.0)
    of_rest = torch.where(
        near, torch.log(-torch.expm1(torch.where(near, log_prob, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, log_prob))),
    )  # fmt: skip
    return log_prob - of_rest


def kto_loss(
    log_probs: Tensor,  # [B]
    is_chosen: Tensor,  # [B] bool
    ref_log_probs: Tensor | None = None,  # [B]; None: 0
    kl: Tensor | float | None = None,  # a number, or [B]; None: 0
    *,
    beta: float = 0.1,
) -> Tensor:
    """Kahneman-Tversky optimisation (arXiv 2402.01306): answers that are good or bad, each without the other.

    ``kl``: how far policy and reference are apart, as estimated elsewhere; no gradient goes there.
    """
    if is_chosen.dtype != torch.bool:
        raise ValueError(f"kto_loss: is_chosen is {is_chosen.dtype}; it must be torch.bool")
    answers = {"is_chosen": is_chosen, "ref_log_probs": ref_log_probs}
    if isinstance(kl, Tensor) and kl.numel() != 1:
        answers["kl"] = kl
    _check_shapes("kto_loss", "log_probs", log_probs, **answers)
    rewards = log_probs if ref_log_probs is None else log_probs - ref_log_probs
    if kl is not None:
        rewards = rewards - (kl.detach() if isinstance(kl, Tensor) else kl)
    return torch.sigmoid(beta * torch.where(is_chosen, -rewards, rewards)).mean()


# how a policy's loss is divided: by the tokens of each answer and then the answers, all tokens, answers times a length,
# or the tokens of the whole step
GRPO_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")


class GRPOMetrics(NamedTuple):
    """For a log, without gradients: means over the tokens that count."""

    kl: Tensor | None  # from the reference; None with beta = 0
    clipped: Tensor  # how many of the ratios were clipped


def grpo_loss(
    log_probs: Tensor,  # [B, T]
    advantages: Tensor,  # [B], [B, 1] or [B, T]
    mask: Tensor | None = None,  # [B, T]: which tokens count
    old_log_probs: Tensor | None = None,  # [B, T]; None: those of now
    ref_log_probs: Tensor | None = None,  # [B, T], for beta
    importance_ratio: Tensor | None = None,  # [B], [B, 1] or [B, T]
    n_tokens: Tensor | float | None = None,
    *,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    loss_type: str = "dapo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, GRPOMetrics]:
    """Group relative policy optimisation and its relatives, by the names and with the meanings of TRL's GRPOTrainer.

    Per token, with ``r = exp(log_probs - old_log_probs)`` (level "sequence": GSPO's, of the mean over the answer) and
    ``A`` its advantage:

        grpo, bnpo, dr_grpo, dapo, luspo    -min(min(r, delta) A, clamp(r, 1 - epsilon_low, 1 + epsilon_high) A)
        cispo                               -min(r, epsilon_high) A log_prob, no gradient through the first
        sapo                                -4 / t sigmoid(t (r - 1)) A, t by the sign of A
        vespo                               -phi A log_prob, phi of the answer's whole ratio, without a gradient

    times ``importance_ratio`` (of the sampler's probabilities; vespo has it in phi), plus ``beta`` times the k3
    estimate of the divergence from the reference, which ``use_bias_correction_kl`` multiplies by r. Then the mean over
    each answer's tokens and over answers (grpo, sapo), over all tokens (bnpo), the sum by answers and
    ``max_completion_length`` (dr_grpo; None: T), by ``n_tokens`` (dapo, cispo, vespo), or by answers (luspo).

    ``n_tokens``: with gradient accumulation or several ranks, the tokens that count in all of the step divided by the
    ranks that average their gradients; None: those of this call. Nothing is asked of other ranks here.
    """
    check_grpo(
        loss_type, importance_sampling_level, delta, sapo_temperature_pos, sapo_temperature_neg,
        epsilon_low, epsilon_high,
    )  # fmt: skip
    _check_answers(log_probs, advantages, mask, old_log_probs, ref_log_probs, importance_ratio)
    if beta != 0.0 and ref_log_probs is None:
        raise ValueError(f"grpo_loss: beta is {beta}, but there are no ref_log_probs to stay near to")
    if importance_ratio is not None and importance_ratio.ndim == 1:
        importance_ratio = importance_ratio[:, None]
    gains = advantages[:, None] if advantages.ndim == 1 else advantages
    counts = torch.ones_like(log_probs, dtype=torch.bool) if mask is None else mask.bool()

    old = log_probs.detach() if old_log_probs is None else old_log_probs
    # whatever stands where nothing counts
    apart = torch.where(counts, log_probs - old, 0.0)
    log_ratio = apart
    if importance_sampling_level == "sequence":
        log_ratio = apart.sum(-1, keepdim=True) / counts.sum(-1, keepdim=True).clamp_min(1)
    ratio = log_ratio.exp()
    clipped = torch.zeros_like(counts)
    if loss_type == "cispo":
        clipped = (ratio > epsilon_high) & (gains > 0)
        loss = -ratio.clamp(max=epsilon_high).detach() * gains * log_probs
    elif loss_type == "sapo":
        steep = torch.where(gains > 0, sapo_temperature_pos, sapo_temperature_neg)
        loss = -4.0 / steep * torch.sigmoid(steep * (ratio - 1.0)) * gains
    elif loss_type == "vespo":
        k = torch.where(gains >= 0, vespo_k_pos, vespo_k_neg)
        rate = torch.where(gains >= 0, vespo_lambda_pos, vespo_lambda_neg)
        loss = -_vespo_weight(apart.detach(), importance_ratio, k, rate) * gains * log_probs
    else:
        low, high = 1.0 - epsilon_low, 1.0 + epsilon_high
        clipped = ((ratio < low) & (gains < 0)) | ((ratio > high) & (gains > 0))
        kept = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.minimum(kept * gains, ratio.clamp(low, high) * gains)
    if importance_ratio is not None and loss_type != "vespo":
        loss = loss * importance_ratio
    kl = None
    if beta != 0.0:
        behind = torch.where(counts, ref_log_probs - log_probs, 0.0)
        kl = behind.exp() - behind - 1.0
        if use_bias_correction_kl:
            kl = kl * ratio
        loss = loss + beta * kl
    loss = _divided(torch.where(counts, loss, 0.0), counts, loss_type, n_tokens, max_completion_length)
    if not return_metrics:
        return loss
    with torch.no_grad():
        total = counts.sum().clamp_min(1)
        means = [None if x is None else torch.where(counts, x, 0).sum() / total for x in (kl, clipped)]
    return loss, GRPOMetrics(*means)


def _divided(
    loss: Tensor, counts: Tensor, loss_type: str, n_tokens: Tensor | float | None, max_completion_length: int | None
) -> Tensor:
    """Of tokens [B, T], 0 where they don't count, one number."""
    n_answers = loss.shape[0]
    if loss_type in ("grpo", "sapo"):
        return (loss.sum(-1) / counts.sum(-1).clamp_min(1)).sum() / n_answers
    if loss_type == "dr_grpo":
        return loss.sum() / (n_answers * (max_completion_length or loss.shape[1]))
    if loss_type == "luspo":
        return loss.sum() / n_answers
    if loss_type == "bnpo" or n_tokens is None:
        return loss.sum() / counts.sum().clamp_min(1)
    return loss.sum() / n_tokens


def check_grpo(
    loss_type: str,
    level: str,
    delta: float | None,
    sapo_temperature_pos: float,
    sapo_temperature_neg: float,
    epsilon_low: float,
    epsilon_high: float,
) -> None:
    if loss_type not in GRPO_LOSSES:
        raise ValueError(f"grpo_loss: loss_type is {loss_type!r}; known are {', '.join(GRPO_LOSSES)}")
    if level not in LEVELS:
        raise ValueError(f"grpo_loss: importance_sampling_level is {level!r}; known are {', '.join(LEVELS)}")
    if level == "sequence" and loss_type in ("cispo", "sapo", "vespo"):
        raise ValueError(f"grpo_loss: {loss_type} weights tokens; importance_sampling_level must be 'token'")
    for name, value in (
        ("delta", delta), ("sapo_temperature_pos", sapo_temperature_pos), ("sapo_temperature_neg", sapo_temperature_neg)
    ):  # fmt: skip
        if value is not None and not value > 0.0:
            raise ValueError(f"grpo_loss: {name} is {value}; it must be positive")
    for name, value in (("epsilon_low", epsilon_low), ("epsilon_high", epsilon_high)):
        # a ratio of 1 would be outside its own bounds
        if not value >= 0.0:
            raise ValueError(f"grpo_loss: {name} is {value}; it must not be negative")


def _check_answers(
    log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    old_log_probs: Tensor | None,
    ref_log_probs: Tensor | None,
    importance_ratio: Tensor | None,
) -> None:
    if log_probs.ndim != 2:
        raise ValueError(f"grpo_loss: log_probs {tuple(log_probs.shape)} must be [B, T]")
    by_token = {"mask": mask, "old_log_probs": old_log_probs, "ref_log_probs": ref_log_probs}
    _check_shapes("grpo_loss", "log_probs", log_probs, **by_token)
    n_answers, n_tokens = log_probs.shape
    by_answer = {(n_answers,), (n_answers, 1), (n_answers, n_tokens)}
    for name, given in (("advantages", advantages), ("importance_ratio", importance_ratio)):
        if given is not None and tuple(given.shape) not in by_answer:
            raise ValueError(
                f"grpo_loss: {name} {tuple(given.shape)} must be [B], [B, 1] or [B, T] beside log_probs "
                f"{tuple(log_probs.shape)}"
            )


def _vespo_weight(apart: Tensor, importance_ratio: Tensor | None, k: Tensor, rate: Tensor) -> Tensor:
    """``exp(rate) w^k exp(-rate w)`` of the whole answer's ratio w, 1 where w is 1; [B, T] -> [B, 1]."""
    least, most = math.log(1e-8), 20.0
    log_w = apart.clamp(-most, most).sum(-1, keepdim=True)
    if importance_ratio is not None:
        log_w = log_w + importance_ratio.log().clamp(least, most).sum(-1, keepdim=True)
    log_w = log_w.clamp(least, most)
    rate = rate.clamp_min(1e-4)
    return (rate + k * log_w - rate * log_w.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
