"""The model of a head's modes against what was measured of them: which is faster, and what a whole weight holds."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from benchmarks.head_rows import merged
from benchmarks.head_ways import Shape
from benchmarks.scale import ALLOWED
from benchmarks.scale_points import GATHER_KEPT_BEFORE, OUTDATED
from ds_fused.engine.figures import Figures, Head, Rates, of_gather, of_stationary, of_stream
from ds_fused.engine.shards import Shards

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
MB = 2**20
ALL = 2**20 * MB
# as benchmarks/results/scale has them for H100
RATES = Rates(flops=711e12, memory=2.9e12, wire=731e9, call=46e-6)
# the model is within that of each time, but for those that benchmarks/results/scale names, and can't tell apart what is
# nearer to each other
EQUAL = 1 + ALLOWED


def figures_of(way: str, shape: Shape, ranks: int, gather_kept: bool) -> Figures | None:
    whole = Head.cut(Shards(shape.vocab, shape.hidden, ranks), 128 * MB)
    if way in ("stream", "stream keep all"):
        return of_stream(whole, shape.tokens, 512 * MB, 0 if way == "stream" else ALL)
    if way == "stationary":
        return of_stationary(whole, shape.tokens, 512 * MB)
    if way in ("gather", "gather keep_mb=0"):
        in_forward = way == "gather" and not gather_kept
        return of_gather(whole, shape.tokens, 512 * MB, 2048 * MB if way == "gather" else 0, in_forward)
    return None


def measured() -> Iterator[tuple[str, dict[str, tuple[dict, Figures]]]]:
    """Of each file and shape in which a whole weight was measured: way -> its row and the model's figures."""
    for path in sorted(RESULTS.glob("*/zero3_head*.json")):
        results, name = json.loads(path.read_text()), f"{path.parent.name}/{path.stem}"
        ranks, kept = int(results["header"]["ranks"]), results["header"]["date"] < GATHER_KEPT_BEFORE
        shapes: dict[str, dict[str, tuple[dict, Figures]]] = {}
        for row in merged(results["rows"]):
            shape, way = row["shape"], row["way"]
            figures = figures_of(way, Shape.parse(shape), ranks, kept)
            if row["status"] == "ok" and figures is not None and (name, shape, way) not in OUTDATED:
                shapes.setdefault(shape, {})[way] = row, figures
        for shape, ways in shapes.items():
            if any(figures.mode == "gather" for _, figures in ways.values()):
                yield f"{name} {shape}", ways


def beyond() -> set[tuple[str, str]]:
    """Case and way of the heads' times that the model misses by more than that."""
    with (RESULTS / "scale" / "scale.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == "check" and row["unit"] == "ms"]
    heads = [row for row in rows if "/zero3_head" in row["file"]]
    missed = [row for row in heads if abs(float(row["model"]) / float(row["measured"]) - 1) > ALLOWED]
    return {(f"{row['file']} {row['case']}", row["way"]) for row in missed}


CASES = dict(measured())
MISSED = beyond()
EACH = pytest.mark.parametrize("case", CASES)


def test_there_are_some():
    assert len(CASES) >= 14 and len(MISSED) <= 3


@EACH
def test_the_order_is_as_measured(case):
    for (one, ours), (other, theirs) in combinations(CASES[case].values(), 2):
        apart = one.get("idle_ms", one["ms"]) / other.get("idle_ms", other["ms"])
        modelled = ours.seconds(RATES) / theirs.seconds(RATES)
        is_missed = {(case, one["way"]), (case, other["way"])} & MISSED
        if max(apart, 1 / apart) > EQUAL and not is_missed:
            assert (apart > 1) == (modelled > 1), (one["way"], other["way"], apart, modelled)


@EACH
def test_the_memory_of_a_whole_weight_is_as_measured(case):
    for row, figures in CASES[case].values():
        if figures.mode == "gather" and "extra_mib" in row:
            assert figures.held / MB == pytest.approx(row["extra_mib"], rel=1e-3), row["way"]
