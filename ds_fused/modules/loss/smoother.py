"""The label smoothing of HuggingFace's Trainer, without logits.

With ``label_smoothing_factor`` the Trainer keeps the labels to itself, calls the model without them, and computes the
loss of the logits that come out:

    outputs = model(**inputs)                      # no labels: the head would compute
    loss = trainer.label_smoother(outputs, labels)

``fuse_label_smoother(trainer)`` puts a ``Smoother`` there and lets the trainer's forwards leave their logits deferred.
The smoother runs linear_cross_entropy of the head's input, with smoothing, in the head's own call. It does so for the
logits of a forward as they came: what a script has made of them, or has from elsewhere, goes to the trainer's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.modules.loss.deferred import DeferredLogits
from ds_fused.modules.loss.head import Head, linear_loss
from ds_fused.modules.loss.on_demand import LogitsOnDemand, leaving
from ds_fused.modules.loss.out_of_graph import LogitsOutOfGraph
from ds_fused.modules.loss.scope import Scope


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
        logits = self._left_as(model_output)
        fused = None if logits is None else self._fused(logits, labels, shift_labels, num_items_in_batch)
        if fused is not None:
            return fused
        # not every version of transformers has it (5.9)
        count = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return self.original(model_output, labels, shift_labels=shift_labels, **count)

    def _left_as(self, model_output: Any) -> DeferredLogits | None:
        """The logits that left a forward as this output's."""
        given = model_output["logits"] if isinstance(model_output, dict) else model_output[0]
        if isinstance(given, LogitsOutOfGraph):
            given = given.logits()
        if not isinstance(given, LogitsOnDemand):
            return None
        waiting = [logits for scope in self.scopes for logits in scope.left]
        return next((logits for logits in waiting if given.is_cast_of(leaving(logits))), None)

    def _fused(
        self, logits: DeferredLogits, labels: Tensor, shift_labels: bool, num_items_in_batch: Tensor | int | None
    ) -> Tensor | None:
        if labels.dtype != torch.int64 or labels.shape != logits.shape[:-1]:
            return None
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
                scope.loss_outside, scope.left = False, []

    def undo() -> None:
        trainer.label_smoother = original
        if had_own:
            trainer.compute_loss = compute_loss
        else:
            del trainer.compute_loss

    trainer.label_smoother, trainer.compute_loss = smoother, computed
    return undo
