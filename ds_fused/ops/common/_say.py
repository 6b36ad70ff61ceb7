"""What is said: a line for each thing that runs otherwise than it was meant to."""

from __future__ import annotations

import functools
import logging

from torch import distributed as dist

log = logging.getLogger("ds_fused")


def say(line: str) -> None:
    """From the first rank."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_rank() == 0:
        log.warning(line)


say_once = functools.cache(say)
