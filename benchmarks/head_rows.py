"""Rows of zero3_head.py: those of one shape and way, of several rounds, as one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

from benchmarks.page import Row
from benchmarks.results import OK


def merged(rows: Iterable[Row]) -> list[Row]:
    """In the order of their first ones: the median of the rounds' times, and the largest memory and errors.

    A round that failed takes no part where another has ended, and stands as "other_round".
    """
    rounds: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        rounds.setdefault((row["shape"], row["way"]), []).append(row)
    return [_one(some) for some in rounds.values()]


def _one(some: list[Row]) -> Row:
    done = [row for row in some if row["status"] == OK]
    if not done:
        return some[0]
    one = {**done[0], "ms": statistics.median(row["ms"] for row in done), "rounds": len(done)}
    idle = [row["idle_ms"] for row in done if "idle_ms" in row]
    if idle:
        one["idle_ms"] = statistics.median(idle)
    iterations = [ms for row in done for ms in row.get("iterations_ms", [row["ms"]])]
    one["least_ms"], one["most_ms"] = min(iterations), max(iterations)
    if done[0].get("extra_mib") is not None:
        one["extra_mib"] = max(row["extra_mib"] for row in done)
    if done[0].get("errors"):
        one["errors"] = {what: max(row["errors"][what] for row in done) for what in done[0]["errors"]}
    bad = [row["status"] for row in some if row["status"] != OK]
    return {**one, "other_round": bad[0]} if bad else one
