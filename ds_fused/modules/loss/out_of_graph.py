"""The logits in the output of a model that is a part of what torch.compile makes one graph of.

A compiled graph returns tensors that have memory, and plain objects; ``LogitsOnDemand`` is neither. What leaves it is
of both kinds: a tensor that looks as the logits would, and beside it the ``DeferredLogits`` that were traced. Whoever
uses the tensor behind the graph uses the ``LogitsOnDemand`` of those. (Of a model that is compiled by itself, hooks on
the model run behind the graph, and its output has ``LogitsOnDemand`` as without torch.compile.)

- isinstance, shape, dtype and device are a tensor's, and ask for no values;
- what is computed has its place in the autograd graph, by way of the hidden states, which the compiled graph returns
  too. The tensor itself has none: its ``requires_grad`` is False;
- its own memory is a single NaN, which is what C++ finds that asks no Python (a collective). ``logits.detach()`` is
  what to hand there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ds_fused.modules.loss.deferred import DeferredLogits
from ds_fused.modules.loss.late_values import sample, say_if_changed
from ds_fused.modules.loss.on_demand import FACTS, leaving


class LogitsOutOfGraph(torch.Tensor):
    """See the file's text. Made by ``out_of_graph``: torch.compile traces no constructor with more than a tensor."""

    _deferred: DeferredLogits
    _sample: Tensor  # of the head's weight, as the graph saw it

    def logits(self) -> Tensor:
        """On demand, or real ones within the graph."""
        if torch.compiler.is_compiling():
            return self._deferred.materialise()
        if self._deferred.call.on_demand is None:
            say_if_changed(self._deferred.head.weight, self._sample)
        return leaving(self._deferred)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        # printing a model's output is no reason to compute it
        return f"LogitsOutOfGraph(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in FACTS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map_only(cls, cls.logits, (args, kwargs))
        return func(*args, **kwargs)


def out_of_graph(logits: DeferredLogits) -> LogitsOutOfGraph:
    """To be traced: the tensor that stands for deferred logits behind the graph."""
    nothing = torch.full((), math.nan, dtype=logits.dtype, device=logits.device)
    tensor = LogitsOutOfGraph(nothing.expand(logits.shape))
    tensor._deferred, tensor._sample = logits, sample(logits.head.weight)
    return tensor
