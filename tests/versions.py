"""The sweep over several versions of transformers, each installed into a folder for as long as it takes.

    python tests/versions.py                        those of VERSIONS, into benchmarks/results/versions.md
    python tests/versions.py 5.3.0                  others, printed

What a version computes differently stays stock or is caught by the proof; what no line of the table may say is that a
type trains differently.
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
HEAD = """# Versions of transformers

Types of language models, built tiny and trained for a step, stock and fused, as in the table of
[architectures](architectures.md): causal or conditional ones + masked ones. Made by `python tests/versions.py`."""
COUNTS = ("types", "built and run", "different", "with a fused loss", "with fused norms")


def swept(transformers: str) -> dict[str, str]:
    """What the sweep counts under that version: causal or conditional types, and masked ones behind a plus."""
    with tempfile.TemporaryDirectory() as folder:
        site, table = Path(folder, "site"), Path(folder, "table.md")
        _run([sys.executable, "-m", "pip", "install", "-q", "--target", str(site), f"transformers=={transformers}"])
        _run([sys.executable, str(REPO / "tests" / "sweep.py"), "--table", str(table)], PYTHONPATH=str(site))
        text = table.read_text(encoding="utf-8")
    assert f"transformers {transformers}," in text, "another version was imported"
    found = re.findall(r"^\| ([a-z ]+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    return {what: f"{causal} + {masked}" for what, causal, masked in found}


def _run(command: Sequence[str], **environment: str) -> None:
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("versions", nargs="*")
    given = options.parse_args().versions
    lines = [("transformers", *COUNTS), ["---"] * (1 + len(COUNTS))]
    for version in given or VERSIONS:
        counts = swept(version)
        lines.append((version, *(counts[what] for what in COUNTS)))
        print(" | ".join(lines[-1]), flush=True)
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if not given:
        TABLE.write_text(f"{HEAD}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
