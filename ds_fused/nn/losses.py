"""Cross entropy, of logits and of hidden states."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.nn._options import known, listed, nothing
from ds_fused.ops import cross_entropy, linear_cross_entropy


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` of class indices; the loss is fp32, whatever the logits are.

    ``options``: what ``ds_fused.cross_entropy`` takes besides, as ``z_loss`` or ``grad_in_forward``.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options = known(self, cross_entropy, options, ("weight",))
        self._loss(nothing(0, 1), nothing(0, dtype=torch.int64))

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, ...]:
        # PyTorch has the classes in the second dimension
        return self._loss(input.movedim(1, -1) if input.ndim > 2 else input, target, self.weight)

    def _loss(self, logits: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        return cross_entropy(
            logits,
            labels,
            weight=weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.options,
        )

    def extra_repr(self) -> str:
        return listed(self.options)


class LinearCrossEntropyLoss(torch.nn.Module):
    """A head and its loss, ``linear_cross_entropy(x, linear.weight, target)``, of class indices.

    Names and arguments are those of PyTorch 2.13's module of this name. ``options``: what
    ``ds_fused.linear_cross_entropy`` takes besides, as ``softcap`` or ``chunk_mb``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        self.options |= known(self, linear_cross_entropy, options, ("bias", "class_weight"))
        linear_cross_entropy(nothing(0, 1), nothing(1, 1), nothing(0, dtype=torch.int64), **self.options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, ...]:
        head = self.linear
        return linear_cross_entropy(
            input, head.weight, target, bias=head.bias, class_weight=self.weight, **self.options
        )

    def extra_repr(self) -> str:
        return listed(self.options)
