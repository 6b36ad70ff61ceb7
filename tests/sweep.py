"""Every language model that transformers can build, tiny: stock against fused, in one table.

    python tests/sweep.py                         all types, into benchmarks/results/architectures.md
    python tests/sweep.py --only llama,qwen3      some types, printed
    python tests/sweep.py --resume                goes on where a sweep was cut off

Types run many to a process. A process that takes too long over one is ended, the type gets that as its reason, and a
new process goes on with the rest.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import resource
import selectors
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TABLE = REPO / "benchmarks" / "results" / "architectures.md"
ROWS = Path(tempfile.gettempdir()) / f"ds_fused_sweep_{os.getuid()}.jsonl"
SECONDS = 60
# of address space: a model that eats memory ends its own process, not the machine's others
MOST_BYTES = 12 << 30

Case = tuple[str, str]  # model type, class
Row = dict[str, object]


def cases() -> list[Case]:
    from ds_fused.doctor.architectures import architectures

    return [(model_type, cls) for model_type, classes in architectures().items() for cls in classes]


def sweep(cases: Iterable[Case], seconds: float = SECONDS) -> Iterator[Row]:
    """A row for each case, in order, from processes that can be ended."""
    waiting = list(cases)
    while waiting:
        done = 0
        for row in _rows_of_a_process(waiting, seconds):
            yield row
            done += 1
        waiting = waiting[done:]


def _rows_of_a_process(cases: Sequence[Case], seconds: float) -> Iterator[Row]:
    """Rows until all are there or one of them ended the process; that one is a row, too."""
    path = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    worker = subprocess.Popen(
        [sys.executable, __file__, "--worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        # a line that lay in a buffer of ours would look like none to the selector
        bufsize=0,
        # in a sweep of tiny models more threads than one only wait for each other
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(path)},
    )
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            worker.stdin.write(json.dumps(cases).encode())
            worker.stdin.close()
            for case in cases:
                started = time.perf_counter()
                in_time = selector.select(seconds)
                line = worker.stdout.readline() if in_time else b""
                if not line:
                    why = f"ended its process ({worker.wait()})" if in_time else f"took more than {seconds:g} s"
                    yield _failed(*case, why, started)
                    return
                yield json.loads(line)
    finally:
        worker.kill()
        worker.wait()


def _failed(model_type: str, cls: str, why: str, started: float) -> Row:
    return {"type": model_type, "class": cls, "failed": why, "seconds": round(time.perf_counter() - started, 1)}


def work() -> None:
    """Cases from stdin, a line of JSON for each to stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    cases = json.load(sys.stdin)
    rows = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    # whatever models print is no row
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    for model_type, cls in cases:
        print(json.dumps(run(model_type, cls)), file=rows, flush=True)


def run(model_type: str, name: str) -> Row:
    from ds_fused.doctor.architectures import config_for, model_class
    from ds_fused.doctor.diagnosis import examine
    from ds_fused.doctor.tiny import default_config, tiny_config

    started = time.perf_counter()
    try:
        cls = model_class(name)
        found = asdict(examine(cls, config_for(cls, tiny_config(default_config(model_type)))))
    except Exception as error:
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        at = f"{where.tb_frame.f_code.co_filename.rpartition('/')[2]}:{where.tb_lineno}"
        return _failed(
            model_type, name, f"{type(error).__name__}: {' '.join(str(error).split())[:160]} ({at})", started
        )
    return {"type": model_type, "class": name, **found, "seconds": round(time.perf_counter() - started, 1)}


def table(rows: Sequence[Row], seconds: float) -> str:
    built = [row for row in rows if "failed" not in row]
    sections = [
        "# Every language model of transformers",
        "Each type is built tiny with random weights and trained for one step, stock and fused, in fp32 on the CPU. "
        "The loss and the gradient of every parameter are compared; where they are not within 1e-5 of stock, the stock "
        "model in fp64 judges: at most twice as far from it as stock is. `python tests/sweep.py` makes this table.",
        "\n".join(f"- {line}" for line in _facts(seconds)),
        _markdown(
            ("", "causal or conditional", "masked"),
            (
                (what, _n_types(chosen, masked=False), _n_types(chosen, masked=True))
                for what, chosen in (
                    ("types", rows),
                    ("built and run", built),
                    ("different", [row for row in built if row["differs"]]),
                    ("with a fused loss", [row for row in built if row["loss_fused"]]),
                    ("with fused norms", [row for row in built if fused_norms(row)]),
                )
            ),
        ),
        "Errors are relative, of the worst gradient. What could not be built or run, for want of a package, of a tiny "
        "configuration, of its kind of batch or of labels, is below.",
        _markdown(
            ("type", "class", "loss", "layers fused", "layers left", "beside words", "error"),
            (
                (
                    f"`{row['type']}`",
                    f"`{row['class']}`",
                    "fused" if row["loss_fused"] else row["loss_reason"],
                    ", ".join(
                        f"{count} {what} ({key})" for key, what, _, count in row["replaced"] if key not in LOSS_KEYS
                    )
                    or "none",
                    "; ".join(f"{count} {what}: {reason}" for what, count, reason in row["left"]) or "none",
                    ", ".join(sorted({*row["inputs"]} - WORDS)) or "none",
                    f"**{row['differs']}**" if row["differs"] else f"{row['worst']:.0e}",
                )
                for row in built
            ),
        ),
        "## Not built or not run",
        _markdown(
            ("type", "class", "why"),
            ((f"`{r['type']}`", f"`{r['class']}`", str(r["failed"]).replace("|", "/")) for r in rows if "failed" in r),
        ),
    ]
    return "\n\n".join(sections) + "\n"


WORDS = {"input_ids", "decoder_input_ids", "attention_mask", "labels"}
LOSS_KEYS = ("fused_linear_cross_entropy", "cross_entropy")


def fused_norms(row: Row) -> bool:
    """Of which some ran: those of a part that sees say nothing where the batch is words."""
    return any("norm" in key for key in row["ran"])


def _n_types(rows: Sequence[Row], masked: bool) -> int:
    from ds_fused.doctor.architectures import is_masked

    return len({row["type"] for row in rows if is_masked(row["type"], row["class"]) == masked})


def _facts(seconds: float) -> list[str]:
    versions = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch"))
    return [f"versions: {versions}, Python {platform.python_version()}", f"time: {seconds:.0f} s on one core"]


def _markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="model types, with commas")
    options.add_argument("--resume", action="store_true")
    options.add_argument("--table", type=Path, default=TABLE, help="where the table is written")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        work()
        return
    only = set(filter(None, given.only.split(",")))
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if given.resume else []
    done = {(row["type"], row["class"]) for row in rows}
    todo = [case for case in cases() if (not only or case[0] in only) and case not in done]
    with ROWS.open("a" if given.resume else "w") as file:
        for row in sweep(todo):
            rows.append(row)
            print(json.dumps(row), file=file, flush=True)
            told = row.get("failed") or row["differs"] or ("agrees, loss fused" if row["loss_fused"] else "agrees")
            print(row["type"], row["class"], told, flush=True)
    text = table(rows, sum(float(row["seconds"]) for row in rows))
    if only:
        print(text)
    else:
        given.table.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
