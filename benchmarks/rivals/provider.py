"""What a provider is, and how builders of all families make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Call = Callable[[], "Tensor | tuple[Tensor, ...]"]
EPS = 1e-6


@dataclass(frozen=True)
class Provider:
    build: Callable[[Tensors], Call]
    # names of the tensors it writes into; they are restored before every call, outside the timed region
    overwrites: tuple[str, ...] = ()
    note: str = ""


def our_ops():
    import ds_fused.ops

    return ds_fused.ops


def liger_ops():
    import liger_kernel.transformers.functional

    return liger_kernel.transformers.functional


def compiled(build: Callable[[Tensors], tuple[Callable, tuple]]) -> Callable[[Tensors], Call]:
    """The call of an eager builder's (function, arguments) through torch.compile."""

    def compiled(t: Tensors) -> Call:
        function, arguments = build(t)
        function = torch.compile(function, fullgraph=True, dynamic=False)
        return lambda: function(*arguments)

    return compiled


def eager(build: Callable[[Tensors], tuple[Callable, tuple]]) -> Callable[[Tensors], Call]:
    def eager(t: Tensors) -> Call:
        function, arguments = build(t)
        return lambda: function(*arguments)

    return eager
