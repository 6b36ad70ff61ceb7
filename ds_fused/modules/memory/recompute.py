"""A layer under gradient checkpointing, of whose forward a part is kept (``kept.py`` says how), or whose input waits
in the host's memory (``offload.py``).

The class that the layer gets has one thing more, its checkpointing function, which is transformers' or whatever else
stands there with the contexts that keep. Whether a layer is checkpointed at all, and when that is switched on, stays
with the model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ds_fused.modules.memory.allotment import Allotment
from ds_fused.modules.memory.kept import Learnt
from ds_fused.modules.memory.offload import Offload
from ds_fused.ops.common._say import say_once

FUNCTION = "_gradient_checkpointing_func"
_BASE = "GradientCheckpointingLayer"


def may_be_checkpointed(cls: type) -> bool:
    """Whether it is a layer that transformers checkpoints where that is switched on: by the name of a base class."""
    return any(base.__name__ == _BASE for base in cls.__mro__)


class Recompute:
    """The original layer."""

    fused_place: int  # among the layers of its stack
    fused_learnt: Learnt
    fused_allotment: Allotment | None  # None: all is computed again, as without this
    fused_offload: Offload | None  # None: the input stays on the device, and so it does where the allotment says so

    # what the layer has under FUNCTION, by a name of its own: for a trace by torch 2.11 self.__dict__[FUNCTION] is the
    # property again
    fused_function: Callable | None

    @property
    def _gradient_checkpointing_func(self) -> Callable:
        if self.fused_function is None:
            raise AttributeError(FUNCTION)
        return functools.partial(_checkpointed, self, self.fused_function)

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable) -> None:
        self.__dict__[FUNCTION] = self.__dict__["fused_function"] = function


def _checkpointed(layer: Recompute, stock: Callable, function: Callable, *args: Any) -> Any:
    if torch.compiler.is_compiling():
        return stock(function, *args)
    x = next((x for x in (*args, *function.keywords.values()) if isinstance(x, Tensor)), None)
    if x is None or not takes_contexts(stock):
        say_once(
            f"ds_fused: recompute: {type(layer).__name__} is checkpointed by other means than torch.utils.checkpoint "
            "with use_reentrant=False, and nothing of it is kept"
        )
        return stock(function, *args)
    if not torch.is_grad_enabled():
        return stock(function, *args)
    allotment, contexts = layer.fused_allotment, {}
    recording = None if allotment is None else allotment.recording(layer.fused_place, layer.fused_learnt, x)
    sends = layer.fused_offload is not None and (allotment is None or allotment.on_host)
    host = layer.fused_offload.begin() if sends else None
    if recording is not None:
        recording.host = host
        contexts["context_fn"] = recording.contexts
    if host is None:
        return stock(function, *args, **contexts)
    if not any(arg is x for arg in args):
        function, args = _by_place(function, x), (x, *args)
    with host.saving(x):
        return stock(function, *args, **contexts)


def _by_place(function: functools.partial, x: Tensor) -> Callable:
    """The function, given x first: what is given by name the checkpoint does not save, but holds."""
    inner, before, named = function.func, function.args, dict(function.keywords)
    name = next(name for name, value in named.items() if value is x)
    del named[name]

    def call(x: Tensor, *args: Any) -> Any:
        return inner(*before, *args, **named, **{name: x})

    return call


def takes_contexts(function: object) -> bool:
    """Whether a checkpointing function is PyTorch's without reentrant autograd, and has no contexts of its own."""
    return (
        isinstance(function, functools.partial)
        and function.func is checkpoint
        and not function.args
        and function.keywords.get("use_reentrant") is False
        and "context_fn" not in function.keywords
        and not function.keywords.get("debug")
    )
