"""Options that are numbers, which kernels take as they come: whatever else comes is an error that names it."""

from __future__ import annotations

import torch
from torch import Tensor

# Python's, and those of a graph that is made; of NumPy's, float64 is one of Python's
WHOLE = (int, torch.SymInt)
NUMBERS = (float, *WHOLE, torch.SymFloat)


def check_numbers(op: str, **options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, NUMBERS):
            raise ValueError(f"{op}: {name} is {_said(value)}; it must be a number (float or int)")


def check_numbers_or_none(op: str, **options: object) -> None:
    """Of options that None leaves out."""
    for name, value in options.items():
        if value is not None and not isinstance(value, NUMBERS):
            raise ValueError(f"{op}: {name} is {_said(value)}; it must be a number (float or int) or None")


def check_whole(op: str, **options: object) -> None:
    for name, value in options.items():
        if not isinstance(value, WHOLE):
            raise ValueError(f"{op}: {name} is {_said(value)}; it must be a whole number (int)")


def _said(value: object) -> str:
    # to read a tensor makes the host wait, and it would get no gradient
    return "a tensor" if isinstance(value, Tensor) else f"{value!r} ({type(value).__name__})"
