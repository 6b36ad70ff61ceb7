"""Deferred logits in the hands of an ``autograd.Function``, through which no gradient would come back.

PyTorch looks among the arguments of ``Function.apply`` for tensors, asks no ``__torch_function__``, and runs the
forward without gradients. What reads deferred logits there looks like a metric; only that ``apply`` was given them
tells.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ds_fused.modules.deferred import DeferredLogits

_APPLY = torch.autograd.Function.apply.__func__.__code__


def check_reader(logits: DeferredLogits) -> None:
    """Raise where a read without gradients, or a loss, is that of a Function which was given logits of the same call.

    A reentrant checkpoint is one, too.
    """
    # a graph of torch.compile has its own ways with Functions, and finds the tensors
    if not logits.call.with_graph or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY and _is_given(frame.f_locals["args"], logits):
            raise RuntimeError(
                f"ds_fused: {frame.f_locals['cls'].__qualname__}, an autograd.Function, was given logits that are not "
                "computed yet, and no gradient would come back through it. With "
                '"fused_linear_cross_entropy": false in the ds_fused block they are computed; a checkpoint takes them '
                "with use_reentrant=False; what needs no gradient can be given logits.detach()"
            )
        frame = frame.f_back


def _is_given(arguments: tuple, logits: DeferredLogits) -> bool:
    return any(isinstance(x, type(logits)) and x.call is logits.call and x.with_graph for x in arguments)
