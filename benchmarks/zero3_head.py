"""Head and loss in a real ZeRO-3 engine, every way to them (head_ways.py): time, extra memory, distance from the truth.

    python benchmarks/zero3_head.py --gpus 2 --out benchmarks/results/h100x2
    python benchmarks/zero3_head.py --gpus 2 --out benchmarks/results/h100x2 --vocab-sweep

The first writes zero3_head.md, .json and (with matplotlib) .png: all ways at the shapes of real heads, of which
``--shapes`` and ``--ways`` choose some, with commas between them. The second writes zero3_head_vocab.md and .json:
extra memory as the vocabulary grows, nothing kept of the logits. All ways of a shape once, then all once more, as often
as --rounds says. Files are written anew after each row. Both start their ranks themselves, by torchrun; on a machine
without a GPU they run on the CPU, where a tiny ``--shapes 24x16x67`` shows that everything works.

Of each rank M tokens, bf16 weight, activations and gradients; of the labels 10 % are ignored on the first rank, 20 on
the second, and so on.

- fwd+bwd ms: the median of 10 iterations, of the slowest rank each, and of that over rounds; beside it the least and
  the largest of them all. All ranks start together, and it ends with all that the device has to do, gathers and
  DeepSpeed's reduction of the gradient among it. The optimizer's step is left out. Within the forward products come
  before the head, as the layers of a model do: the device is hot, and the host ahead of it.
- from idle ms: the same of 10 iterations without them, from a barrier on: host time is in it.
- extra MiB: the most memory allocated during forward and backward beyond what was allocated before, less the 2 MH
  bytes of dx, which every way has to hand back. Before are: x and labels, the shard of the weight with its fp32 master
  copy, DeepSpeed's buckets, and the part of the gradient that it keeps. Windows for copy engines stay, and are extra
  all the same. Largest of all ranks and iterations.
- errors: relative, against fp32 on the same inputs: of the loss, of dx, and of the rank's part of the weight's gradient
  averaged over ranks, in the L2 norm; largest of all ranks. A way whose answer is wrong gets no time. A frozen head has
  no gradient of its weight.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# run as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head_job import BEGUN, FAILED, OK, RESULT
from benchmarks.head_rows import merged
from benchmarks.head_ways import BARE, DEFAULT, SWEEP, WAYS, Shape
from benchmarks.page import Results, Row, header, number, out_folder, port, positive, table
from benchmarks.plot_head import draw
from benchmarks.ranks import listen

JOB = Path(__file__).parent / "head_job.py"
SHAPES = ("8192x4096x128256", "16384x4096x128256", "8192x8192x128256", "8192x5376x262144")
SWEEP_SHAPES = tuple(f"4096x2048x{2**power}" for power in range(15, 20))

# shape, way
Place = tuple[str, str]


@dataclass
class Job:
    """How one launch of the ranks went."""

    device: str | None = None  # None: it never began
    rows: int = 0
    failure: str = ""  # of one rank, where the others had nothing to say any more
    status: int = 0
    tail: str = ""


def launched(cases: Sequence[Place], gpus: int, port: int, results: Results) -> Job:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(gpus)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    command += [str(JOB), json.dumps(cases)]
    job = Job()

    def hear(line: str) -> None:
        if line.startswith(BEGUN):
            job.device = results.header["device"] = json.loads(line.removeprefix(BEGUN))
        elif line.startswith(RESULT):
            results.add(json.loads(line.removeprefix(RESULT)))
            job.rows, job.failure = job.rows + 1, ""
        elif line.startswith(FAILED):
            # the first to fail says why; others may only have lost it
            job.failure = job.failure or json.loads(line.removeprefix(FAILED))

    ended = listen(command, hear)
    job.status, job.tail = ended.status, ended.tail
    return job


def measure(cases: Sequence[Place], launch: Callable[[Sequence[Place]], Job], results: Results) -> None:
    """Launch after launch: when a way has brought the ranks down, the next one takes up the rest."""
    left = list(cases)
    while left:
        job = launch(left)
        if job.device is None:
            raise SystemExit(f"zero3_head: the ranks did not start (exit {job.status}):\n{job.tail}")
        left = left[job.rows :]
        # ranks that end by themselves have said how their last way went
        if left and (job.status or not job.rows):
            shape, way = left.pop(0)
            said = re.findall(r"^[\w.]*(?:Error|Exception): .+", job.tail, re.MULTILINE) or [f"exit {job.status}"]
            status = job.failure or f"failed: the ranks died: {said[-1][:200]}"
            results.add({"shape": shape, "way": way, "status": status})


def ways_table(head: dict[str, str], rows: Sequence[Row]) -> str:
    """One table a shape, fastest first; those without a time last, with their reason."""
    lines = ["# Head and loss under ZeRO-3", "", *(f"- {key}: {value}" for key, value in head.items())]
    names = ("way", "fwd+bwd ms", "all iterations", "over bare GEMMs", "from idle ms", "extra MiB")
    names += ("loss error", "dx error", "dW error", "note")
    rows = merged(rows)
    for shape in dict.fromkeys(row["shape"] for row in rows):
        mine = [row for row in rows if row["shape"] == shape]
        floor = next((row["ms"] for row in mine if row["way"] == BARE and "ms" in row), None)
        cells = []
        for row in sorted(mine, key=lambda row: row.get("ms", float("inf"))):
            ms, errors = row.get("ms"), row.get("errors") or {}
            over = None if ms is None or floor is None else ms / floor
            note = WAYS[row["way"]].note if row["status"] == OK else f"**{row['status']}**"
            if "other_round" in row:
                note += f"; in another round **{row['other_round']}**"
            spread = "-" if ms is None else f"{row['least_ms']:.1f} to {row['most_ms']:.1f}"
            cells.append(
                [row["way"], number(ms, ".1f"), spread, number(over, ".3f"), number(row.get("idle_ms"), ".1f")]
                + [number(row.get("extra_mib"), ".0f")]
                + [number(errors.get(what), ".1e") for what in ("loss", "dx", "dw")]
                + [note]
            )
        lines += ["", f"## {shape}", "", *table(names, cells)]
    return "\n".join(lines) + "\n"


def sweep_table(head: dict[str, str], rows: Sequence[Row]) -> str:
    """One line a shape: extra MiB of each way beside the sizes that it might grow with."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    lines = ["# Extra memory of head and loss as the vocabulary grows", ""]
    lines += [f"- {key}: {value}" for key, value in head.items()]
    rows, cells = merged(rows), []
    for shape in dict.fromkeys(row["shape"] for row in rows):
        sizes = Shape.parse(shape)
        whole = 2 * sizes.vocab * sizes.hidden / 2**20
        mine = {row["way"]: row for row in rows if row["shape"] == shape}
        found = [_sweep_cell(mine.get(way)) for way in ways]
        cells.append([shape, f"{whole:.0f}", f"{whole / int(head['ranks']):.0f}", *found])
    names = ["shape", "whole weight", "one rank's part", *(f"{way}: extra MiB (ms)" for way in ways)]
    return "\n".join([*lines, "", *table(names, cells)]) + "\n"


def _sweep_cell(row: Row | None) -> str:
    if row is None or row["status"] != OK:
        return "-" if row is None else f"**{row['status']}**"
    return f"{number(row.get('extra_mib'), '.0f')} ({row['ms']:.1f})"


def _listed(known: Sequence[str] | None) -> Callable[[str], list[str]]:
    """Names, or shapes where none are known, with commas between them."""

    def listed(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",")]
        for word in words:
            if known is None:
                try:
                    Shape.parse(word)
                except ValueError as error:
                    raise argparse.ArgumentTypeError(str(error)) from None
            elif word not in known:
                raise argparse.ArgumentTypeError(f"there is no way {word!r}; there are {', '.join(known)}")
        return words

    return listed


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--gpus", type=positive, default=1, help="ranks; on a machine without a GPU they run on the CPU"
    )
    parser.add_argument("--out", type=out_folder, default=Path(), help="folder for the results")
    parser.add_argument("--shapes", type=_listed(None), metavar="MxHxV,...", help=f"default {','.join(SHAPES)}")
    parser.add_argument("--ways", type=_listed(tuple(WAYS)), metavar="WAY,...", help=f"default {','.join(DEFAULT)}")
    parser.add_argument("--rounds", type=positive, default=1, help="of all ways at each shape")
    parser.add_argument("--vocab-sweep", action="store_true", help="extra memory as the vocabulary grows")
    parser.add_argument("--master_port", type=port, default=29500, help="where the ranks meet")
    options = parser.parse_args(arguments)

    shapes = options.shapes or (SWEEP_SHAPES if options.vocab_sweep else SHAPES)
    ways = options.ways or (SWEEP if options.vocab_sweep else DEFAULT)
    # the inputs of a shape are made once, so its rounds follow one another
    cases = [(shape, way) for shape in shapes for _ in range(options.rounds) for way in ways]
    # ended from outside, it ends its ranks as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.vocab_sweep:
        results = Results(options.out / "zero3_head_vocab", sweep_table)
    else:
        results = Results(options.out / "zero3_head", ways_table)
    results.header = header("zero3_head.py", options.gpus, arguments)
    measure(cases, lambda left: launched(left, options.gpus, options.master_port, results), results)
    print(results.text())
    if not options.vocab_sweep:
        reason = draw(options.out)
        if reason is not None:
            print(f"no zero3_head.png: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
