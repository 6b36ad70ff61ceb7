"""A call of the head that is postponed: what ``deferred.py`` records steps on, and ``on_demand.py`` computes later."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ds_fused.ops.common._triton import autocast_dtype


def version(x: Tensor) -> float:
    """How often the memory of x has been written to."""
    # a graph counts none, so that each may have been written to: what is computed twice for it, its compiler finds
    if torch.compiler.is_compiling():
        return math.nan
    # tensors made in inference mode count no versions, and nothing can be differentiated through them
    return 0 if x.is_inference() else x._version


def unwritten(hidden: Tensor, seen: float) -> Tensor:
    """The hidden states of which the head was called, if they are the same still. ``seen``: their version then."""
    if version(hidden) > seen:
        raise RuntimeError(
            "ds_fused: hidden states that the head was called with, or others in their memory, were written to in "
            "place before its logits or its loss was computed, which would be those of other values; with "
            '"fused_linear_cross_entropy": false in the ds_fused block they are computed at once'
        )
    return hidden


def _in_inference() -> bool:
    # torch.compile traces no such question
    return not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()


_nothing = contextlib.nullcontext()


class HeadCall:
    """One postponed call of the head, shared by every ``DeferredLogits`` that derives from it.

    It remembers what was on when the head was called, since whatever is computed for it is computed elsewhere: a metric
    that reads the logits does so under no_grad, and some losses leave autocast.
    """

    __slots__ = (
        *("_base", "_base_version", "autocast", "dtype", "fused", "head", "hidden", "in_inference", "on_demand"),
        *("version", "with_graph"),
    )

    def __init__(self, head: nn.Module, hidden: Tensor) -> None:
        self.head = head
        self.hidden = hidden  # [..., H]
        self.version = version(hidden)
        self.with_graph = torch.is_grad_enabled()
        self.in_inference = _in_inference()
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
        return torch.Size((*self.hidden.shape[:-1], self._n_vocab()))

    def _n_vocab(self) -> int:
        """The weight's rows, of which out_features may be an earlier number; not of one that is computed when read."""
        weight = self.head._parameters.get("weight")
        shape = () if weight is None else getattr(weight, "ds_shape", weight.shape)
        return shape[0] if len(shape) == 2 else self.head.out_features

    def as_called(self, with_graph: bool) -> contextlib.AbstractContextManager:
        """Everything as it was when the head was called, but a graph only where it is wanted."""
        with_graph = with_graph and self.with_graph
        is_inference, autocast = _in_inference(), autocast_dtype(self.hidden)
        if (torch.is_grad_enabled(), is_inference, autocast) == (with_graph, self.in_inference, self.autocast):
            return _nothing
        return self._entered(with_graph, is_inference != self.in_inference, autocast != self.autocast)

    @contextlib.contextmanager
    def _entered(self, with_graph: bool, sets_inference: bool, sets_autocast: bool) -> Iterator[None]:
        kind, dtype = self.hidden.device.type, self.autocast
        inference = torch.inference_mode(self.in_inference) if sets_inference else _nothing
        precision = torch.autocast(kind, dtype=dtype, enabled=dtype is not None) if sets_autocast else _nothing
        # to leave inference mode sets gradients, too
        with inference, precision, torch.set_grad_enabled(with_graph):
            yield

    def base(self) -> Tensor:
        """What the head returns, [..., V]: its real call, with every hook it has (ZeRO-3 gathers the weight there)."""
        # written to since (an in-place step on it): what derives from it needs the head's output once more
        if self._base is None or version(self._base) != self._base_version:
            with self.as_called(with_graph=True):
                self._base = self._computed()
            self._base_version = version(self._base)
        return self._base

    def _computed(self) -> Tensor:
        # somebody has kept them: a call of the head has no place in ZeRO-3's order any more, and its weight may be new
        if self.on_demand is not None and self.head._ds_fused_scope.is_over():
            return self.on_demand.values()
        return nn.Module.__call__(self.head, unwritten(self.hidden, self.version))
