"""Each of the options of options.py: stock, and fused by three blocks."""

from __future__ import annotations

from functools import partial
from typing import Any

from options import OPTIONS
from special import CASES, STREAM, engine_of, mine, model_of, train

BLOCKS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "default": {},
    "small": {"profile": "small"},
    "stream": STREAM | {"embedding": True, "leaf_modules": True},
}


def losses(option: dict[str, Any], block: dict[str, Any] | None) -> list[float]:
    zero = option["zero_optimization"]
    if zero["stage"] == 3:
        zero = {"stage3_param_persistence_threshold": 0} | zero
    engine = engine_of(model_of(), zero["stage"], block, **option | {"zero_optimization": zero})
    found = train(engine, mine())
    engine.destroy()
    return found


def with_option(option: dict[str, Any]) -> dict[str, list[float]]:
    return {name: losses(option, block) for name, block in BLOCKS.items()}


for name, option in OPTIONS.items():
    CASES[f"option_{name}"] = partial(with_option, option)
