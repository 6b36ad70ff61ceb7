"""What is said when logits are read after a forward whose loss was fused."""

from __future__ import annotations

import functools
import logging
import sys

import torch
from torch import Tensor

log = logging.getLogger("ds_fused")

# spread over the weight, these tell whether it is the one that the loss saw: a step of an optimizer changes nearly all
SAMPLED_ELEMENTS = 256


def sample(weight: Tensor) -> Tensor:
    """A copy of a few elements, without waiting for the device."""
    flat = weight.detach().reshape(-1)
    # odd: no power of two between samples, or they would all lie in one column
    return flat[:: (flat.numel() // SAMPLED_ELEMENTS) | 1].clone()


def say_if_changed(weight: Tensor, sampled: Tensor) -> None:
    """Warn where ``weight`` is no longer the one that ``sampled`` was taken of."""
    if not torch.equal(sample(weight).to(sampled), sampled):
        log.warning(
            "ds_fused: these logits are read after the head's weight changed, so they are those of the new "
            'weight; read them before the optimizer steps, or set "logits": "keep" in the ds_fused block'
        )


def say_who_reads() -> None:
    """One line for each place that reads, from the first rank."""
    _say_once(_caller())


def _caller() -> str:
    """file:line of whoever reads, the first frame that is neither ours nor torch's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("ds_fused", "torch"):
        frame = frame.f_back
    return "C++" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


@functools.cache
def _say_once(caller: str) -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    log.warning(
        "ds_fused: %s reads the logits of a forward whose loss was fused; they are computed now. "
        'Where that is too late (sharded weights), set "logits": "keep" in the ds_fused block',
        caller,
    )
