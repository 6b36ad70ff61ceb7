"""What is said: a line for each thing that runs otherwise than it was meant to."""

from __future__ import annotations

import functools
import logging

import torch

log = logging.getLogger("ds_fused")


def say(line: str) -> None:
    """From the first rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        log.warning(line)


say_once = functools.cache(say)
