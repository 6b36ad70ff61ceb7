"""What the launchers and public functions of the norms share."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# where an RMS norm rounds its normalised rows to x's dtype: see rms_norm.py
CASTS = ("before_weight", "after_weight")


class RMSForm(NamedTuple):
    """How an RMS norm normalises rows: see rms_norm.py."""

    eps: float
    offset: float
    cast_before: bool


class Wanted(NamedTuple):
    """Which gradients backward has to make."""

    dx: bool
    dweight: bool
    dbias: bool


class NotPerColumnError(ValueError):
    """A weight or a bias that is not one value per column of x."""


def check_per_column(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """Each vector holds one value per column of x, or is None."""
    if x.ndim == 0:
        raise ValueError(f"{op}: x is a number; it must have a last dimension, its columns")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            shapes = f"{tuple(vector.shape)} must be one value per column of x {tuple(x.shape)}"
            raise NotPerColumnError(f"{op}: {name} {shapes}")


def contiguous(vector: Tensor | None) -> Tensor | None:
    """Of one value per column, which kernels read side by side."""
    return None if vector is None else vector.contiguous()


def check_cast(op: str, cast: str) -> None:
    if cast not in CASTS:
        raise ValueError(f"{op}: cast is {cast!r}; known are {', '.join(CASTS)}")
