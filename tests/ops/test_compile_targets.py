"""Every kernel compiles for NVIDIA sm80, sm89 and sm90 and for AMD gfx942, on any machine; see compile_all.py.

With --all as the examples there launch it, 450 times for each target, and with its largest tiles for what came before
and after them. Else with its largest tiles: for sm90, where spilled registers are counted, those of each combination of
dtypes; the others are given the same but for a handful of launches, so those of one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SM90 = "cuda:90:32"
# bytes of shared memory that a program may have
MOST_SHARED = {"cuda:80:32": 163 * 1024, "cuda:89:32": 99 * 1024, SM90: 227 * 1024, "hip:gfx942:64": 64 * 1024}
MORE_SHARED = {
    "cuda:100:32": 227 * 1024,
    "cuda:120:32": 99 * 1024,
    "hip:gfx90a:64": 64 * 1024,
    "hip:gfx950:64": 160 * 1024,
}
TARGETS = (*MOST_SHARED, *(pytest.param(target, marks=pytest.mark.all) for target in MORE_SHARED))
# rms_norm's backward on fp32 rows of 16384 columns, the widest whole ones, spills 116
MOST_SPILLED = 128  # bytes per thread


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, list]]:
    """Target -> what compile_all.py found."""
    choices = dict.fromkeys(MOST_SHARED, "largest") | {SM90: "largest_by_dtypes"}
    if request.config.getoption("--all"):
        choices = dict.fromkeys(MOST_SHARED, "all") | dict.fromkeys(MORE_SHARED, "largest")
    asked = [f"{target}:{choice}" for target, choice in choices.items()]
    # a process of its own: this one's kernels are interpreted
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("compile_all.py")), *asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=2400)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(choices, json.loads(done.stdout.splitlines()[-1]).values(), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(results, target):
    compiled = results[target]["compiled"]
    assert compiled and all(row["bytes"] > 0 for row in compiled)
    assert not results[target]["unreached"], "kernels that no example in examples/ launches"


@pytest.mark.parametrize("target", TARGETS)
def test_shared_memory_suffices(results, target):
    shared = {f"{row['kernel']} {row['constants']}": row["shared"] for row in results[target]["compiled"]}
    assert {kernel: n for kernel, n in shared.items() if n > (MOST_SHARED | MORE_SHARED)[target]} == {}


@pytest.mark.parametrize("target", TARGETS)
def test_programs_meet_on_nvidia(results, target):
    constants = [row["constants"] for row in results[target]["compiled"]]
    steps = {(c["MEASURES"], c["WRITES"]) for c in constants if "MEASURES" in c}
    assert steps == ({(True, True)} if target.startswith("cuda") else {(True, False), (False, True)})


def test_registers_do_not_spill_on_sm90(results):
    spilled = {f"{row['kernel']} {row['constants']}": row["spilled"] for row in results[SM90]["compiled"]}
    assert None not in spilled.values(), "the assembler's report was not understood"
    assert {kernel: n for kernel, n in spilled.items() if n > MOST_SPILLED} == {}


def test_threads_find_the_same_sums(results):
    """Of Sinkhorn-Knopp's iterations, where sums that differ by an ulp from thread to thread become a drift."""
    rows = [row for row in results[SM90]["compiled"] if row["kernel"] == "_mhc_coefficients_fwd_kernel"]
    assert rows and not any(row["apart"] for row in rows)
