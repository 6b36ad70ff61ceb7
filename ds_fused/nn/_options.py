"""Options of an op that a module keeps for its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable


def known(op: Callable[..., object], options: dict[str, object]) -> dict[str, object]:
    """The options, all of them the op's; else a TypeError now and not in the first forward."""
    inspect.signature(op).bind_partial(**options)
    return options


def listed(options: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
