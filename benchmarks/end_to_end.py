"""Whole training steps: one job run in several ways (step_ways.py): stock HuggingFace, its rivals and ds_fused.

    python benchmarks/end_to_end.py --gpus 2 --out benchmarks/results/h100x2 --shape 8b-16layers --micro-batches 1,2,4
    python benchmarks/end_to_end.py --gpus 2 --out DIR --ways hf,mine --block 'mine={"enabled": true, "rope": false}'
    python benchmarks/end_to_end.py --gpus 2 --out DIR --shape 8b --longest
    python benchmarks/end_to_end.py --plot DIR

The first two write NAME.md, .json, .csv, NAME_losses.csv and (with matplotlib) NAME.png, NAME being end_to_end unless
--name says otherwise, anew after each size of each way; with --resume the rows that are there stay, and what is missing
of --rounds is measured. The third looks for the longest sequence that trains and writes NAME_longest.md and .json; the
last draws the picture of a NAME.json that was measured elsewhere.

Each way has processes of its own, started by the ``deepspeed`` launcher: all ways once, then all once more, as often as
--rounds says. A process builds its engine once and goes through the micro batches, smallest first; where one runs out
of memory, the smaller ones stand. On a machine without a GPU the ranks run on the CPU, where ``--shape tiny`` shows
that everything works. The words of the tables are explained in them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

# run as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.page import (
    PACKAGES,
    Header,
    Results,
    Row,
    amount,
    duration,
    file_name,
    header,
    in_folder,
    out_folder,
    port,
    positive,
    without_folders,
)
from benchmarks.plot_step import draw
from benchmarks.ranks import Ended, free_port, listen
from benchmarks.results import OK
from benchmarks.step_job import BEGUN, FAILED, MEMORY_ERRORS, OUT_OF_MEMORY, RESULT, Spec
from benchmarks.step_page import RATE, Point, finished, longest_page, steps_page, write_csv, write_curves
from benchmarks.step_shapes import SHAPES, shape_of
from benchmarks.step_ways import LONGEST, OURS, RIVALS, WAYS, WITH_LEAVES, Way, default_ways, ours
from ds_fused.engine.config import parse_config

JOB = Path(__file__).parent / "step_job.py"
LEFT_OUT = "left out"
# of a length where memory is taken to end: so much apart are those that are tried there, in whole multiples of ROUND
# tokens, and so many of them in one process
SHARE, ROUND, AHEAD = 16, 1024, 4


class StepResults(Results):
    """NAME.csv and NAME_losses.csv beside the others."""

    def write(self) -> None:
        super().write()
        write_csv(self.path.with_suffix(".csv"), self.header, self.rows)
        write_curves(self.path.with_name(f"{self.path.name}_losses.csv"), self.rows)


@dataclass
class Launch:
    """What one launch had to say."""

    rows: list[Row] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def status(self, ended: Ended, patience: float) -> str:
        """Why there is no further row."""
        if OUT_OF_MEMORY in self.failures:
            # others may only have lost the rank that had no memory left
            return OUT_OF_MEMORY
        if self.failures:
            return without_folders(self.failures[0])
        if any(words in ended.tail for words in MEMORY_ERRORS):
            return OUT_OF_MEMORY
        if ended.silent:
            return f"failed: nothing was heard for {patience:g} s"
        said = re.findall(r"^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception): .+)", ended.tail, re.MULTILINE)
        return without_folders(f"failed: the ranks died: {said[-1][:200] if said else f'exit {ended.status}'}")


class Launcher:
    """Starts ranks, one launch after the other, and knows how long that may go on."""

    def __init__(self, options: argparse.Namespace, head: Header) -> None:
        self.options, self.head = options, head
        self._start, self._began = time.monotonic(), False

    def late(self) -> bool:
        return time.monotonic() - self._start > self.options.seconds

    def run(self, spec: Spec, hear_row: Callable[[Row], None]) -> tuple[Launch, str]:
        """The launch, and the status of the first size that it did not measure."""
        options, launch = self.options, Launch()

        def hear(line: str) -> None:
            if line.startswith(BEGUN):
                self._began = True
                told = json.loads(line.removeprefix(BEGUN))
                device = f"{options.gpus} x {told['device']}"
                if self.head["device"] not in ("", device):
                    raise SystemExit(f"end_to_end: the rows that are there are of {self.head['device']}, not {device}")
                self.head["device"] = device
                if told[RATE] is not None:
                    self.head[RATE] = f"{told[RATE]:.1f}"
            elif line.startswith(RESULT):
                launch.rows.append(json.loads(Path(json.loads(line.removeprefix(RESULT))).read_text()))
                hear_row(launch.rows[-1])
            elif line.startswith(FAILED):
                launch.failures.append(json.loads(line.removeprefix(FAILED)))

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "spec.json"
            path.write_text(json.dumps(asdict(replace(spec, ceiling=RATE not in self.head))))
            command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(options.gpus)]
            port = options.master_port or free_port()
            command += ["--master_port", str(port), "--no_local_rank", str(JOB), str(path)]
            ended = listen(command, hear, options.patience, {**os.environ, "PYTHONUNBUFFERED": "1"})
        status = OK if len(launch.rows) == len(spec.points) else launch.status(ended, options.patience)
        if status not in (OK, OUT_OF_MEMORY):
            print(ended.tail, file=sys.stderr, flush=True)
        if not (self._began or launch.failures):
            raise SystemExit(f"end_to_end: the ranks did not start (exit {ended.status})")
        return launch, status


def spec_of(options: argparse.Namespace, name: str, way: Way, points: Sequence[Point]) -> Spec:
    paths = {
        name: None if (p := getattr(options, name)) is None else str(p.resolve())
        for name in ("data", "tokenizer", "weights")
    }
    return Spec(
        way=name,
        block=way.block,
        shape=options.shape,
        layers=options.layers,
        stage=options.stage,
        checkpointing=options.checkpointing,
        lora=options.lora,
        offload=options.offload,
        points=points,
        warm_up=options.warm_up,
        steps=options.steps,
        further_step=options.profile,
        profile=options.profile,
        ceiling=False,
        room=options.room,
        **paths,
    )


def compare(options: argparse.Namespace, ways: dict[str, Way], launcher: Launcher, results: Results) -> None:
    """Round after round, all ways; what can't work is not tried again."""
    points = {name: [(batch, options.length) for batch in sorted(options.micro_batches)] for name in ways}
    left = []
    for round_ in range(1, options.rounds + 1):
        for name in [name for name in ways if points[name]]:
            there = [row for row in results.rows if (row["way"], row["round"]) == (name, round_)]
            if len(there) >= len(points[name]):
                points[name] = points[name][: len(finished(there))]
                continue
            # a launch that was cut off is done again as a whole: its steps go on from one size to the next
            results.rows = [row for row in results.rows if row not in there]
            if launcher.late():
                left.append(f"{name}, round {round_}")
                continue
            same = {"way": name, "round": round_, "note": ways[name].note}
            spec = spec_of(options, name, ways[name], points[name])
            # one look at the timeline is enough; its step is taken in every round, so that all rounds train alike
            spec = replace(spec, profile=spec.profile and round_ == 1)
            launch, status = launcher.run(spec, lambda row, same=same: results.add({**same, **row}))
            done, missing = len(launch.rows), points[name][len(launch.rows) :]
            for place, (batch, length) in enumerate(missing):
                why = status if place == 0 else f"not run: {missing[0][0]} x {missing[0][1]} {status}"
                results.add({**same, "micro_batch": batch, "length": length, "status": why})
            points[name] = points[name][:done]
    if left:
        results.header[LEFT_OUT] = f"after {options.seconds:g} s: {'; '.join(left)}"
        results.write()


@dataclass
class Search:
    """For the longest sequence: ``low`` tokens have trained, ``high`` have not."""

    first: int
    last: int
    low: int = 0
    high: int | None = None
    unit: int = 0  # how far apart low and high may stay
    misses: int = 0
    peaks: dict[int, float] = field(default_factory=dict)  # MiB at lengths that trained; none on a CPU
    room: float = 0.0  # MiB

    def trained(self, length: int, peak: float | None, room: float | None) -> None:
        self.low = max(self.low, length)
        if peak is not None:
            self.peaks[length], self.room = peak, room

    def missed(self, length: int) -> None:
        self.high = length
        self.misses += 1

    def aim(self) -> int | None:
        """Where memory ends if it grows as between the last two lengths; None where nothing says how it grows."""
        if len(self.peaks) < 2:
            return None
        shorter, longer = sorted(self.peaks)[-2:]
        slope = (self.peaks[longer] - self.peaks[shorter]) / (longer - shorter)
        return longer + int((self.room - self.peaks[longer]) / slope) if slope > 0 else None

    def path(self) -> list[int]:
        """What is tried one after the other for as long as it trains; empty: found."""
        aim = self.aim()
        if aim is None or self.misses > 1:
            return self._halves() if self.high is not None else self._doubles()
        self.unit = self.unit or max(1, _cut(aim // SHARE, ROUND))
        # after a miss a step down: fragments, and what other libraries hold, want some of the room too
        start = min(_cut(aim, self.unit), self.last) if self.high is None else self.high - self.unit
        start = max(start, self.low + self.unit)
        end = self.last + 1 if self.high is None else self.high
        return list(range(start, min(end, start + AHEAD * self.unit), self.unit))

    def _doubles(self) -> list[int]:
        """Two: they may tell where memory ends."""
        lengths = [2 * self.low, 4 * self.low] if self.low else [self.first, 2 * self.first]
        return [length for length in lengths if length <= self.last]

    def _halves(self) -> list[int]:
        if not self.low:
            return [self.high // 2] if self.high > 1 else []
        self.unit = self.unit or max(1, self.low // 8)
        lengths, low = [], self.low
        while self.high - low > self.unit:
            low += (self.high - low) // 2 // self.unit * self.unit or self.unit
            lengths.append(low)
        return lengths


def _cut(number: int, unit: int) -> int:
    """To a multiple, where it is as large as one."""
    return number // unit * unit if number >= unit else number


def look_for_longest(options: argparse.Namespace, ways: dict[str, Way], launcher: Launcher, results: Results) -> None:
    for name, way in ways.items():
        search = Search(options.length, options.last_length)
        row: Row = {"way": name, "longest": 0, "status": "not ended", "tries": []}
        results.rows.append(row)
        end = "found"
        while path := search.path():
            if launcher.late():
                end = f"left out after {options.seconds:g} s"
                break
            # what has trained trains again, so that a process never begins with the length that is in doubt
            known = [search.first] if search.low >= search.first and search.peaks else []
            lengths = [*known, *path]
            spec = spec_of(options, name, way, [(1, length) for length in lengths])
            launch, status = launcher.run(spec, partial(_note_try, results, row, search))
            if status == OK:
                continue
            missed = lengths[len(launch.rows)]
            row["tries"].append({"micro_batch": 1, "length": missed, "status": status})
            if status != OUT_OF_MEMORY or missed in known:
                end = status
                break
            search.missed(missed)
        if end == "found":
            end = f"{search.high}: {OUT_OF_MEMORY}" if search.high else "no longer one was tried"
        row["status"] = end
        print(name, row["longest"], end, flush=True)
        results.write()


def _note_try(results: Results, row: Row, search: Search, tried: Row) -> None:
    """Written at once: a search that is cut off leaves what has trained."""
    print(row["way"], tried["length"], "tokens", f"{tried['ms']:.0f} ms", flush=True)
    row["tries"].append(tried)
    peaks = [peak for peak in tried["ranks"]["peak_mib"] if peak is not None]
    search.trained(tried["length"], max(peaks, default=None), tried["room_mib"])
    row["longest"] = search.low
    results.write()


def shown(row: Row) -> str:
    """The line that is printed of a row."""
    words = [row["way"], f"round {row['round']}", f"{row['micro_batch']} x {row['length']}", row["status"]]
    if row["status"] == OK:
        words += [f"{row['ms']:.1f} ms", f"{row['tokens_s']:.0f} tokens/s", f"loss {row['losses'][-1]:.4f}"]
        words += [f"{key} {row[key]:.0f}" for key in ("peak_mib", "dynamic_mib") if row.get(key) is not None]
    return "  ".join(words)


def job_text(options: argparse.Namespace) -> str:
    shape = shape_of(options.shape, options.layers)
    sizes = {key: value for key, value in asdict(shape).items() if value and key != "more"}
    words = [
        f"{options.shape} ({', '.join(f'{key} {value}' for key, value in sizes.items())})",
        f"ZeRO {options.stage}",
        "bf16",
        "AdamW" + (" on the CPU" if options.offload else ""),
        "gradient checkpointing" if options.checkpointing else "no gradient checkpointing",
        *(["LoRA of rank 16 on the layers' projections"] if options.lora else []),
        f"{' and '.join(map(str, options.warm_up))} + {options.steps} steps",
        f"text: {options.data.name}" if options.data else "synthetic tokens",
        *([f"weights: {options.weights.name}"] if options.weights else []),
        *([f"{options.room:g} GiB of each card"] if options.room else []),
    ]
    return ", ".join(words)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_off = argparse.BooleanOptionalAction
    add = parser.add_argument
    add("--gpus", type=positive, default=1, help="ranks; on a machine without a GPU they run on the CPU")
    add("--out", type=out_folder, default=Path(), help="folder for the results")
    add("--name", type=file_name, default="end_to_end", help="of the files in it")
    add("--shape", choices=tuple(SHAPES), default="8b-16layers", help="the model")
    add("--layers", type=positive, help="so many instead of the model's own")
    add("--stage", type=int, choices=(0, 1, 2, 3), default=3, help="of ZeRO")
    add("--micro-batches", type=_numbers, default=[1], metavar="N,...", help="sequences of a rank and step")
    add("--length", type=positive, default=4096, help="tokens of a sequence; with --longest the first that is tried")
    add("--checkpointing", action=on_off, default=True, help="of gradients")
    add("--lora", action=on_off, default=False, help="train adapters only; needs peft")
    add("--offload", action=on_off, default=False, help="optimizer on the CPU")
    add("--steps", type=positive, default=8, help="that are measured")
    add("--warm-up", type=_numbers, default=[3], metavar="N[,M]", help="steps before them; M: where a size came before")
    add("--profile", action=on_off, default=True, help="one more step in round 1, taken apart")
    add("--rounds", type=positive, default=2)
    add("--resume", action="store_true", help="keep the rows of NAME.json, measure what is missing")
    add("--room", type=amount, metavar="GIB", help="that PyTorch may have of each card, as if it were a smaller one")
    add("--seconds", type=duration, default=float("inf"), help="start no way after that")
    add("--patience", type=amount, default=300.0, help="seconds without a step after which a launch is ended")
    add("--ways", metavar="WAY,...", help=ways_text())
    add("--block", action="append", default=[], metavar="NAME=JSON", help="a further way: this ds_fused block")
    add("--data", type=in_folder, help="folder of *.txt to train on; needs --tokenizer")
    add("--tokenizer", type=in_folder, help="folder of the tokenizer")
    add("--weights", type=in_folder, help="folder with a saved model of the shape; default: random weights")
    add("--longest", action="store_true", help="look for the longest sequence that trains, micro batch 1")
    add("--last-length", type=positive, default=1 << 20, help="--longest tries none beyond it")
    add("--plot", type=Path, metavar="FOLDER", help="draw NAME.png from the NAME.json of a folder, measure nothing")
    add("--master_port", type=port, help="where the ranks meet; default: a free one for each launch")
    options = parser.parse_args(arguments)
    try:
        options.ways = chosen(options)
    except ValueError as error:
        parser.error(str(error))
    if options.weights and options.lora:
        parser.error("--weights has no adapters, so not with --lora")
    if options.resume and options.longest:
        parser.error("--resume is not for --longest")
    if len(options.warm_up) > 2:
        parser.error("--warm-up has one number or two")
    if (options.data is None) != (options.tokenizer is None):
        parser.error("--data and --tokenizer go together")
    if options.data and not any(options.data.rglob("*.txt")):
        parser.error(f"--data {options.data}: no *.txt in it")
    if options.longest:
        # the first length of a process trains two steps: in its first one ZeRO-3 knows of no gather ahead
        options.warm_up, options.steps, options.profile = [1, 0], 1, False
    if options.plot and not (options.plot / f"{options.name}.json").exists():
        parser.error(f"{options.plot / options.name}.json is not there")
    return options


def ways_text() -> str:
    """Of --help."""
    default = f"{','.join((*RIVALS, *OURS))}, under ZeRO-3 {','.join(WITH_LEAVES)} too"
    return f"of {', '.join(WAYS)} and --block's; default {default}; with --longest {','.join(LONGEST)}"


def chosen(options: argparse.Namespace) -> dict[str, Way]:
    """Name -> way, in the order in which they are run."""
    further = {}
    for text in options.block:
        name, _, block = text.partition("=")
        try:
            value = json.loads(block)
        except json.JSONDecodeError as error:
            raise ValueError(f"--block is NAME=JSON, got {text!r}: {error}") from None
        if not name or name in WAYS or not isinstance(value, dict):
            raise ValueError(f"--block is NAME=JSON, a new name and an object, got {text!r}")
        try:
            parse_config(value)
        except ValueError as error:
            raise ValueError(f"--block {name}: {error}") from None
        further[name] = ours(value)
    known = {**WAYS, **further}
    default = [*(LONGEST if options.longest else default_ways(options.stage)), *further]
    names = options.ways.split(",") if options.ways else default
    for name in names:
        if name not in known:
            raise ValueError(f"there is no way {name!r}; there are {', '.join(known)}")
    return {name: known[name] for name in names}


def _numbers(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = parsed(arguments)
    if options.plot:
        reason = draw(options.plot, options.name)
        if reason is not None:
            raise SystemExit(f"end_to_end: {reason}")
        return 0
    # ended from outside, it ends its ranks as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.out.mkdir(parents=True, exist_ok=True)
    if options.longest:
        results = Results(options.out / f"{options.name}_longest", longest_page)
    else:
        results = StepResults(options.out / options.name, steps_page, shown)
    packages = (*PACKAGES, "peft") if options.lora else PACKAGES
    head = header("end_to_end.py", options.gpus, [without_folders(a) for a in arguments], packages)
    head["job"] = job_text(options)
    if options.resume:
        try:
            results.take_up(head)
        except ValueError as error:
            raise SystemExit(f"end_to_end: {error}") from None
        results.header.pop(LEFT_OUT, None)
    else:
        results.header = head
    launcher = Launcher(options, results.header)
    if options.longest:
        look_for_longest(options, options.ways, launcher, results)
    else:
        compare(options, options.ways, launcher, results)
        reason = draw(options.out, options.name)
        if reason is not None:
            print(f"no {options.name}.png: {reason}")
    print(results.text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
