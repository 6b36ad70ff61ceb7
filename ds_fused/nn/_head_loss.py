"""What the losses of a head's log-probabilities share."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ds_fused.nn._options import known, listed, nothing
from ds_fused.ops import linear_log_probs


class HeadLoss(torch.nn.Module):
    """Options are the loss's own keyword arguments, and of ``linear_log_probs`` temperature, logit_scale, softcap,
    chunk_mb and keep_mb."""

    loss: Callable[..., object]

    def __init__(self, ignore_index: int, options: dict[str, object]) -> None:
        super().__init__()
        arguments = inspect.signature(self.loss).parameters
        own = {name: p.default for name, p in arguments.items() if p.kind is p.KEYWORD_ONLY}
        others = {name: given for name, given in options.items() if name not in own}
        self.options = own | {name: options[name] for name in options if name in own}
        self.head = known(self, linear_log_probs, others, ("bias", "entropy", "ignore_index"))
        self.ignore_index = ignore_index
        self.log_probs(nothing(0, 1), nothing(1, 1), nothing(0, dtype=torch.int64), None)

    def log_probs(self, x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        """Of each token; 0 where it is ignored."""
        return linear_log_probs(x, weight, labels, bias=bias, ignore_index=self.ignore_index, **self.head)

    def reference_log_probs(
        self, labels: Tensor, x: Tensor | None, weight: Tensor | None, bias: Tensor | None, given: Tensor | None
    ) -> Tensor | None:
        """Of each token, from a frozen model, or what is ``given``; None where there is no reference."""
        has_head = any(t is not None for t in (x, weight, bias))
        if given is not None and has_head:
            raise ValueError(f"{type(self).__name__}: ref_log_probs and a reference's head both came; pass one of them")
        if not has_head:
            return given
        if x is None or weight is None:
            raise ValueError(f"{type(self).__name__}: a reference needs both ref_x and ref_weight")
        with torch.no_grad():
            return self.log_probs(x, weight, labels, bias)

    def extra_repr(self) -> str:
        return listed(self.options | self.head)
