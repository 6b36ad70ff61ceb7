"""Options of an op that a module keeps for its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch


def known(
    module: torch.nn.Module, op: Callable[..., object], options: dict[str, object], passed: tuple[str, ...] = ()
) -> dict[str, object]:
    """The options, all of them the op's; else a TypeError now and not in the first forward.

    None are the op's tensors, and ``passed``: what the module's forward passes itself.
    """
    arguments = inspect.signature(op).parameters
    takes = [name for name, a in arguments.items() if a.default is not a.empty and name not in passed]
    for name in options:
        if name not in takes:
            raise TypeError(
                f"{type(module).__name__}: {name} is no option of it; of {op.__name__} it takes {', '.join(takes)}"
            )
    return options


def nothing(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of no row: what an op is called with by a module that begins, for the error of an option to come now."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def listed(options: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
