"""All ranks decide alike, or all raise: a decision that differs on one rank would be a hang later.

Two all-gathers of small objects per engine: what the decisions may depend on, and the decisions (or the error that kept
a rank from deciding) with the versions of everything they depend on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata

from torch import distributed as dist

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "ds-fused")
# what a mapping has of this name is no decision, but what is said of one that differs
WHY = "why"


class Agreement:
    """Given this rank's decisions, raises on every rank where they differ.

    Each rank calls `least` once, then the object once; or `failed` in place of either.
    """

    def __init__(self, part: object = 0) -> None:
        """``part``: ranks with another one hold another piece of the model and may decide otherwise."""
        self._part = part
        self._met = False

    def least(self, number: float) -> float:
        """The smallest number of all ranks."""
        everyone = self._exchange({"number": number})
        problem = failure(everyone)
        if problem is not None:
            raise RuntimeError(f"ds_fused: nothing was replaced: {problem}")
        self._met = False
        return min(one["number"] for one in everyone)

    def __call__(self, decisions: Mapping[str, object]) -> None:
        decided = json.loads(json.dumps(decisions, default=str))
        mine = {"part": self._part, "versions": versions(), "decisions": decided}
        problem = disagreement(self._exchange(mine))
        if problem is not None:
            raise RuntimeError(f"ds_fused: the ranks decided differently, so nothing was replaced: {problem}")

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks, who wait for our decisions, that there are none. Does nothing after the exchange."""
        if not self._met:
            self._exchange({"error": f"{type(error).__name__}: {error}"})

    def _exchange(self, mine: Mapping[str, object]) -> list[Mapping[str, object]]:
        self._met = True
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return [mine]
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        return everyone


def first_that_holds(reasons: Mapping[str, bool]) -> str | None:
    return next((reason for reason, holds in reasons.items() if holds), None)


def first_of(reason: str | None, group: object) -> str | None:
    """What the first rank of a group that has a reason says, the same on all of them; None where nobody has one."""
    everyone: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, reason, group=group)
    said = {rank: one for rank, one in enumerate(everyone) if one is not None}
    if not said:
        return None
    rank, one = next(iter(said.items()))
    return one if len(said) == len(everyone) else f"{one} (on rank {rank} of {len(everyone)})"


def versions() -> dict[str, str]:
    """Package -> installed version."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            # e.g. found on sys.path only, or triton under another name (pytorch-triton-rocm)
            found[package] = "not installed as a package"
    return found


def disagreement(everyone: list[Mapping[str, object]]) -> str | None:
    """The first difference between ranks of one part, naming rank and item; None when there is none."""
    problem = failure(everyone)
    if problem is not None:
        return problem
    first: dict[object, int] = {}
    for rank, one in enumerate(everyone):
        other = first.setdefault(one["part"], rank)
        for item, here, there in _differences(everyone[other], one):
            return f"rank {rank} has {item} = {there}, rank {other} has {here}"
    return None


def failure(everyone: list[Mapping[str, object]]) -> str | None:
    """Of the first rank that has failed; None when none has."""
    return next((f"rank {rank} failed: {one['error']}" for rank, one in enumerate(everyone) if "error" in one), None)


def _differences(a: object, b: object, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, value in a, value in b) of every leaf in which two JSON values differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b} - {WHY}):
            within = _differences(a.get(key, "nothing"), b.get(key, "nothing"), f"{path}.{key}" if path else key)
            for item, here, there in within:
                yield item, _with_reason(here, a), _with_reason(there, b)
    elif isinstance(a, list) and isinstance(b, list):
        for i in range(max(len(a), len(b))):
            ai, bi = (side[i] if i < len(side) else "nothing" for side in (a, b))
            yield from _differences(ai, bi, f"{path}[{i}]")
    elif a != b:
        yield path, repr(a), repr(b)


def _with_reason(value: str, owner: Mapping) -> str:
    return f"{value} ({owner[WHY]})" if owner.get(WHY) else value
