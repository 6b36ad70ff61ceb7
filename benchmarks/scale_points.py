"""The measured points that scale.py fits and checks: each with the model's quantities for the same case.

Results of zero3_head.py (two and four ranks) and of earlier runs on four H200 (results/h200x4/baselines.json), and of
end_to_end.py wherever such results lie: a step, its peak, and its attention by the timeline; of searches for the
longest sequence the peaks. A row that is not modelled is kept with its reason.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks.head_rows import merged
from benchmarks.scale_model import (
    CHUNK_MB,
    KEEP_MB,
    LLAMA_8B,
    MIB,
    SLAB_MB,
    WAYS,
    Job,
    Loss,
    Machine,
    Shape,
    Way,
    Work,
    attention_seconds,
    kernels_seconds,
    liger_loss,
    peak_bytes,
    sharded_loss,
    states_bytes,
    step_seconds,
    stock_loss,
    whole_head,
    whole_loss,
)
from ds_fused.engine.zero3.figures import Figures, HeadCosts, chosen, of_stationary, of_stream, sharded
from ds_fused.engine.zero3.shards import Shards
from ds_fused.ops.common._tiles import KEPT_SLABS, side
from ds_fused.ops.vocab.stationary import block_bytes

RESULTS = Path(__file__).parent / "results"
ALL_MB = 2**30
# that a name of zero3_head.py's ways may have behind its first word
HEAD_OPTIONS = {"keep_mb", "slab_mb", "chunk_mb", "chunk_mem_const"}
# since then "gather" makes its gradients in the forward; before, it kept what fits keep_mb
GATHER_KEPT_BEFORE = "2026-11-26"
# since then slabs and blocks are cut otherwise: the memory that these took before is not the model's, nor is that of a
# step in which "fit" kept one layer of 16 less beside such a head
CUT_BEFORE = {"stream": "2026-11-26 12:00"} | dict.fromkeys(("stationary", "auto"), "2026-11-26 14:00")
# blocks of tokens were even parts before, and not whole waves
EVEN_BLOCKS_BEFORE = "2026-11-28 16:00"
# before, the default of slab_mb was another, and one slab alone was left for the backward
SLAB_MB_WAS, SLABS_KEPT_SINCE = 128, "2026-11-26 19:00"
KEPT_LESS = {("h100x2/end_to_end", "8b-16layers, 4 x 8192", "ours-fast")}
# (file, shape, way): why a row has no place in the check
OUTDATED = {
    ("h100x2/zero3_head_rivals", "8192x5376x262144", way): "its slabs of 11916 rows are cut in whole tiles since"
    for way in ("stream", "stream slab_mb=64", "stream keep all")
}
# whose steps have been measured: cards that ran at rates of their own, and under ZeRO-3 hosts of their own
STEPS_ON = ("1 x H100", "2 x H100", "4 x H100", "4 x H200")
HOSTS = STEPS_ON[1:]
# (file, way): as what it is modelled, since its name means something else now
THEN = {
    ("h100x2/end_to_end_small", "ours-small"): "ours-small-device",
    ("h100x4/end_to_end", "ours-small"): "ours-small-device",
    ("h100x4/end_to_end", "ours-small-offload"): "ours-small-tiled",
    ("h100x4/end_to_end_longest", "inputs"): "ours-small-inputs",
    ("h200x4/end_to_end", "ours-small"): "ours-small-tiled",
    ("h200x4/end_to_end", "ours-small-whole"): "ours-small",
}
# before, ways of ours had weights come by way of a buffer, and "small" gathered them module by module
IN_PLACE_SINCE, WHOLE_SINCE = "2026-11-27 17:45", "2026-11-27 23:00"
# measured when "fit" knew of longer batches what they need in proportion to its first steps
BY_FIRST_STEPS = ("h100x2/end_to_end",)
# what is measured since then checks the fit, and is no part of it
FITTED_UNTIL = "2026-11-28"
NO_MODEL = "a way that is in no prediction"
# host time before the first product of a head that is measured alone, from idle (parameters of scale_fit.py): in
# general; of slabs that look for the words of all of them at once, in 18 kernels for 166; where hosts agree on their
# tokens first
START, START_SLABS, START_AGREED = STARTS = ("start", "start, slabs", "start, agreed")
WORDS_AT_ONCE_SINCE = "2026-11-26 12:00"


@dataclass(frozen=True)
class Setting:
    """What is fitted: a machine of each device, and what stands around a head that is measured alone in an engine."""

    machines: dict[str, Machine]  # by names as in STEPS_ON; by "H100" and "H200" for heads that are measured alone
    starts: dict[str, float]  # seconds, by STARTS


@dataclass(frozen=True)
class Point:
    file: str
    case: str
    way: str
    unit: str  # "ms" or "MiB"
    measured: float
    model: Callable[[Setting], float]
    base: float = 0.0  # of the measured number, what is there whatever the way is
    job: Job | None = None  # of a whole step
    machines: tuple[float, ...] = ()  # what was measured in each, where `measured` is the median of several
    later: bool = False  # no part of the fit: it was made before this was measured


@dataclass(frozen=True)
class Skipped:
    file: str
    case: str
    way: str
    reason: str


def points() -> tuple[list[Point], list[Skipped]]:
    found = [*heads(), *probes(), *baselines(), *ends(), *searches()]
    skipped = [p for p in found if isinstance(p, Skipped)]
    return over_machines(p for p in found if isinstance(p, Point)), skipped


def over_machines(found: Iterable[Point]) -> list[Point]:
    """A job that was measured on several machines with the same cards is one point, the median, as rounds of a run are.

    What else their hosts do shows: where the host is waited for, two machines were up to 18 % apart.
    """
    same: dict[object, list[Point]] = {}
    for point in found:
        cards = point.file.partition("/")[0]
        key = (cards, point.job, point.way, point.unit, point.later) if point.job else id(point)
        same.setdefault(key, []).append(point)
    return [
        replace(first, measured=statistics.median(machines), machines=machines) if more else first
        for first, *more in same.values()
        for machines in [tuple(point.measured for point in (first, *more))]
    ]


def heads(results: Path = RESULTS) -> Iterator[Point | Skipped]:
    """Rows of zero3_head.py, wherever they lie."""
    for path in sorted(results.glob("*/zero3_head*.json")):
        measured, name = json.loads(path.read_text()), f"{path.parent.name}/{path.stem}"
        device, ranks = _card(measured["header"]), int(measured["header"]["ranks"])
        keeps = measured["header"]["date"] < GATHER_KEPT_BEFORE
        one_slab = measured["header"]["date"] < SLABS_KEPT_SINCE
        even_blocks = measured["header"]["date"] < EVEN_BLOCKS_BEFORE
        for row in merged(measured["rows"]):
            shape, way = row["shape"], row["way"]
            way_then = "gather keep" if keeps and way == "gather" else way
            found = head_loss(way_then, shape, ranks, device, one_slab, even_blocks)
            reason = OUTDATED.get((name, shape, way)) or _no_parameters(measured["header"], device)
            reason = reason or (NO_MODEL if found is None else None)
            if row["status"] != "ok" or reason:
                yield Skipped(name, shape, way, reason or row["status"])
                continue
            loss, in_engine = found
            start = start_of(way, measured["header"]["date"]) if in_engine else None
            # from idle, as all were before
            ms = row.get("idle_ms", row["ms"])
            yield Point(name, shape, way, "ms", ms, _time_of_head(loss, device, ranks, start))
            cut_since = measured["header"]["date"] < CUT_BEFORE.get(way.partition(" ")[0], "")
            if row.get("extra_mib") is not None and not cut_since:
                yield Point(name, shape, way, "MiB", row["extra_mib"], _memory_of_head(loss))


LossOf = Callable[[Setting], Loss]


def head_loss(
    way: str, shape: str, ranks: int, device: str | None, one_slab: bool = False, even_blocks: bool = False
) -> tuple[LossOf, bool] | None:
    """Of a way of zero3_head.py, and whether it runs in an engine; None where there is no model of it."""
    tokens, hidden, vocab = sizes = _sizes(shape)
    name, _, rest = way.partition(" ")
    options = dict(word.split("=") for word in rest.split() if "=" in word)
    words = " ".join(word for word in rest.split() if "=" not in word)
    if words not in ("", "keep", "keep all", "GEMMs") or options.keys() - HEAD_OPTIONS:
        return None
    keep_mb = ALL_MB if rest == "keep all" else float(options.get("keep_mb", KEEP_MB if rest == "keep" else 0))
    whole = whole_head(vocab, hidden, ranks)
    if way == "bare GEMMs":
        return _fixed(Loss(Work(gemm=6 * tokens * hidden * vocab), 0.0)), False
    if name == "stock":
        return _fixed(_with(stock_loss(*sizes), whole)), True
    if name == "liger":
        return _fixed(_with(liger_loss(*sizes, int(options.get("chunk_mem_const", 1))), whole)), True
    if name in ("gather", "replicated"):
        loss = whole_loss(*sizes, keep_mb=keep_mb, grad_in_forward=way == "gather")
        if name == "gather":
            return _fixed(_with(loss, whole)), True
        # the weight is among what was there before
        return _fixed(Loss(loss.work, loss.held - 2 * vocab * hidden)), False
    slab_mb = int(options.get("slab_mb", SLAB_MB_WAS if one_slab else SLAB_MB))
    head = HeadCosts.cut(Shards(vocab, hidden, ranks), slab_mb * MIB)
    chunk, keep = int(options.get("chunk_mb", CHUNK_MB)) * MIB, int(keep_mb * MIB)
    if name == "stream":
        figures = of_stream(head, tokens, chunk, keep)
        return _fixed(sharded_loss(_with_one_slab(figures, head) if one_slab else figures)), True
    block = _even_block(head, tokens, chunk) if even_blocks else None
    if name == "stationary":
        return _fixed(sharded_loss(of_stationary(head, tokens, chunk, block))), True
    if name == "auto":
        # all were measured when it had these two
        both = sharded(head, tokens, chunk, KEEP_MB * MIB, block)
        return lambda s: sharded_loss(chosen(both, float("inf"), s.machines[device].rates(ranks))), True
    return None


def _even_block(head: HeadCosts, tokens: int, chunk_bytes: int) -> int:
    shards = head.shards
    return side(tokens, chunk_bytes // block_bytes(shards.n_vocab, shards.hidden, shards.ranks, 2), shards.ranks)


def _with_one_slab(figures: Figures, head: HeadCosts) -> Figures:
    """Where the backward gathers all slabs but the last one again."""
    more, ranks = min(KEPT_SLABS, head.n_slabs) - 1, head.shards.ranks
    wire = more * head.slab_rows * head.shards.hidden * head.itemsize * (ranks - 1) // ranks
    return replace(figures, wire=figures.wire + wire, calls=figures.calls + more)


def _fixed(loss: Loss) -> LossOf:
    return lambda setting: loss


def _with(loss: Loss, work: Work) -> Loss:
    return Loss(loss.work + work, loss.held)


def _sizes(shape: str) -> tuple[int, int, int]:
    """M, H, V"""
    tokens, hidden, vocab = map(int, shape.split("x"))
    return tokens, hidden, vocab


def _card(header: dict[str, str]) -> str | None:
    """The name of its parameters; None where there are none."""
    found = re.search(r"H[12]00", header["device"])
    return found and found.group()


def _cards(header: dict[str, str]) -> str | None:
    """Of steps."""
    name = f"{header['ranks']} x {_card(header)}"
    return name if name in STEPS_ON else None


def _no_parameters(header: dict[str, str], device: str | None) -> str | None:
    return None if device else f"no parameters for {header['device']}"


def start_of(way: str, date: str) -> str:
    """Which of STARTS a way of zero3_head.py had then."""
    mode = way.partition(" ")[0]
    if mode in ("stationary", "auto"):
        return START_AGREED
    return START_SLABS if mode == "stream" and date >= WORDS_AT_ONCE_SINCE else START


def _time_of_head(loss: LossOf, device: str, ranks: int, start: str | None = None) -> Callable[[Setting], float]:
    def ms(setting: Setting) -> float:
        seconds = setting.machines[device].device(loss(setting).work, ranks, hidden=False)
        return 1e3 * (seconds + (0.0 if start is None else setting.starts[start]))

    return ms


def _memory_of_head(loss: LossOf) -> Callable[[Setting], float]:
    return lambda setting: loss(setting).held / MIB


def probes(folder: Path = RESULTS / "h200x4") -> Iterator[Point]:
    """A program of its own: the modes' sequence of products and collectives, in slabs and blocks of given sizes."""
    measured = json.loads((folder / "baselines.json").read_text())
    device, ranks = _card(measured["header"]), int(measured["header"]["ranks"])
    for row in measured["heads"]["rows"]:
        tokens, hidden, vocab = _sizes(row["shape"])
        shards = Shards(vocab, hidden, ranks)
        if row["way"] == "bare GEMMs":
            way, loss = "bare GEMMs", Loss(Work(gemm=6 * tokens * hidden * vocab), 0.0)
        elif row["way"] == "stream":
            way = f"stream, {row['slabs']} slabs"
            head = HeadCosts(shards, (vocab // row["slabs"],) * row["slabs"])
            loss = sharded_loss(_with_one_slab(of_stream(head, tokens, 2 * tokens * vocab, 0), head))
            # its peak has the outputs, dx in fp32 and the rank's part of the gradient; parts of it have no other room
            received = 2 * head.slab_rows * hidden // ranks
            loss = Loss(loss.work, loss.held + 2 * tokens * hidden + 2 * shards.size - received)
        else:
            way = f"stationary, {row['block']} tokens"
            # so large that a block has just these tokens
            chunk = row["block"] * block_bytes(vocab, hidden, ranks, 2)
            loss = sharded_loss(of_stationary(HeadCosts(shards, (vocab,)), tokens, chunk))
            # its own buffers: the gradient of the rank's rows in fp32, a block's logits, x and dx of two blocks in bf16
            # each (the conditions call it double-buffered), and dx of all tokens
            blocks = 2 * row["block"] * (vocab + 4 * ranks * hidden)
            loss = Loss(loss.work, 4 * shards.size + blocks + 2 * tokens * hidden)
        yield Point("probe", row["shape"], way, "ms", row["ms"], _time_of_head(_fixed(loss), device, ranks))
        if "peak_mib" in row:
            yield Point("probe", row["shape"], way, "MiB", row["peak_mib"], _memory_of_head(_fixed(loss)))


def baselines(folder: Path = RESULTS / "h200x4") -> Iterator[Point]:
    measured = json.loads((folder / "baselines.json").read_text())
    device, ranks = _cards(measured["header"]), int(measured["header"]["ranks"])
    for row in measured["steps"]:
        case = f"{LLAMA_8B.name}, {row['micro_batch']} x 8192"
        if row["way"] == "kernels":
            job = Job(WAYS["liger"], LLAMA_8B, ranks, row["micro_batch"])
            seconds = partial(kernels_seconds, job)
            yield Point("baselines", case, "products and attention", "ms", row["ms"][0], _time_of(seconds, device))
            continue
        job = Job(WAYS[row["way"]], LLAMA_8B, ranks, row["micro_batch"])
        yield from _steps("baselines", case, job, device, statistics.mean(row["ms"]), _mib(row.get("peak_gib")))


def _way(name: str, date: str) -> Way:
    """As it was then."""
    way = WAYS["ours-small-modules" if name == "ours-small" and date < WHOLE_SINCE else name]
    return replace(way, buffered=True) if way.in_place and date < IN_PLACE_SINCE else way


def _mib(gib: float | None) -> float | None:
    return None if gib is None else 1024 * gib


def _time_of(seconds: Callable[[Machine], float], device: str) -> Callable[[Setting], float]:
    return lambda setting: 1e3 * seconds(setting.machines[device])


def _steps(
    file: str, case: str, job: Job, device: str, ms: float, peak_mib: float | None, later: bool = False
) -> Iterator[Point]:
    yield Point(file, case, job.way.name, "ms", ms, _time_of(partial(step_seconds, job), device), job=job, later=later)
    if peak_mib is not None:
        yield replace(_peak(file, case, job, device, peak_mib), later=later)


def _peak(file: str, case: str, job: Job, device: str, peak_mib: float) -> Point:
    def mib(setting: Setting) -> float:
        return peak_bytes(job, setting.machines[device]) / MIB

    return Point(file, case, job.way.name, "MiB", peak_mib, mib, states_bytes(job) / MIB, job)


def _whole_steps(results: Path, searched: bool) -> Iterator[tuple[str, dict, list[dict]]]:
    """Name, header and rows of what end_to_end.py has written, under any name."""
    for path in sorted(results.glob("*/*.json")):
        measured = json.loads(path.read_text())
        header = measured.get("header", {})
        command = header.get("command", "")
        if "end_to_end.py" in command and ("--longest" in command) == searched:
            yield f"{path.parent.name}/{path.stem}", header, measured["rows"]


def searches(results: Path = RESULTS) -> Iterator[Point | Skipped]:
    """Peaks at the lengths that trained. No step came before one of these, so their times are no points."""
    for name, header, found in _whole_steps(results, searched=True):
        device = _cards(header)
        shape, stage, reason = job_of(header["job"])
        reason = reason or _no_parameters(header, device)
        for row in found:
            way = row["way"]
            modelled = THEN.get((name, way), way)
            there = [t for t in row["tries"] if t["status"] == "ok" and t["peak_mib"] is not None]
            why = reason or (NO_MODEL if modelled not in WAYS else None) or (None if there else "it did not run")
            case = header["job"].partition(" ")[0]
            if why:
                yield Skipped(name, case, way, why)
                continue
            # a length that fits trains again in each process
            for length in dict.fromkeys(t["length"] for t in there):
                peak = max(max(t["ranks"]["peak_mib"]) for t in there if t["length"] == length)
                checkpoints = "no gradient checkpointing" not in header["job"]
                job = Job(_way(modelled, header["date"]), shape, int(header["ranks"]), 1, length, stage, checkpoints)
                yield _peak(name, f"{case}, 1 x {length}", job, device, peak)


def ends(results: Path = RESULTS) -> Iterator[Point | Skipped]:
    """Rows of end_to_end.py, wherever they lie; of several rounds the median.

    Where a header says what ran beside, it was for the losses.
    """
    for name, header, found in _whole_steps(results, searched=False):
        device = _cards(header)
        rounds: dict[tuple[str, int, int], list[dict]] = {}
        for row in found:
            rounds.setdefault((row["way"], row["micro_batch"], row["length"]), []).append(row)
        for (way, batch, length), rows in rounds.items():
            modelled = THEN.get((name, way), way)
            shape, stage, reason = job_of(header["job"])
            reason = reason or _no_parameters(header, device) or header.get("beside")
            case = f"{header['job'].partition(' ')[0]}, {batch} x {length}"
            rows = [row for row in rows if row["status"] == "ok"]
            if not rows:
                reason = reason or "it did not run"
            elif modelled not in WAYS:
                reason = reason or NO_MODEL
            if reason:
                yield Skipped(name, case, way, reason)
                continue
            checkpoints = "no gradient checkpointing" not in header["job"]
            # a process goes through the sizes, smallest first
            first = min(size for other, size, _ in rounds if other == way) if name in BY_FIRST_STEPS else None
            # rows of a later run have its date
            date = rows[0].get("date", header["date"])
            job = Job(_way(modelled, date), shape, int(header["ranks"]), batch, length, stage, checkpoints, first)
            ms = statistics.median(max(row["ranks"]["ms"]) for row in rows)
            peaks = [max(row["ranks"]["peak_mib"]) for row in rows if row["peak_mib"] is not None]
            peak = None if (name, case, way) in KEPT_LESS else max(peaks, default=None)
            yield from _steps(name, case, job, device, ms, peak, date >= FITTED_UNTIL)
            timelines = [row["parts_ms"]["attention"] for row in rows if row.get("parts_ms")]
            if timelines:
                # a step alone does not tell its attention from its products
                seconds = partial(attention_seconds, job)
                ms = statistics.median(timelines)
                yield Point(name, case, f"{job.way.name}: attention", "ms", ms, _time_of(seconds, device), job=job)


def job_of(text: str) -> tuple[Shape | None, int, str | None]:
    """The shape and ZeRO stage of end_to_end.py's line about its job; or why there is no model of it."""
    name, _, rest = text.partition(" (")
    inside, _, more = rest.partition(")")
    sizes = dict(part.rsplit(" ", 1) for part in inside.split(", "))
    stage = int(re.search(r"ZeRO (\d)", more).group(1))
    for word, reason in (
        ("LoRA", "adapters alone are trained"),
        ("on the CPU", "the optimizer is on the CPU"),
        ("of each card", "of the card's memory a part"),
    ):
        if word in more:
            return None, stage, f"not modelled: {reason}"
    if "experts" in sizes:
        return None, stage, "not modelled: a mixture of experts"
    number = {key: int(value) for key, value in sizes.items() if value.isdecimal()}
    width = number["head_dim"]
    shape = Shape(
        name,
        number["layers"],
        number["hidden"],
        number["intermediate"],
        number["heads"] * width,
        number["kv_heads"] * width,
        number["vocab"],
        sizes.get("tied") == "True",
    )
    return shape, stage, None
