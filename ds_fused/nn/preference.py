"""A head and a loss of preferences, of which no logits exist as a whole: DPO, CPO, SimPO, ORPO, KTO.

x, weight and labels are those of ``linear_log_probs``, with labels that are shifted already; tokens that don't belong
to an answer have ``ignore_index``. What becomes of the log-probabilities stands in functional.py.

A reference is a frozen model that the policy is to stay near to: ``ref_x``, ``ref_weight`` and ``ref_bias``, or
``ref_log_probs``, what it gave each answer before.

Sizes: B pairs, or answers where they have no pair; T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.nn._head_loss import HeadLoss
from ds_fused.nn.functional import check_dpo, cpo_loss, dpo_loss, kto_loss, orpo_loss, simpo_loss


class PreferenceMetrics(NamedTuple):
    """For a log, without gradients. Rewards are beta times how much likelier than the reference an answer is."""

    chosen_log_probs: Tensor  # [B], as the loss takes them
    rejected_log_probs: Tensor  # [B]
    chosen_rewards: Tensor  # [B]
    rejected_rewards: Tensor  # [B]
    nll: Tensor | None  # of the chosen answers' tokens; None where it has no weight


class _AnswersLoss(HeadLoss):
    """``average``: log-probabilities of answers are means over their tokens, not sums."""

    def __init__(self, average: bool, ignore_index: int, options: dict[str, object]) -> None:
        super().__init__(ignore_index, options)
        self.average = average

    def _of_answers(self, log_probs: Tensor, counts: Tensor) -> Tensor:
        """[..., T] -> [...]; an answer without a token has 0."""
        total = torch.where(counts, log_probs, 0.0).sum(-1)
        return total / counts.sum(-1).clamp_min(1) if self.average else total

    def _of_reference(
        self, labels: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, given: Tensor | None
    ) -> Tensor | None:
        """What the reference gives each answer; None without one."""
        log_probs = self.reference_log_probs(labels, x, weight, bias, given)
        if given is None:
            return None if log_probs is None else self._of_answers(log_probs, labels != self.ignore_index)
        if given.shape != labels.shape[:1]:
            raise ValueError(
                f"{type(self).__name__}: ref_log_probs {tuple(given.shape)} must be one for each of the "
                f"{labels.shape[0]} answers"
            )
        return given

    def extra_repr(self) -> str:
        return f"average={self.average}, {super().extra_repr()}"


class _PairsLoss(_AnswersLoss):
    """``nll_weight``: of the chosen answers' negative log-likelihood, a mean over their tokens, which is added."""

    def __init__(
        self,
        *,
        average: bool,
        nll_weight: float,
        ignore_index: int = -100,
        return_metrics: bool = False,
        **options: object,
    ) -> None:
        super().__init__(average, ignore_index, options)
        self.nll_weight, self.return_metrics = nll_weight, return_metrics

    def forward(
        self,
        x: Tensor,  # [2B, T, H]: the chosen answers, then the rejected ones in the same order
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [2B, T]
        *,
        bias: Tensor | None = None,  # [V]
        nll_labels: Tensor | None = None,  # [B, T] or [2B, T], whose first half counts
    ) -> Tensor | tuple[Tensor, PreferenceMetrics]:
        """``nll_labels``: what the likelihood counts, where that is more than the answer (ORPO: the prompt too).

        A token that counts in both must be the same one.
        """
        self._check(labels, nll_labels)
        return self._loss(x, weight, labels, bias, nll_labels)

    def _loss(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None,
        nll_labels: Tensor | None,
        ref_log_probs: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, PreferenceMetrics]:
        n_pairs = labels.shape[0] // 2
        counts = labels != self.ignore_index
        read, likely = labels, counts[:n_pairs]
        if nll_labels is not None and self.nll_weight:
            # one reading of the logits serves both
            own, own_nll = labels[:n_pairs], nll_labels[:n_pairs]
            likely = own_nll != self.ignore_index
            agree = ((own == own_nll) | ~(likely & counts[:n_pairs])).all()
            torch._assert_async(agree, f"{type(self).__name__}: labels and nll_labels differ in a token of both")
            read = torch.cat((torch.where(counts[:n_pairs], own, own_nll), labels[n_pairs:]))
        log_probs = self.log_probs(x, weight, read, bias)
        answers = self._of_answers(log_probs, counts).split(n_pairs)
        references = () if ref_log_probs is None else ref_log_probs.split(n_pairs)
        loss, nll = self.loss(*answers, *references, **self.options), None
        if self.nll_weight:
            nll = -torch.where(likely, log_probs[:n_pairs], 0.0).sum() / likely.sum()
            loss = loss + self.nll_weight * nll
        if not self.return_metrics:
            return loss
        answers = [answer.detach() for answer in answers]
        rewards = [self.options["beta"] * (a - b) for a, b in zip(answers, references or (0.0, 0.0), strict=True)]
        return loss, PreferenceMetrics(*answers, *rewards, None if nll is None else nll.detach())

    def _check(self, labels: Tensor, nll_labels: Tensor | None) -> None:
        name = type(self).__name__
        if labels.ndim != 2 or labels.shape[0] % 2:
            raise ValueError(
                f"{name}: labels {tuple(labels.shape)} must be [2B, T]: chosen answers, then rejected ones"
            )
        n_pairs, n_tokens = labels.shape[0] // 2, labels.shape[1]
        if nll_labels is not None and nll_labels[:n_pairs].shape != (n_pairs, n_tokens):
            raise ValueError(
                f"{name}: nll_labels {tuple(nll_labels.shape)} must be [B, T] or [2B, T] beside labels "
                f"{tuple(labels.shape)}"
            )

    def extra_repr(self) -> str:
        return f"nll_weight={self.nll_weight}, {super().extra_repr()}"


class LinearCPOLoss(_PairsLoss):
    """``cpo_loss`` of sums and the likelihood of the chosen; options: beta, label_smoothing, the head's."""

    loss = staticmethod(cpo_loss)

    def __init__(self, *, average: bool = False, nll_weight: float = 1.0, **options: object) -> None:
        super().__init__(average=average, nll_weight=nll_weight, **options)


class LinearSimPOLoss(_PairsLoss):
    """``simpo_loss`` of means; options: beta, gamma, label_smoothing, the head's."""

    loss = staticmethod(simpo_loss)

    def __init__(self, *, average: bool = True, nll_weight: float = 0.0, **options: object) -> None:
        super().__init__(average=average, nll_weight=nll_weight, **options)


class LinearORPOLoss(_PairsLoss):
    """``orpo_loss`` of means and the likelihood of the chosen; options: beta, the head's."""

    loss = staticmethod(orpo_loss)

    def __init__(self, *, average: bool = True, nll_weight: float = 1.0, **options: object) -> None:
        super().__init__(average=average, nll_weight=nll_weight, **options)


class LinearDPOLoss(_PairsLoss):
    """``dpo_loss`` of sums ("ipo": means); options: beta, loss_type, label_smoothing, discopop_tau, the head's."""

    loss = staticmethod(dpo_loss)

    def __init__(self, *, average: bool | None = None, nll_weight: float = 0.0, **options: object) -> None:
        average = options.get("loss_type") == "ipo" if average is None else average
        super().__init__(average=average, nll_weight=nll_weight, **options)
        check_dpo(self.options["beta"], self.options["loss_type"], self.options["label_smoothing"])

    def forward(
        self,
        x: Tensor,  # [2B, T, H]: the chosen answers, then the rejected ones in the same order
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [2B, T]
        *,
        bias: Tensor | None = None,  # [V]
        nll_labels: Tensor | None = None,  # as in the others
        ref_x: Tensor | None = None,  # [2B, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,  # [V]
        ref_log_probs: Tensor | None = None,  # [2B]: sums or means, as here
    ) -> Tensor | tuple[Tensor, PreferenceMetrics]:
        """Without a reference each answer counts as if it found all alike."""
        self._check(labels, nll_labels)
        reference = self._of_reference(labels, ref_x, ref_weight, ref_bias, ref_log_probs)
        return self._loss(x, weight, labels, bias, nll_labels, reference)


class LinearKTOLoss(_AnswersLoss):
    """``kto_loss`` of sums, or with ``average`` means; options: beta, the head's."""

    loss = staticmethod(kto_loss)

    def __init__(self, *, average: bool = False, ignore_index: int = -100, **options: object) -> None:
        super().__init__(average, ignore_index, options)

    def forward(
        self,
        x: Tensor,  # [B, T, H]
        weight: Tensor,  # [V, H]
        labels: Tensor,  # [B, T]
        is_chosen: Tensor,  # [B] bool
        *,
        bias: Tensor | None = None,  # [V]
        kl: Tensor | float | None = None,  # a number, or [B]
        ref_x: Tensor | None = None,  # [B, T, H']
        ref_weight: Tensor | None = None,  # [V, H']
        ref_bias: Tensor | None = None,  # [V]
        ref_log_probs: Tensor | None = None,  # [B]: sums or means, as here
    ) -> Tensor:
        if labels.ndim != 2 or is_chosen.shape != labels.shape[:1]:
            raise ValueError(
                f"LinearKTOLoss: labels {tuple(labels.shape)} must be [B, T] and is_chosen {tuple(is_chosen.shape)} [B]"
            )
        answers = self._of_answers(self.log_probs(x, weight, labels, bias), labels != self.ignore_index)
        reference = self._of_reference(labels, ref_x, ref_weight, ref_bias, ref_log_probs)
        return self.loss(answers, is_chosen, reference, kl, **self.options)
