"""What the numbers of the groups data and train may be, as keys of `conf/` and as options of train.py."""

from __future__ import annotations

# the least that makes sense
LEAST = {
    "data.block": 2,  # the first token of a block has no loss
    "data.eval_blocks": 1,
    "train.steps": 1,
    "train.seed": 0,
    "train.log_every": 1,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.timeout_s": 1,
}
# and the most
MOST = {
    "train.seed": 2**32 - 1,  # NumPy's
    "train.timeout_s": 10**6,  # twice as many milliseconds still are an int of 32 bits
}


def check(name: str, value: float, least: float | None, most: float | None) -> None:
    """A ValueError where it is beyond either; None is no limit."""
    if least is not None and value < least:
        raise ValueError(f"{name} is {value}, but must be at least {least}")
    if most is not None and value > most:
        raise ValueError(f"{name} is {value}, but must be at most {most}")


def check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}, but must be a share between 0 and 1")
