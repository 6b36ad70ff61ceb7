"""All ranks decide alike, or all raise: a decision that differs on one rank would be a hang later.

One all-gather of small objects per engine: the decisions (or the error that kept a rank from deciding) and the versions
of everything they depend on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import metadata

from torch import distributed as dist

PACKAGES = ("torch", "triton", "transformers", "deepspeed", "ds-fused")


class Agreement:
    """Given this rank's decisions, raises on every rank where they differ. Each rank calls it or `failed` once."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self._met = False

    def __call__(self, decisions: Mapping[str, object]) -> None:
        mine = {"versions": versions(), "decisions": json.loads(json.dumps(decisions, default=str))}
        problem = disagreement(self._exchange(mine))
        if problem is not None:
            raise RuntimeError(f"ds_fused: the ranks decided differently, so nothing was replaced: {problem}")

    def failed(self, error: BaseException) -> None:
        """Tell the other ranks, who wait for our decisions, that there are none. Does nothing after the exchange."""
        if not self._met:
            self._exchange({"error": f"{type(error).__name__}: {error}"})

    def _exchange(self, mine: Mapping[str, object]) -> list[Mapping[str, object]]:
        self._met = True
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(self._group) == 1:
            return [mine]
        everyone: list = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone


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
    """The first difference from rank 0, naming rank and item; None when all are equal."""
    for rank, one in enumerate(everyone):
        if "error" in one:
            return f"rank {rank} failed: {one['error']}"
    for rank, one in enumerate(everyone[1:], start=1):
        for item, here, there in _differences(everyone[0], one):
            return f"rank {rank} has {item} = {there}, rank 0 has {here}"
    return None


def _differences(a: object, b: object, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, value in a, value in b) of every leaf in which two JSON values differ."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}):
            yield from _differences(a.get(key, "nothing"), b.get(key, "nothing"), f"{path}.{key}" if path else key)
    elif isinstance(a, list) and isinstance(b, list):
        for i in range(max(len(a), len(b))):
            ai, bi = (side[i] if i < len(side) else "nothing" for side in (a, b))
            yield from _differences(ai, bi, f"{path}[{i}]")
    elif a != b:
        yield path, repr(a), repr(b)
