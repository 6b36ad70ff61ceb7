"""Several versions of transformers, or of DeepSpeed, each installed into a folder for as long as it takes.

    python tests/versions.py                        those of VERSIONS, into benchmarks/results/versions.md
    python tests/versions.py 5.3.0                  others, printed
    python tests/versions.py --deepspeed            DeepSpeed's, into benchmarks/results/versions_deepspeed.md
    python tests/versions.py --deepspeed 0.19.2     others, printed

Of transformers, the sweep over all its types, and the tests of what is replaced in its models: what a version computes
differently stays stock or is caught by the proof; what no line of the table may say is that a type trains differently.
Of DeepSpeed, the tests that train beside it: every ZeRO stage, the head in all modes.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TABLE = REPO / "benchmarks" / "results" / "versions.md"
VERSIONS = ("5.0.0", "5.9.0", "5.17.0", "5.24.0")
# of what hangs on transformers' own code: its checkpoints, layers, Trainer and outputs
TESTS = (
    *(f"tests/policies/test_{name}.py" for name in ("offload", "recompute", "residual", "smoother", "within_layers")),
    *(f"tests/modules/test_{name}.py" for name in ("compiled_loss", "deferred", "kept", "on_demand", "swap")),
)
DEEPSPEED_TABLE = TABLE.with_name("versions_deepspeed.md")
DEEPSPEED_VERSIONS = ("0.19.0", "0.19.3", "0.19.6", "0.19.8")
DEEPSPEED_TESTS = ("tests/engine/test_engine.py", "tests/engine/test_zero_slabs.py", "tests/zero/test_zero.py")
DEEPSPEED_HEAD = f"""# Versions of DeepSpeed

{", ".join(f"`{path}`" for path in DEEPSPEED_TESTS)},
on CPU ranks: training under every ZeRO stage, with the head in all its modes, beside stock and beside fp64. Made by
`python tests/versions.py --deepspeed`. Before 0.19.8, when several weights are gathered, DeepSpeed waits for the last
one alone, which is no waiting for the others on CPU ranks (by gloo); for these runs it waits for each."""
# what that wait is in older versions, and has been since
WAITS_FOR_LAST = "        launch_handles[-1].wait()\n"
WAITS_FOR_ALL = "        for handle in launch_handles:\n            handle.wait()\n"
HEAD = f"""# Versions of transformers

Types of language models, built tiny and trained for a step, stock and fused, as in the table of
[architectures](architectures.md): causal or conditional ones + masked ones. Then tests of what hangs on transformers'
own code: {", ".join(f"`{Path(path).stem[5:]}`" for path in TESTS)}.
Those that fail under 5.0.0 are of two families that came later, and of a model whose code could not be compiled then.
Made by `python tests/versions.py`."""
COUNTS = ("types", "built and run", "different", "with a fused loss", "with fused norms")


def swept(transformers: str) -> dict[str, str]:
    """What the sweep counts under that version, causal or conditional types + masked ones, and how the tests end."""
    with tempfile.TemporaryDirectory() as folder:
        site, table = Path(folder, "site"), Path(folder, "table.md")
        _run([sys.executable, "-m", "pip", "install", "-q", "--target", str(site), f"transformers=={transformers}"])
        _run([sys.executable, str(REPO / "tests" / "sweep.py"), "--table", str(table)], PYTHONPATH=str(site))
        text = table.read_text(encoding="utf-8")
        ended = _ended(site, TESTS)
    assert f"transformers {transformers}," in text, "another version was imported"
    found = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    counts = {what: f"{causal} + {masked}" for what, causal, masked in found}
    return {what: counts[what] for what in COUNTS} | ended


def tested(deepspeed: str) -> dict[str, str]:
    """How many of the tests pass, fail and are skipped under that version."""
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder)
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site)]
        _run([*install, f"deepspeed=={deepspeed}"])
        parameters = site / "deepspeed" / "runtime" / "zero" / "partition_parameters.py"
        parameters.write_text(parameters.read_text(encoding="utf-8").replace(WAITS_FOR_LAST, WAITS_FOR_ALL))
        return _ended(site, DEEPSPEED_TESTS)


def _ended(site: Path, tests: Sequence[str]) -> dict[str, str]:
    """How tests end that find what is installed in a folder before all else."""
    environment = os.environ | {"PYTHONPATH": str(site), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2", "--dist", "loadfile"]
    done = subprocess.run([*command, *tests], cwd=REPO, env=environment, capture_output=True, text=True)
    counts = dict(reversed(found) for found in re.findall(r"(\d+) (passed|failed|error|skipped)", done.stdout))
    assert "passed" in counts, done.stdout[-2000:] + done.stderr[-2000:]
    return {what: counts.get(what, "0") for what in ("passed", "failed", "error", "skipped")}


def _run(command: Sequence[str], **environment: str) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--deepspeed", action="store_true")
    options.add_argument("versions", nargs="*")
    given = options.parse_args()
    if given.deepspeed:
        name, usual, counted, table, head = "DeepSpeed", DEEPSPEED_VERSIONS, tested, DEEPSPEED_TABLE, DEEPSPEED_HEAD
    else:
        name, usual, counted, table, head = "transformers", VERSIONS, swept, TABLE, HEAD
    lines: list[Sequence[str]] = []
    for version in given.versions or usual:
        counts = counted(version)
        if not lines:
            lines += [(name, *counts), ["---"] * (1 + len(counts))]
        lines.append((version, *counts.values()))
        print(" | ".join(lines[-1]), flush=True)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if not given.versions:
        table.write_text(f"{head}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
