"""What is said once: a line for each thing that runs otherwise than it was meant to."""

from __future__ import annotations

import functools
import logging

import torch

log = logging.getLogger("ds_fused")


@functools.cache
def say_once(line: str) -> None:
    """From the first rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        log.warning(line)
