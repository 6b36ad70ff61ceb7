"""Deferred logits in the hands of an ``autograd.Function``, through which no gradient would come back.

PyTorch looks among the arguments of ``Function.apply`` for tensors, asks no ``__torch_function__``, and runs the
forward without gradients. What reads deferred logits there looks like a metric; only that the forward was given them
tells.
"""

from __future__ import annotations

import inspect
import sys
from types import CodeType, FrameType
from typing import TYPE_CHECKING

import torch
from torch.autograd.function import FunctionCtx

if TYPE_CHECKING:
    from ds_fused.modules.loss.deferred import DeferredLogits


def check_reader(logits: DeferredLogits) -> None:
    """Raise where a read without gradients, or a loss, is that of a Function which was given logits of the same call.

    A reentrant checkpoint is one, too.
    """
    # a graph of torch.compile has its own ways with Functions, and finds the tensors
    if not logits.call.with_graph or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    forwards = _forwards()
    frame = sys._getframe(1)
    while frame is not None:
        given = _arguments(frame) if frame.f_code in forwards else []
        if any(_is_of(x, logits) for x in given):
            # many forwards share the code of a decorator, as torch.amp.custom_fwd's
            function = next((x._forward_cls for x in given if isinstance(x, FunctionCtx)), forwards[frame.f_code])
            raise RuntimeError(
                f"ds_fused: {function.__qualname__}, an autograd.Function, was given logits that are not computed yet, "
                "and no gradient would come back through it. With "
                '"fused_linear_cross_entropy": false in the ds_fused block they are computed; a checkpoint takes them '
                "with use_reentrant=False; what needs no gradient can be given logits.detach()"
            )
        frame = frame.f_back


def _forwards() -> dict[CodeType, type[torch.autograd.Function]]:
    """What runs when a Function is applied, which from PyTorch 2.14 on has no frame of its own."""
    found, todo = {}, [torch.autograd.Function]
    while todo:
        for function in todo.pop().__subclasses__():
            todo.append(function)
            code = getattr(function.forward, "__code__", None)
            if code is not None:
                found[code] = function
    return found


def _arguments(frame: FrameType) -> list[object]:
    """What the function of a frame was called with, those behind a star one by one."""
    names, starred, _, values = inspect.getargvalues(frame)
    more = values.get(starred)
    # either may have been given up or another value since
    return [*map(values.get, names), *(more if isinstance(more, tuple) else ())]


def _is_of(x: object, logits: DeferredLogits) -> bool:
    return isinstance(x, type(logits)) and x.call is logits.call and x.with_graph
