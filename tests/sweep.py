"""Every language model that transformers can build, tiny: stock against fused, in one table.

    python tests/sweep.py                         the whole sweep, into benchmarks/results/architectures.md
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
import resource
import selectors
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
TABLE = REPO / "benchmarks" / "results" / "architectures.md"
SECONDS = 60
# of address space: a model that eats memory ends its own process, not the machine's others
MOST_BYTES = 12 << 30

Row = dict[str, object]


def sweep(cases: Iterable[tuple[str, str]], seconds: float = SECONDS) -> Iterator[Row]:
    """A row for each (model type, class), in order, from processes that can be killed."""
    waiting = list(cases)
    while waiting:
        worker = subprocess.Popen(
            [sys.executable, __file__, "--worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # in a sweep of tiny models more threads than one only wait for each other
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPO)},
        )
        with worker, selectors.DefaultSelector() as selector:
            selector.register(worker.stdout, selectors.EVENT_READ)
            worker.stdin.write(json.dumps(waiting))
            worker.stdin.close()
            while waiting:
                started = time.perf_counter()
                line = worker.stdout.readline() if selector.select(seconds) else None
                if not line:
                    worker.kill()
                    why = f"took more than {seconds:g} s" if line is None else f"ended its process ({worker.wait()})"
                    line = json.dumps(_failed(*waiting[0], why, time.perf_counter() - started))
                    yield json.loads(line)
                    waiting.pop(0)
                    break
                yield json.loads(line)
                waiting.pop(0)


def _failed(model_type: str, cls: str, why: str, seconds: float) -> Row:
    return {"type": model_type, "class": cls, "failed": why, "seconds": round(seconds, 1)}


def work() -> None:
    """Cases from stdin, a line of JSON for each to stdout."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    cases = json.load(sys.stdin)
    # whatever models print is no row
    rows, sys.stdout = sys.stdout, open(os.devnull, "w")
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    for model_type, cls in cases:
        print(json.dumps(run(model_type, cls)), file=rows, flush=True)


def run(model_type: str, cls: str) -> Row:
    from ds_fused.doctor.architectures import config_for, model_class
    from ds_fused.doctor.diagnosis import diagnose
    from ds_fused.doctor.tiny import batch, build, default_config, tiny_config

    started = time.perf_counter()
    stage = "build"
    try:
        kind = model_class(cls)
        model = build(kind, config_for(kind, tiny_config(default_config(model_type))))
        stage = "step"
        inputs = batch(model)
        row = {"type": model_type, "class": cls, **asdict(diagnose(model, inputs))}
    except Exception as error:
        where = error.__traceback__
        while where.tb_next is not None:
            where = where.tb_next
        at = f"{where.tb_frame.f_code.co_filename.rpartition('/')[2]}:{where.tb_lineno}"
        text = " ".join(str(error).split())[:160]
        return _failed(
            model_type, cls, f"{stage}: {type(error).__name__}: {text} ({at})", time.perf_counter() - started
        )
    return {**row, "seconds": round(time.perf_counter() - started, 1)}


def cases() -> list[tuple[str, str]]:
    from ds_fused.doctor.architectures import architectures

    return [(model_type, cls) for model_type, classes in architectures().items() for cls in classes]


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="model types, with commas")
    options.add_argument("--rows", type=Path, default=Path("/tmp/ds_fused_sweep.jsonl"))
    options.add_argument("--resume", action="store_true")
    options.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.worker:
        work()
        return
    only = set(filter(None, given.only.split(",")))
    rows = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.resume else []
    done = {(row["type"], row["class"]) for row in rows}
    todo = [case for case in cases() if (not only or case[0] in only) and case not in done]
    with given.rows.open("a" if given.resume else "w") as file:
        for row in sweep(todo):
            print(json.dumps(row), file=file, flush=True)
            print(row["type"], row["class"], row.get("failed") or "built", row["seconds"], flush=True)


if __name__ == "__main__":
    main()
