"""The model of a head's modes against what was measured of them: which is faster, and what a whole weight holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.head_rows import merged
from benchmarks.head_ways import Shape
from benchmarks.scale import ALLOWED
from benchmarks.scale_points import GATHER_KEPT_BEFORE, OUTDATED, START, START_AGREED, START_SLABS, start_of
from ds_fused.engine.zero3.figures import Figures, HeadCosts, Rates, of_gather, of_stationary, of_stream
from ds_fused.engine.zero3.shards import Shards

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MB = 2**20
ALL = 2**20 * MB
# as benchmarks/results/scale has them for H100: also what the host takes before a head begins, from idle
RATES = Rates(flops=711e12, memory=3.0e12, wire=608e9, call=38e-6)
STARTS = {START: 2.7e-3, START_SLABS: 1.6e-3, START_AGREED: 3.3e-3}
# the model is within that of each time, and can't tell apart what is nearer to each other
EQUAL = 1 + ALLOWED


def figures_of(way: str, shape: Shape, ranks: int, gather_kept: bool) -> Figures | None:
    whole = HeadCosts.cut(Shards(shape.vocab, shape.hidden, ranks), 128 * MB)
    if way in ("stream", "stream keep all"):
        return of_stream(whole, shape.tokens, 512 * MB, 0 if way == "stream" else ALL)
    if way == "stationary":
        return of_stationary(whole, shape.tokens, 512 * MB)
    if way in ("gather", "gather keep_mb=0"):
        in_forward = way == "gather" and not gather_kept
        return of_gather(whole, shape.tokens, 512 * MB, 2048 * MB if way == "gather" else 0, in_forward)
    return None


def measured() -> Iterator[tuple[str, dict[str, tuple[dict, Figures, float]]]]:
    """Of each file and shape in which a whole weight was measured: way -> its row, the model's figures, its start."""
    for path in sorted(RESULTS.glob("*/zero3_head*.json")):
        results, name = json.loads(path.read_text()), f"{path.parent.name}/{path.stem}"
        ranks, date = int(results["header"]["ranks"]), results["header"]["date"]
        shapes: dict[str, dict[str, tuple[dict, Figures, float]]] = {}
        for row in merged(results["rows"]):
            shape, way = row["shape"], row["way"]
            figures = figures_of(way, Shape.parse(shape), ranks, date < GATHER_KEPT_BEFORE)
            if row["status"] == "ok" and figures is not None and (name, shape, way) not in OUTDATED:
                shapes.setdefault(shape, {})[way] = row, figures, STARTS[start_of(way, date)]
        for shape, ways in shapes.items():
            if any(figures.mode == "gather" for _, figures, _ in ways.values()):
                yield f"{name} {shape}", ways


CASES = dict(measured())
EACH = pytest.mark.parametrize("case", CASES)


def test_there_are_some():
    assert len(CASES) >= 14


@EACH
def test_the_order_is_as_measured(case):
    for (one, ours, start), (other, theirs, later) in combinations(CASES[case].values(), 2):
        apart = one.get("idle_ms", one["ms"]) / other.get("idle_ms", other["ms"])
        modelled = (ours.seconds(RATES) + start) / (theirs.seconds(RATES) + later)
        if max(apart, 1 / apart) > EQUAL:
            assert (apart > 1) == (modelled > 1), (one["way"], other["way"], apart, modelled)


@EACH
def test_the_memory_of_a_whole_weight_is_as_measured(case):
    for row, figures, _ in CASES[case].values():
        if figures.mode == "gather" and "extra_mib" in row:
            assert figures.held / MB == pytest.approx(row["extra_mib"], rel=1e-3), row["way"]
