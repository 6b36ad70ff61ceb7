"""The benchmark judges before it times, survives what can't run, and goes on where it ended. On a CPU, tiny shapes."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

# benchmarks/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import cases, plot, run
from benchmarks.measure import Instruments, relative_error, worst_error
from benchmarks.red_tests import PARTS, red_tests
from benchmarks.results import OK, Row, compare, markdown, read_csv, summary, write_csv
from benchmarks.rivals.provider import Provider
from ds_fused.ops.registry import OPS

ROOT = Path(__file__).parents[2]
GLU = next(case for case in cases.CASES if case.name == "glu silu")


def half(t):
    """A GLU that is wrong by a factor of two."""
    return lambda: 0.5 * torch.nn.functional.silu(t["gate"]) * t["up"]


def broken(t):
    raise RuntimeError("no such\nlibrary")


def destructive(t):
    """Its output is right, but it ruins an input that backward needs."""

    def call():
        y = torch.nn.functional.silu(t["gate"]) * t["up"]
        assert t["gate"].isfinite().all()
        t["gate"].data.fill_(torch.nan)
        return y

    return call


@pytest.fixture
def tiny_run(tmp_path, monkeypatch):
    """Runs the benchmark in this process on given cases and returns the rows by provider."""

    def tiny_run(case, *more: str) -> dict[str, Row]:
        monkeypatch.setattr(run, "CASES", (case,))
        assert run.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), *more]) == 0
        rows = read_csv(tmp_path / "ops.csv")[1]
        return {row.provider: row for row in rows if not row.launch_bound}

    return tiny_run


def test_every_op_has_a_case():
    # a tiled MLP is a layer around ops
    assert {case.op for case in cases.CASES} == {op.name for op in OPS} | {"tiled_mlp"}


def test_every_case_runs(tmp_path):
    """The command itself, without the providers that want a GPU or a compiler."""
    command = [sys.executable, "benchmarks/run.py", "--device", "cpu", "--tiny", "--out", str(tmp_path)]
    command += ["--providers", "ds_fused", "hf_eager", "torch", "bare"]
    # thousands of tiny calls: where other processes have the cores, threads wait for one another at each
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    header, rows = read_csv(tmp_path / "ops.csv")
    assert {row.case[:2] for row in rows} == {(case.op, case.variant) for case in cases.CASES}
    assert [(row.case, row.provider, row.status) for row in rows if row.status not in (OK, "ceiling")] == []
    assert all(row.forward_ms > 0 and row.full_ms > 0 for row in rows)
    assert all(row.over_best_rival > 0 for row in rows if row.ours)
    assert {"device", "versions", "date", "command", "copy_tb_s", "lm_head_tflop_s"} <= set(header)
    text = (tmp_path / "ops.md").read_text()
    assert all(f"## {case.name}" in text for case in cases.CASES)


def test_wrong_and_broken_providers_get_a_reason_and_no_time(tiny_run):
    providers = {
        "hf_eager": GLU.providers["hf_eager"],
        "half": Provider(half),
        "broken": Provider(broken),
    }
    rows = tiny_run(dataclasses.replace(GLU, providers=providers))
    assert rows["half"].status.startswith("wrong: ") and rows["half"].full_ms is None
    assert rows["half"].worst_error == pytest.approx(0.5, rel=0.02)
    assert rows["broken"].status == "failed: RuntimeError: no such"
    assert rows["hf_eager"].status == OK


def test_what_a_provider_overwrites_is_restored(tiny_run):
    providers = {
        "destructive": Provider(destructive, overwrites=("gate",)),
        "hf_eager": GLU.providers["hf_eager"],
    }
    rows = tiny_run(dataclasses.replace(GLU, providers=providers, launch_bound=(1, 1)))
    # backward reads the ruined gate, so the answer is wrong; the rival after it still finds the inputs as they were
    assert rows["destructive"].status.startswith("wrong: dgate is off by nan")
    assert rows["hf_eager"].status == OK

    on = Instruments("cpu", rep_ms=1)
    gate, calls = torch.ones(3), []

    def call():
        calls.append(gate.sum().item())
        gate.zero_()

    on.median_ms(call, prepare=lambda: gate.fill_(1.0))
    assert set(calls) == {3.0}


def test_resume_keeps_rows_and_measures_the_rest(tiny_run, tmp_path):
    first = tiny_run(GLU, "--providers", "hf_eager")
    both = tiny_run(GLU, "--providers", "hf_eager", "ds_fused", "--resume")
    # but for the host's time, which is taken anew beside the other's
    kept = {name: getattr(first["hf_eager"], name) for name in ("host_forward_us", "host_full_us")}
    assert dataclasses.replace(both["hf_eager"], **kept) == first["hf_eager"]
    assert both["ds_fused"].best_rival == "hf_eager"
    assert read_csv(tmp_path / "ops.csv")[0]["tests"] == "not looked at"


TWO = dataclasses.replace(GLU, providers={name: GLU.providers[name] for name in ("ds_fused", "hf_eager")})


@pytest.fixture
def batches(monkeypatch):
    """The calls of which a batch was timed, in their order. Each shape has two rounds of two providers here."""
    us = [10.0, 20.0, 30.0, 40.0, 5.0, 50.0, 60.0, 7.0]
    taken = []

    def host_us(on, call):
        call()
        taken.append(call)
        return us[(len(taken) - 1) % len(us)]

    monkeypatch.setattr(Instruments, "host_us", host_us)
    # however busy this machine is, a short call
    monkeypatch.setattr(Instruments, "median_ms", lambda on, call, prepare=None: 0.1)
    return taken


def test_hosts_are_timed_in_turn_and_the_least_batch_stands(tiny_run, batches):
    rows = tiny_run(TWO)
    first, launch = batches[:8], batches[8:]
    assert len(launch) == 8
    for shape in (first, launch):
        assert shape[:4] == shape[4:] and len(set(map(id, shape))) == 4
    figures = {name: (row.host_forward_us, row.host_full_us) for name, row in rows.items()}
    assert figures == {"ds_fused": (5.0, 20.0), "hf_eager": (30.0, 7.0)}


def test_a_host_that_is_missing_is_timed_with_all_of_its_shape(tiny_run, tmp_path, batches):
    tiny_run(TWO)
    header, rows = read_csv(tmp_path / "ops.csv")
    assert [row.launch_bound for row in rows] == [False, False, True, True]
    rows[0] = dataclasses.replace(rows[0], host_forward_us=None, host_full_us=None)
    rows[1] = dataclasses.replace(rows[1], host_forward_us=1.0, host_full_us=1.0)
    write_csv(tmp_path / "ops.csv", header | {"method": "another"}, rows)
    batches.clear()
    again = tiny_run(TWO, "--resume")
    assert len(batches) == 8
    assert {name: row.host_full_us for name, row in again.items()} == {"ds_fused": 20.0, "hf_eager": 7.0}
    header, _ = read_csv(tmp_path / "ops.csv")
    assert header["method"] == "another" and "all providers of a shape in turn" in header["resumed by"]
    batches.clear()
    tiny_run(TWO, "--resume")
    assert batches == []


def test_hosts_that_time_did_not_allow_are_named_and_come_later(tiny_run, tmp_path, batches, monkeypatch):
    fill_hosts = run.Bench.fill_hosts
    monkeypatch.setattr(run.Bench, "fill_hosts", lambda bench, rows, base: None)
    tiny_run(TWO)
    monkeypatch.setattr(run.Bench, "fill_hosts", fill_hosts)
    rows = tiny_run(TWO, "--resume", "--seconds", "0")
    assert rows["ds_fused"].full_ms and rows["ds_fused"].host_full_us is None
    left = read_csv(tmp_path / "ops.csv")[0]["left out"]
    assert left == "2 after 0 s: glu silu 5x48 host; glu silu 5x48 launch host"
    assert tiny_run(TWO, "--resume")["ds_fused"].host_full_us == 20.0


def test_what_fails_in_a_round_costs_its_own_row(tiny_run, batches):
    def fails_late(t):
        def call():
            if batches:
                raise RuntimeError("late")
            return torch.nn.functional.silu(t["gate"]) * t["up"]

        return call

    providers = {"hf_eager": GLU.providers["hf_eager"], "late": Provider(fails_late)}
    rows = tiny_run(dataclasses.replace(GLU, providers=providers))
    assert rows["late"].status == "failed: RuntimeError: late" and rows["late"].host_full_us is None
    assert rows["hf_eager"].status == OK and rows["hf_eager"].host_full_us > 0


def test_a_device_that_dies_in_a_round_costs_one_row(monkeypatch, batches):
    monkeypatch.setattr(
        run, "CASES", (dataclasses.replace(GLU, providers=TWO.providers | {"broken": Provider(broken)}),)
    )
    monkeypatch.setattr(Instruments, "alive", lambda on: False)
    bench = run.Bench(0, GLU.tiny, {"copy_tb_s": 1.0}, Instruments("cpu", rep_ms=1))
    rows = [Row("glu", "silu", "5x48", True, name, host_full_us=9.0) for name in ("hf_eager", "broken", "ds_fused")]
    bench.fill_hosts(rows, None)
    # the others are still to be timed, by a process with another context
    assert [row.status for row in rows] == [OK, "failed: RuntimeError: no such", OK]
    assert [row.host_full_us for row in rows] == [None, None, None]


def test_a_dead_device_costs_one_row(tmp_path):
    """After an illegal access nothing in that process works: the run goes on in a new one."""
    arguments = ["--device", "cpu", "--tiny", "--op", "glu", "--providers", "hf_eager", "torch", "ds_fused"]
    arguments += ["--out", str(tmp_path), "--seconds", "500"]
    program = "import sys; from benchmarks import measure, run; measure.Instruments.alive = lambda on: False; "
    program += "run.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "ops.csv")[1]
    glus = [case for case in cases.CASES if case.op == "glu"]
    ran = ("ds_fused", "hf_eager")
    wanted = [(case.variant, name) for case in glus for name in case.providers if name.split()[0] in ran]
    assert sorted((row.variant, row.provider) for row in rows) == sorted(2 * wanted)
    assert done.stdout.count(b"device: ") == 2


def test_what_time_did_not_allow_is_named(tiny_run, tmp_path):
    assert tiny_run(GLU, "--providers", "hf_eager", "--seconds", "0") == {}
    header, _ = read_csv(tmp_path / "ops.csv")
    assert "glu silu 5x48 hf_eager" in header["left out"]
    assert set(tiny_run(GLU, "--providers", "hf_eager", "--resume")) == {"hf_eager"}
    assert "left out" not in read_csv(tmp_path / "ops.csv")[0]


def test_an_earlier_version_is_a_rival_and_all_is_compiled_before(tmp_path):
    """This checkout stands for the earlier version; its process is another one."""
    command = [
        sys.executable,
        "benchmarks/run.py",
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(tmp_path),
        "--ops",
        "relu2",
    ]
    command += ["--providers", "base", "ds_fused", "hf_eager", "--base", str(ROOT), "--ahead", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 shapes compiled ahead" in done.stdout
    rows = {row.provider: row for row in read_csv(tmp_path / "ops.csv")[1] if row.launch_bound}
    assert all(row.host_full_us > 0 for row in rows.values()) and rows["ds_fused"].over_base > 0
    rows = {row.provider: row for row in read_csv(tmp_path / "ops.csv")[1] if not row.launch_bound}
    assert [row.status for row in rows.values()] == [OK] * 3 and set(rows) == {"base", "ds_fused", "hf_eager"}
    assert rows["ds_fused"].over_base > 0 and rows["ds_fused"].best_rival == "hf_eager"
    assert rows["base"].over_base is None and rows["base"].over_best_rival is None


REPORT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_glu" name="test_glu[silu]"/>
<testcase classname="tests.ops.test_softmax" name="test_softmax"/>
<testcase classname="tests.ops.test_along_rows" name="test_empty[shape0-sparsemax]"><failure/></testcase>
<testcase classname="tests.ops.test_dyt" name="test_dyt"><skipped/></testcase>
{}</testsuite></testsuites>"""


def test_an_op_whose_test_is_red_is_not_timed(tiny_run, tmp_path):
    report = tmp_path / "tests.xml"
    report.write_text(REPORT.format(""))
    assert red_tests([report], {"glu", "softmax", "sparsemax", "dyt"}) == {
        "sparsemax": "test_along_rows.py::test_empty[shape0-sparsemax] failed",
        "dyt": "no test of it has passed",
    }
    more = ("--providers", "ds_fused", "--tests", str(report))
    assert tiny_run(GLU, *more)["ds_fused"].status == OK
    assert read_csv(tmp_path / "ops.csv")[0]["tests"] == "tests.xml: no op refused"
    # what no op is named for is everybody's
    report.write_text(REPORT.format('<testcase classname="tests.ops.test_launch" name="test_bits"><error/></testcase>'))
    row = tiny_run(GLU, *more, "--resume")["ds_fused"]
    assert row.status == "refused: test_launch.py::test_bits failed" and row.full_ms is None
    assert read_csv(tmp_path / "ops.csv")[0]["tests"] == "tests.xml: glu refused"
    report.write_text(REPORT.format(""))
    assert tiny_run(GLU, *more, "--resume")["ds_fused"].status == OK


def test_no_op_is_without_tests_of_its_own(tmp_path):
    """Where all tests of tests/ops and of tiled MLPs pass, every case is timed."""
    tests = Path(__file__).parents[1]
    files = [*(tests / "ops").glob("test_*.py"), *(tests / "modules").glob("test_*ed_mlp.py")]
    rows = "".join(f'<testcase classname="tests.{path.parent.name}.{path.stem}" name="test"/>' for path in files)
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{rows}</testsuite></testsuites>")
    assert red_tests([tmp_path / "tests.xml"], {case.op for case in cases.CASES}) == {}
    assert {f"test_{name}" for name in PARTS} <= {path.stem for path in files}


def test_where_ours_is_behind_is_said_first():
    def row(op: str, provider: str, ms: float, peak: float, *, launch: bool = False, status: str = OK) -> Row:
        return Row(
            op,
            "",
            "1x1",
            launch,
            provider,
            status,
            full_ms=ms,
            full_share=None if launch else 0.9 / ms,
            peak_mib=peak,
            host_full_us=ms,
        )

    rows = [row("glu", "ds_fused", 1.0, 2.1), row("glu", "liger", 2.0, 1.0), row("dyt", "ds_fused", 0.9, 1.0)]
    rows += [row("dyt", "liger", 0.45, 1.0), row("head", "ds_fused", 1.1, 1.0)]
    rows += [row("head", "bare GEMMs", 1.0, 0.0, status="ceiling")]
    rows += [row("rope", "ds_fused", 1.0, 1.0, launch=True), row("rope", "liger", 1.1, 1.0, launch=True)]
    rows += [row("glu", "ds_fused overwrite_inputs", 1.0, 1.0)]
    rows += [row("norm", "ds_fused", 0.9, 2.0), row("norm", "liger", 0.9, 1.0)]
    rows += [row("tvd", "ds_fused", 0.9, 2.1), row("tvd", "liger", 0.9, 1.0)]
    rows += [row("cross_entropy", "ds_fused", 1.5, 1.0), row("cross_entropy", "ds_fused grad_in_forward", 1.2, 1.0)]
    compare(rows)
    assert summary(rows) == [
        "- Liger's time over ours: 1.00 as a geometric mean of 4 cases, 0.50 to 2.00",
        "- Liger's time of the host where launches are what takes time over ours: 1.10 as a geometric mean of 1 cases, "
        "1.10 to 1.10",
        "- cross_entropy 1x1: 1.11 times 3 passes, at most 1.1 wanted",
        "- cross_entropy 1x1 grad_in_forward: 1.33 times 2 passes, at most 1.3 wanted",
        "- a rival needs less than 0.97 of the time: dyt 1x1",
        "- below 92% of the floor, but for heads: glu 1x1; cross_entropy 1x1",
        "- above 1.07 times the bare GEMMs: head 1x1",
        "- more than 0.85 of Liger's time of the host: rope 1x1",
        "- a peak of memory larger than Liger's by more than 1 MiB: glu 1x1; tvd 1x1",
        "- larger by 1 MiB or less: norm 1x1",
        "- larger by more than 1 MiB, whatever options were run: tvd 1x1",
        "- larger by 1 MiB or less, whatever options were run: norm 1x1",
    ]
    assert summary(rows)[0] in markdown({}, rows)


def test_ratios_come_from_right_answers_only():
    def row(provider: str, ms: float | None, status: str = OK) -> Row:
        return Row("glu", "silu", "1x1", False, provider, status, full_ms=ms)

    rows = [row("ds_fused", 2.0), row("ds_fused other", 1.0), row("compile", 3.0), row("liger", 4.0)]
    rows += [row("cheat", 0.1, "wrong: dup is off by 1, allowed 0.02"), row("bare GEMMs", 0.5, "ceiling")]
    compare(rows)
    assert (rows[0].best_rival, rows[0].over_best_rival, rows[0].over_liger) == ("compile", 1.5, 2.0)
    assert rows[1].over_best_rival == 3.0
    assert rows[2].over_best_rival is None
    text = markdown({}, rows)
    assert text.index("| ds_fused other") < text.index("| compile") < text.index("| cheat")


def test_csv_round_trip(tmp_path):
    rows = [Row("glu", "silu", "1x1", True, "liger", 'failed: a, "b"', note="in place, on x", peak_mib=1.5)]
    write_csv(tmp_path / "ops.csv", {"device": "none: really"}, rows)
    assert read_csv(tmp_path / "ops.csv") == ({"device": "none: really"}, rows)
    assert read_csv(tmp_path / "nothing.csv") == ({}, [])


def test_pictures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [Row("glu", "silu", "4x8", False, "ds_fused", full_ms=1.0, full_share=0.5, peak_mib=2.0)]
    rows += [Row("glu", "silu", "2x4 launch", True, "ds_fused", full_ms=0.5, peak_mib=0.0)]
    rows += [Row("glu", "silu", "4x8", False, "liger", "failed: no")]
    write_csv(tmp_path / "ops.csv", {"device": "none", "versions": "none", "date": "never"}, rows)
    assert plot.main([str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"ops.csv", "ops.png", "ops_sizes.png"}
    assert [plot.size(row) for row in rows] == [32, 8, 32]
    write_csv(tmp_path / "ops.csv", {}, rows[2:])
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path)])
    assert "no finished row to draw" in capsys.readouterr().err


def test_widths(tmp_path):
    """In place of the listed shapes, of the case's own sizes and as large."""
    listed = [case for case in cases.CASES if case.widths]
    planned = list(run.plan(Namespace(ops=None, widths=True)))
    assert [place for place, _, _ in planned] == [case for case in listed for _ in case.widths]
    assert {case.op for case, _, _ in run.plan(Namespace(ops=["rope"], widths=True))} == {"rope"}
    for case, shape, launch_bound in planned:
        assert not launch_bound and len(shape) == len(case.tiny)
        assert case.bytes(*shape)[0] >= 2**26
    pytest.importorskip("matplotlib")
    rows = [
        Row("dyt", "", f"{2**20 // d}x{d}", False, "ds_fused", full_ms=2.0, full_share=0.5, forward_share=0.6)
        for d in (64, 576)
    ]
    folder = tmp_path / "widths"
    folder.mkdir()
    write_csv(folder / "ops.csv", {"device": "none", "versions": "none"}, rows)
    assert plot.main([str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"ops.csv", "widths.png"}


def test_errors():
    one = torch.ones(4)
    assert relative_error(one * 1.5, one) == pytest.approx(0.5)
    assert relative_error(one, torch.zeros(4)) == 2.0
    nan = torch.tensor([1.0, torch.nan, 1.0, 1.0])
    error, name = worst_error([one * 9, nan], [one, one], ["y", "dx"])
    assert name == "dx" and not error <= 1e9
    with pytest.raises(ValueError, match="shape"):
        relative_error(torch.ones(1, 4), one)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ahead", "-1"], "'-1' is not a positive number"),
        (["--rep-ms", "0"], "--rep-ms: '0' is no finite number above 0"),
        (["--rep-ms", "inf"], "--rep-ms: 'inf' is no finite number above 0"),
        (["--seconds", "nan"], "--seconds: 'nan' is no number of seconds"),
        (["--tests", __file__], f"--tests {__file__} is no XML: "),
        (["--tests", "/no/report.xml"], "--tests /no/report.xml: no such file"),
        (["--base", "no-such-ref"], "--base no-such-ref: neither a folder with ds_fused/ in it nor a commit"),
        (
            ["--providers", "nobody"],
            "--providers: invalid choice: 'nobody' (choose from 'bare', 'base', 'compile', 'ds_fused'",
        ),
        (["--out", __file__], f"--out: {__file__} is no folder"),
        (["--widths"], "--widths are shapes of a GPU, all of them: not with --tiny or --quick"),
        (["--out", f"{__file__}/h100"], f"--out: {__file__} is no folder"),
    ],
)
def test_what_is_mistyped_is_said_before_anything_starts(arguments, said, capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu", "--tiny", *arguments])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("# device: none\n", "ops.csv can't be gone on with: its header has no copy_tb_s, matmul_tflop_s"),
        ("# a comment\n", "ops.csv is no table of run.py: "),
        ("op,host_forward_us\nglu,x\n", "ops.csv is no table of run.py: could not convert string to float: 'x'"),
    ],
)
def test_a_file_that_is_no_table_is_not_gone_on_with(text, said, tmp_path):
    (tmp_path / "ops.csv").write_text(text)
    with pytest.raises(SystemExit, match=re.escape(said)):
        run.main(["--device", "cpu", "--tiny", "--resume", "--out", str(tmp_path)])
    assert (tmp_path / "ops.csv").read_text() == text


@pytest.mark.parametrize("script", ["exactness", "scale", "tune", "zero3_head"])
def test_no_results_go_below_a_file(script, capsys):
    with pytest.raises(SystemExit):
        importlib.import_module(f"benchmarks.{script}").main(["--out", f"{__file__}/x"])
    assert f"--out: {__file__} is no folder" in capsys.readouterr().err


def test_a_cpu_run_must_be_tiny(capsys):
    with pytest.raises(SystemExit):
        run.main(["--device", "cpu"])
    assert "--tiny" in capsys.readouterr().err


def test_tune_tries_constants_and_leaves_them_as_they_were(tmp_path):
    """Every search, on CPU references: the answers agree whatever the constants are."""
    import ds_fused.ops  # noqa: F401
    from benchmarks import tune

    glu = sys.modules["ds_fused.ops.mlp.glu"]
    before = glu.BLOCK
    assert tune.main(["--tiny", "--seconds", "10", "--out", str(tmp_path)]) == 0
    assert before == glu.BLOCK
    text = (tmp_path / "tune.csv").read_text()
    for search in tune.SEARCHES:
        assert f"{search.op} {search.variant} {search.direction}".replace("  ", " ") in text
        assert set(search.constants) <= set(vars(search.module))
    assert "Error" not in text


def test_tune_runs_kernels_where_the_interpreter_is_asked_for(tmp_path):
    """Those with loops too, which the interpreter as it is refuses."""
    command = [sys.executable, "benchmarks/tune.py", "--tiny", "--only", "dyt backward", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, "--seconds", "1"], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Error" not in done.stdout and (tmp_path / "tune.csv").read_text().count("as in the file") == 2
