"""A head and a policy's loss, of which no logits exist as a whole: GRPO and its relatives."""

from __future__ import annotations

from torch import Tensor

from ds_fused.nn._head_loss import HeadLoss
from ds_fused.nn.functional import GRPOMetrics, check_grpo, grpo_loss


class LinearGRPOLoss(HeadLoss):
    """``grpo_loss`` of a head's log-probabilities; options: those of that function, and the head's.

    Tokens whose mask is 0 cost no softmax.
    """

    loss = staticmethod(grpo_loss)

    def __init__(self, ignore_index: int = -100, **options: object) -> None:
        super().__init__(ignore_index, options)
        names = "loss_type", "importance_sampling_level", "delta", "sapo_temperature_pos", "sapo_temperature_neg"
        check_grpo(*(self.options[name] for name in (*names, "epsilon_low", "epsilon_high")))

    def forward(
        self,
        x: Tensor,  # [B, T, H]: hidden states that predict ids
        weight: Tensor,  # [V, H]
        ids: Tensor,  # [B, T]
        advantages: Tensor,  # [B], [B, 1] or [B, T]
        mask: Tensor | None = None,  # [B, T]: which tokens count
        *,
        bias: Tensor | None = None,  # [V]
        old_log_probs: Tensor | None = None,  # [B, T]; None: those of now
        importance_ratio: Tensor | None = None,  # [B], [B, 1] or [B, T]
        n_tokens: Tensor | float | None = None,
        ref_x: Tensor | None = None,  # [B, T, H'], with ref_weight [V, H'] and ref_bias [V]: a frozen model, for beta
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_log_probs: Tensor | None = None,  # [B, T]: instead, what it gave each token
    ) -> Tensor | tuple[Tensor, GRPOMetrics]:
        labels = ids if mask is None else ids.masked_fill(~mask.bool(), self.ignore_index)
        if self.options["beta"] != 0.0:
            ref_log_probs = self.reference_log_probs(labels, ref_x, ref_weight, ref_bias, ref_log_probs)
        return self.loss(
            self.log_probs(x, weight, labels, bias), advantages, mask, old_log_probs, ref_log_probs, importance_ratio,
            n_tokens, **self.options,
        )  # fmt: skip
