"""ZeRO-3's linear layer: PyTorch makes out its signature again in each call, some 5 % of what a step costs the host."""

from __future__ import annotations

import inspect


def remember_signature() -> None:
    """Have ``inspect.signature`` find it on the function. It says the same as before, and stays."""
    from deepspeed.runtime.zero.linear import LinearFunctionForZeroStage3

    forward = LinearFunctionForZeroStage3.forward
    forward.__signature__ = inspect.signature(forward)
