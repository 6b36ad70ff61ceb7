"""A call of the head that is postponed: what ``deferred.py`` records steps on, and ``on_demand.py`` computes later."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ds_fused.ops._triton import autocast_dtype


def version(x: Tensor) -> float:
    """How often the memory of x has been written to."""
    # a graph counts none, so that each may have been written to: what is computed twice for it, its compiler finds
    if torch.compiler.is_compiling():
        return math.nan
    # tensors made in inference mode count no versions, and nothing can be differentiated through them
    return 0 if x.is_inference() else x._version


class HeadCall:
    """One postponed call of the head, shared by every ``DeferredLogits`` that derives from it."""

    __slots__ = ("_base", "_base_version", "autocast", "dtype", "fused", "head", "hidden", "on_demand")

    def __init__(self, head: nn.Module, hidden: Tensor) -> None:
        self.head = head
        self.hidden = hidden  # [..., H]
        self.autocast = autocast_dtype(hidden)
        # autocast leaves fp64 alone
        self.dtype = hidden.dtype if self.autocast is None or hidden.dtype == torch.float64 else self.autocast
        # whether a loss was computed, and what the head returned beside it, for whoever reads the logits later; None
        # where that was in a compiled graph
        self.fused = False
        self.on_demand: Tensor | None = None
        self._base: Tensor | None = None
        self._base_version = 0.0

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.hidden.shape[:-1], self.head.out_features))

    def base(self) -> Tensor:
        """What the head returns, [..., V]: its real call, with every hook it has (ZeRO-3 gathers the weight there)."""
        # written to since (an in-place step on it): what derives from it needs the head's output once more
        if self._base is None or version(self._base) != self._base_version:
            self._base = nn.Module.__call__(self.head, self.hidden)
            self._base_version = version(self._base)
        return self._base
