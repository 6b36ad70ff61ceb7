"""The label smoothing of HuggingFace's Trainer, without logits.

With ``label_smoothing_factor`` the Trainer keeps the labels to itself, calls the model without them, and computes the
loss of the logits that come out:

    outputs = model(**inputs)                      # no labels: the head would compute
    loss = trainer.label_smoother(outputs, labels)

``fuse_label_smoother(trainer)`` puts a ``Smoother`` there and lets the trainer's forwards leave their logits deferred.
The smoother runs linear_cross_entropy of the head's input, with smoothing, in the head's own call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.modules.head import Head, linear_loss
from ds_fused.modules.scope import Scope


class Smoother:
    """Stands where the trainer's ``LabelSmoother`` stood: the same arguments, the same value."""

    def __init__(self, original: Callable[..., Tensor]) -> None:
        self.original = original
        self.epsilon: float = original.epsilon
        self.ignore_index: int = original.ignore_index
        # those of the model whose loss is being computed
        self.scopes: list[Scope] = []

    def __call__(
        self,
        model_output: Any,
        labels: Tensor,
        shift_labels: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        fused = self._fused(labels, shift_labels, num_items_in_batch)
        if fused is not None:
            return fused
        return self.original(model_output, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)

    def _fused(self, labels: Tensor, shift_labels: bool, num_items_in_batch: Tensor | int | None) -> Tensor | None:
        waiting = [scope.left for scope in self.scopes if scope.left is not None]
        if len(waiting) != 1 or labels.dtype != torch.int64 or labels.shape != waiting[0].shape[:-1]:
            return None
        (logits,) = waiting
        if shift_labels:
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        loss = linear_loss(
            logits,
            labels.reshape(-1).to(logits.device),
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=self.ignore_index,
            label_smoothing=self.epsilon,
        )
        if loss is None or num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch


def fuse_label_smoother(trainer: Any) -> Callable[[], None]:
    """Compute ``trainer``'s smoothed loss without logits. To be called before it trains; returns what undoes it.

    The model may be fused before or, by DeepSpeed, after this call. Where it isn't, everything is as before.
    """
    if not (hasattr(trainer, "label_smoother") and hasattr(trainer, "compute_loss")):
        raise ValueError(f"fuse_label_smoother: it takes a Trainer of transformers, got a {type(trainer).__name__}")
    original = trainer.label_smoother
    if original is None:
        raise ValueError("fuse_label_smoother: the trainer smooths no labels; its label_smoothing_factor is 0")
    if isinstance(original, Smoother):
        raise ValueError("fuse_label_smoother: the trainer's label smoother is fused already")
    smoother = Smoother(original)
    had_own, compute_loss = "compute_loss" in vars(trainer), trainer.compute_loss

    @functools.wraps(compute_loss)
    def computed(model: nn.Module, inputs: dict, *args: Any, **named: Any) -> Any:
        smoother.scopes = [m._ds_fused_scope for m in model.modules() if isinstance(m, Head)]
        for scope in smoother.scopes:
            scope.loss_outside = "labels" in inputs
        try:
            return compute_loss(model, inputs, *args, **named)
        finally:
            for scope in smoother.scopes:
                scope.loss_outside, scope.left = False, None

    def undo() -> None:
        trainer.label_smoother = original
        if had_own:
            trainer.compute_loss = compute_loss
        else:
            del trainer.compute_loss

    trainer.label_smoother, trainer.compute_loss = smoother, computed
    return undo
