"""zero3_head.py: all ways to a head's loss agree, and one that is wrong or fails costs its own row. On a CPU."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import free_port, start

# benchmarks/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import plot_head, zero3_head
from benchmarks.head_rows import merged
from benchmarks.head_ways import DEFAULT, SWEEP, WAYS
from benchmarks.zero3_head import Job, Results

HERE = Path(__file__).parent
# vocabulary rows that are split between the ranks, tokens that don't fill a tile
SHAPE = "25x16x67"


def measured(out: Path, ways: Sequence[str]) -> dict[str, dict]:
    """Rows by way, of two ranks."""
    command = [sys.executable, HERE / "broken_ways.py", "--gpus", "2", "--out", str(out)]
    command += ["--shapes", SHAPE, "--ways", ",".join(ways), "--master_port", str(free_port())]
    done = start(command)
    assert done.status == 0, done.output
    found = json.loads((out / "zero3_head.json").read_text())
    assert "CPU" in found["header"]["device"] and "zero3_head.py" in found["header"]["command"]
    assert [row["way"] for row in found["rows"]] == list(ways)
    return {row["way"]: row for row in found["rows"]}


def test_all_ways_agree(request, tmp_path):
    # options of a way with --all
    ways = [way for way in (*DEFAULT, "half") if "=" not in way or request.config.getoption("--all")]
    rows = measured(tmp_path, ways)
    wrong = rows.pop("half")
    assert wrong["status"].startswith("wrong: loss is off by 5.0e-01, dx is off by 5.0e-01, dw is off by 5.0e-01")
    assert "ms" not in wrong
    for way, row in rows.items():
        if WAYS[way].needs_gpu:
            assert row["status"] == "not run: needs a GPU"
            continue
        assert row["status"] == "ok" and row["ms"] > 0, (way, row)
        assert "extra_mib" not in row  # nobody knows a CPU's
        if way != zero3_head.BARE:
            # bf16 logits and gradients; the loss is a mean over few tokens
            assert row["errors"]["loss"] < 1e-3 and row["errors"]["dx"] < 5e-3, way
            assert ("dw" in row["errors"]) != way.endswith(" frozen"), way
            assert row["errors"].get("dw", 0) < 8e-3, way
            assert row["errors"]["loss"] == pytest.approx(rows["stock"]["errors"]["loss"], abs=1e-4), way
    text = (tmp_path / "zero3_head.md").read_text()
    assert all(f"| {way} |" in text for way in ways)
    assert "no way has both" in plot_head.draw(tmp_path)


@pytest.mark.all
def test_a_way_that_fails_costs_its_own_row(tmp_path):
    rows = measured(tmp_path, ("pair", "lone", "stock"))
    assert rows["pair"]["status"] == "failed: MemoryError: on all ranks"
    assert rows["lone"]["status"] == "failed: MemoryError: on one rank"
    assert rows["stock"]["status"] == "ok"


def test_another_launch_takes_up_the_rest(tmp_path):
    """Each launch by what it has to say: rows of the ways that ended, then how the ranks ended."""
    launches = []

    def launch(left):
        launches.append([way for _, way in left])
        ended, job = [
            (1, Job("a CPU", rows=1)),  # by itself, after a way that failed
            (0, Job("a CPU", failure="failed: KeyError: on one rank", status=1)),
            (1, Job("a CPU", rows=1, status=1, tail="torch.OutOfMemoryError: too much\nend\n")),
            (0, Job("a CPU", status=1, tail="killed")),
        ][len(launches) - 1]
        for shape, way in left[:ended]:
            results.add({"shape": shape, "way": way, "status": "ok", "ms": 1.0, "extra_mib": 2.0})
        return job

    results = Results(tmp_path / "zero3_head", zero3_head.ways_table)
    zero3_head.measure([(SHAPE, way) for way in DEFAULT[:5]], launch, results)
    assert launches == [list(DEFAULT[start:5]) for start in (0, 1, 2, 4)]
    assert [row["status"] for row in results.rows] == [
        "ok",
        "failed: KeyError: on one rank",
        "ok",
        "failed: the ranks died: torch.OutOfMemoryError: too much",
        "failed: the ranks died: exit 1",
    ]
    # without a rank that began, every further launch would end so too
    with pytest.raises(SystemExit, match="did not start.*\nno such module"):
        zero3_head.measure([(SHAPE, "stock")], lambda left: Job(status=1, tail="no such module"), results)


def test_tables_of_numbers():
    head = {"device": "a GPU", "ranks": "2"}
    rows = [
        {"shape": "4096x2048x32768", "way": "stream", "status": "ok", "ms": 3.0, "idle_ms": 3.5, "extra_mib": 400.0},
        {"shape": "4096x2048x32768", "way": zero3_head.BARE, "status": "ok", "ms": 2.0},
        {"shape": "4096x2048x65536", "way": "stream", "status": "failed: a | b"},
    ]
    ways = zero3_head.ways_table(head, rows)
    assert "| stream | 3.0 | 3.0 to 3.0 | 1.500 | 3.5 | 400 |" in ways and "**failed: a / b**" in ways
    sweep = zero3_head.sweep_table(head, rows)
    assert "| 4096x2048x32768 | 128 | 64 | 400 (3.0) | - (2.0) |" in sweep
    assert "| 4096x2048x65536 | 256 | 128 | **failed: a / b** | - |" in sweep


def test_rounds_are_one_row():
    def row(ms: list[float], mib: float, dx: float) -> dict:
        same = {"shape": "4096x2048x32768", "way": "stream", "status": "ok", "ms": sorted(ms)[1]}
        return {**same, "iterations_ms": ms, "extra_mib": mib, "errors": {"loss": 0.0, "dx": dx}}

    failed = {"shape": "4096x2048x32768", "way": "stream", "status": "failed: late"}
    (one,) = merged([row([3.0, 2.0, 2.5], 400.0, 1e-3), failed, row([4.0, 3.0, 9.0], 401.0, 5e-4)])
    assert (one["ms"], one["least_ms"], one["most_ms"], one["rounds"]) == (3.25, 2.0, 9.0, 2)
    assert one["extra_mib"] == 401.0 and one["errors"] == {"loss": 0.0, "dx": 1e-3}
    text = zero3_head.ways_table({"ranks": "2"}, [row([3.0, 2.0, 2.5], 400.0, 1e-3), failed])
    assert "| 2.5 | 2.0 to 3.0 |" in text and "in another round **failed: late**" in text
    assert merged([failed]) == [failed]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ways", "stock,steam"], "there is no way 'steam'; there are stock, gather"),
        (["--shapes", "8192x4096"], "a shape is TOKENSxHIDDENxVOCABULARY, such as 8192x4096x128256, got '8192x4096'"),
        (["--shapes", "8192x4096x128256,8192x0x3"], "got '8192x0x3'"),
        (["--gpus", "0"], "'0' is not a positive number"),
        (["--rounds", "0"], "'0' is not a positive number"),
    ],
)
def test_what_is_mistyped_is_said_before_anything_starts(arguments, said, capsys):
    with pytest.raises(SystemExit):
        zero3_head.main(arguments)
    assert said in capsys.readouterr().err


def test_ways_that_are_not_yet_there_are_named_among_those_that_will_be():
    assert set(DEFAULT) == set(WAYS) and set(SWEEP) <= set(DEFAULT)


def test_a_file_that_was_cut_off_is_named(tmp_path):
    (tmp_path / "zero3_head.json").write_text("{")
    assert zero3_head.draw(tmp_path).startswith(f"{tmp_path}/zero3_head.json is no JSON: ")
