"""A training step on paper: a small model, fitted to measured points, checked against each, extended to 1024 GPUs.

    python benchmarks/scale.py --out benchmarks/results/scale

Needs no GPU. Writes scale.md (parameters, the check of every measured point, predictions, and from which number of
tokens on the head's mode "stream" is faster than "stationary"), scale.csv and (with matplotlib) scale.png and
scale_crossover.png. New results of end_to_end.py under benchmarks/results, on as many cards of a kind as there
are parameters for, are found and fitted by themselves.

The model is in scale_model.py, the measured points in scale_points.py, the fit in scale_fit.py.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

# run as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.page import out_folder
from benchmarks.plot_scale import draw_crossover, draw_scaling
from benchmarks.scale_fit import PARAMETERS, ROOM_GIB, Fit, fit
from benchmarks.scale_model import (
    ADAM,
    CHUNK_MB,
    GPUS_OF_NODE,
    HOP,
    KEEP_MB,
    LAUNCH,
    LLAMA_8B,
    LLAMA_70B,
    MIB,
    NETWORK_HOP,
    NVLINK,
    SLAB_MB,
    WAYS,
    Job,
    Machine,
    head_figures,
    host_seconds,
    peak_bytes,
    step_seconds,
)
from benchmarks.scale_points import Point, Skipped, points
from ds_fused.engine.zero3.figures import MOST_TOKENS, Figures, HeadCosts, of_stream, sharded, turning_point
from ds_fused.engine.zero3.shards import Shards

ALLOWED = 0.10
RANKS = (8, 16, 64, 256, 1024)
MICRO_BATCHES = (1, 2, 4)
PREDICTED = ("hf", "liger", "ours", "ours-fast", "ours-small")
# of a step: it is called bound by the host where the device waits for it longer
HOST_SHARE = 0.05
# of the predictions: cards whose steps were measured at this size
CARD, MEASURED_ON = "H200", "4 x H200"
# bytes a second of each GPU's network card: 100, 200, 400 and 800 Gbit/s
NETWORKS = (12.5e9, 25e9, 50e9, 100e9)
# V, H: Llama-3-8B, Llama-3-70B, Gemma-3-27B
HEADS = ((128256, 4096), (128256, 8192), (262144, 5376))
SLABS_MB = (64, 128, 256, 512)
# of the map
MAP_RANKS = tuple(2**power for power in range(3, 11))
TOKENS = tuple(2**power for power in range(7, 16))


@dataclass(frozen=True)
class Prediction:
    job: Job
    fast: float  # tokens a second and GPU where what the network takes longer is hidden
    slow: float  # and where it is not
    peak_gib: float
    host_bound: bool
    mode: str  # of our head, or ""


@dataclass(frozen=True)
class Turn:
    vocab: int
    hidden: int
    ranks: int
    network: float
    tokens: int  # up to so many of a rank stationary is better than stream


def predictions(machine: Machine) -> Iterator[Prediction]:
    for shape in (LLAMA_8B, LLAMA_70B):
        for batch in MICRO_BATCHES:
            for way in PREDICTED:
                for ranks in RANKS:
                    yield prediction(Job(WAYS[way], shape, ranks, batch), machine)


def prediction(job: Job, machine: Machine) -> Prediction:
    hidden, exposed = (step_seconds(job, machine, hidden) for hidden in (True, False))
    host_bound = host_seconds(job, machine) > HOST_SHARE * exposed
    mode = head_figures(job, machine).mode if job.way.loss == "ours" else ""
    return Prediction(
        job, job.tokens / hidden, job.tokens / exposed, peak_bytes(job, machine) / 2**30, host_bound, mode
    )


def turns(machine: Machine) -> Iterator[Turn]:
    for vocab, hidden in HEADS:
        for ranks in RANKS:
            # within a node there is no network
            for network in NETWORKS if ranks > GPUS_OF_NODE else NETWORKS[:1]:
                rates = replace(machine, network=network).rates(ranks)
                both = partial(ways_of, head_of(vocab, hidden, ranks))
                yield Turn(vocab, hidden, ranks, network, turning_point(both, rates))


def head_of(vocab: int, hidden: int, ranks: int) -> HeadCosts:
    return HeadCosts.cut(Shards(vocab, hidden, ranks), SLAB_MB * MIB)


def ways_of(head: HeadCosts, tokens: int) -> list[Figures]:
    return sharded(head, tokens, CHUNK_MB * MIB, KEEP_MB * MIB)


def ratios(machine: Machine, vocab: int, hidden: int, network: float) -> list[list[float]]:
    """Of stationary's time to stream's, [MAP_RANKS][TOKENS]."""
    machine = replace(machine, network=network)
    found = []
    for ranks in MAP_RANKS:
        head, rates = head_of(vocab, hidden, ranks), machine.rates(ranks)
        pairs = (ways_of(head, tokens) for tokens in TOKENS)
        found.append([stationary.seconds(rates) / stream.seconds(rates) for stream, stationary in pairs])
    return found


# the page


def error(point: Point, fitted: Fit) -> float:
    return point.model(fitted.setting) / point.measured - 1


def table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [names, ["---"] * len(names), *lines]
    return [f"| {' | '.join(cells)} |" for cells in rows]


def page(found: Sequence[Point], skipped: Sequence[Skipped], fitted: Fit) -> str:
    machine = fitted.setting.machines[MEASURED_ON]
    lines = [
        "# Training steps on paper",
        "",
        "By `python benchmarks/scale.py --out benchmarks/results/scale`. What a step is made of is in scale_model.py.",
        "",
        *parameters(found, fitted),
        *check(found, skipped, fitted),
        *faster(found, fitted),
        *predicted(machine),
        *crossover(machine),
        *slabs(machine),
    ]
    return "\n".join(lines) + "\n"


def parameters(found: Sequence[Point], fitted: Fit) -> list[str]:
    later = sum(point.unit == "ms" and point.later for point in found)
    rows = [
        (p.name, f"{value:.4g}", p.unit, f"{100 * e:.1f} %" if e < np.inf else "not determined", p.meaning)
        for p, value, e in zip(PARAMETERS, fitted.values, fitted.errors, strict=True)
    ]
    return [
        "## Parameters",
        "",
        f"{len(PARAMETERS)} parameters, fitted to {len(fitted.points)} measured times by least squares of relative "
        "errors. Memory has none: it is a count of buffers. What is counted, in time and in memory, was found with the "
        "same measurements at hand, so the errors below are of a description; the predictions, of more GPUs, have no "
        f"such check. But for {later} times that were measured since (later): they were predicted.",
        "",
        *table(("parameter", "fitted", "unit", "standard error", "meaning"), rows),
        "",
        "Assumed, not fitted: the network of the predictions is 50 GB/s for each GPU where nothing else is said, "
        f"{GPUS_OF_NODE} GPUs a node, {NVLINK / 1e9:.0f} GB/s of NVLink; a hop of a ring takes {1e6 * HOP:.1f} us "
        f"within a node and {1e6 * NETWORK_HOP:.1f} us between two (NCCL's own model, protocol LL128); a launch takes "
        f"the host {1e6 * LAUNCH:.0f} us; PyTorch's fused AdamW takes {1e12 * ADAM:.3g} ps a parameter, as in the "
        "timelines of h100x2/end_to_end. No measured point has a second node. The three machines had hosts of their "
        "own, so a hook is a parameter of each; where one is not determined, no step waits for it, and it is that or "
        "less. So are products and attention: products are slower in a step than in a head alone, and neither is as "
        "fast on all cards, as the timelines show too. What a leaf module takes the host is of the one step that waits "
        "for them (ours-fast in h100x4/curves_8b), and one of the later points checks it (ours-small there). From the "
        "timelines is the time of "
        "attention (rows so named); a step alone would not tell it from products. Of wait, they show 13 to 22 ms in "
        "which nothing runs, at micro batch 4, beside 9 to 15 ms of transfers alone (h100x2); what the rest of it is, "
        "is not known.",
        "",
    ]


def check(found: Sequence[Point], skipped: Sequence[Skipped], fitted: Fit) -> list[str]:
    unseen = dict(zip(map(id, fitted.points), zip(fitted.left_out, fitted.case_left_out, strict=True), strict=True))
    # of these the fit itself is
    unseen |= {id(p): (error(p, fitted),) * 2 for p in found if p.unit == "ms" and p.later}
    summary = []
    for unit, what in (("ms", "time"), ("MiB", "memory")):
        for file in dict.fromkeys(point.file for point in found):
            some = [point for point in found if (point.file, point.unit) == (file, unit)]
            if some:
                summary.append(_summary(f"{what}, {file}", some, fitted, unseen))
        summary.append(_summary(f"all {what}", [point for point in found if point.unit == unit], fitted, unseen))
    lines = [
        "## Check against every measured point",
        "",
        "Files lie in benchmarks/results, in folders named by cards and their number: zero3_head (head and loss "
        "alone), end_to_end and curves (whole steps); probe (heads) and baselines (whole steps) are "
        "h200x4/baselines.json. Point out: the error of a fit that did not see the point. Case out: of one that did "
        "not see these sizes at all, in any way or run. Beyond states: the error of what is held beside weights, "
        "gradients and optimizer. A job that was measured on several machines is one point, the median of them; each "
        "is in brackets behind it, and the file is the first one's.",
        "",
        *table(("points", "number", "rms error", "largest", "point out, rms", "case out, rms", "beyond 10 %"), summary),
        "",
    ]
    beyond = [point for point in found if abs(error(point, fitted)) > ALLOWED]
    if beyond:
        lines += ["Not within 10 %, and nothing was done to hide it:", ""]
        lines += [f"- {p.file}: {p.way}, {p.case}, {p.unit}: {100 * error(p, fitted):+.1f} %" for p in beyond] + [""]
    rows = []
    for point in found:
        model = point.model(fitted.setting)
        form = ".1f" if point.unit == "ms" else ".0f"
        out = [f"{100 * e:+.1f} %" for e in unseen.get(id(point), ())] or ["-", "-"]
        if point.base:
            out = [f"{100 * ((model - point.base) / (point.measured - point.base) - 1):+.1f} % beyond states", "-"]
        measured = format(point.measured, form)
        if point.machines:
            measured += f" ({', '.join(format(machine, form) for machine in point.machines)})"
        numbers = (measured, format(model, form), f"{100 * (model / point.measured - 1):+.1f} %")
        file = f"{point.file}, later" if point.later else point.file
        rows.append((file, point.case, point.way, point.unit, *numbers, *out))
    lines += table(("file", "case", "way", "unit", "measured", "model", "error", "point out", "case out"), rows)
    lines += ["", "Rows without a model:", ""]
    lines += [f"- {row.file}: {row.way}, {row.case}: {row.reason}" for row in skipped]
    return [*lines, ""]


def _summary(name: str, some: Sequence[Point], fitted: Fit, unseen: dict[int, tuple[float, float]]) -> tuple[str, ...]:
    errors = [error(point, fitted) for point in some]
    out = list(zip(*(unseen[id(point)] for point in some if id(point) in unseen), strict=True))
    cells = [_rms(errors), f"{100 * max(map(abs, errors)):.1f} %", *(map(_rms, out) if out else ("-", "-"))]
    return name, str(len(some)), *cells, str(sum(abs(e) > ALLOWED for e in errors))


def _rms(errors: Sequence[float]) -> str:
    return f"{100 * (sum(e * e for e in errors) / len(errors)) ** 0.5:.1f} %"


def faster(found: Sequence[Point], fitted: Fit) -> list[str]:
    """Stream against stationary, measured and by the model, wherever both were measured."""
    rows = []
    times = {(p.file, p.case, p.way): p for p in found if p.unit == "ms"}
    for (file, case, way), stationary in times.items():
        if way != "stationary":
            continue
        others = [times[key] for key in ((file, case, "stream keep all"), (file, case, "stream")) if key in times]
        for stream in others:
            measured = stationary.measured / stream.measured
            model = stationary.model(fitted.setting) / stream.model(fitted.setting)
            agree = "yes" if (measured < 1) == (model < 1) else "no"
            rows.append((file, case, stream.way, f"{measured:.2f}", f"{model:.2f}", agree))
    return [
        "## Stationary over stream, measured and modelled",
        "",
        'Time of mode "stationary" divided by that of "stream"; 8 MHV FLOPs, and 6 where all logits are kept.',
        "",
        *table(("file", "case", "against", "measured", "model", "same order"), rows),
        "",
    ]


def predicted(machine: Machine) -> list[str]:
    lines = [
        "## Predictions",
        "",
        f"{CARD}, ZeRO-3, gradient checkpointing, sequences of 8192 tokens, {GPUS_OF_NODE} GPUs a node, 50 GB/s of "
        "network for each GPU. Tokens a second and GPU: where all that the network takes longer than NVLink is hidden "
        "behind products, and where nothing of it is; one number where they are equal. In brackets the peak in GiB. "
        "*host*: for more than a twentieth of the step the device waits for it. -: more than "
        f"{ROOM_GIB[CARD]} GiB. For ours the mode of the head. ours: the flag alone; -fast and -small: that profile, "
        "of which -fast keeps what fits of each layer's forward and -small has layers' inputs and attention on the "
        "host, whose memory and link are no matter here.",
        "",
    ]
    found = list(predictions(machine))
    for shape in (LLAMA_8B, LLAMA_70B):
        for batch in MICRO_BATCHES:
            rows = []
            for way in PREDICTED:
                some = [p for p in found if (p.job.shape, p.job.micro_batch, p.job.way.name) == (shape, batch, way)]
                rows.append((way, *map(_cell, some)))
            lines += [f"### {shape.name}, {batch} x 8192 tokens a GPU", ""]
            lines += [*table(("way", *(f"{ranks} GPUs" for ranks in RANKS)), rows), ""]
    return lines


def _cell(p: Prediction) -> str:
    if p.peak_gib > ROOM_GIB[CARD]:
        return f"- ({p.peak_gib:.0f})"
    fast, slow = f"{p.fast:,.0f}", f"{p.slow:,.0f}"
    rate = fast if fast == slow else f"{fast} to {slow}"
    words = [word for word in (p.mode, "*host*" if p.host_bound else "") if word]
    return f"{rate} ({p.peak_gib:.1f}){' ' + ', '.join(words) if words else ''}"


def crossover(machine: Machine) -> list[str]:
    found = list(turns(machine))
    lines = [
        "## From where on the weight should travel instead of the tokens",
        "",
        'Up to so many tokens a rank mode "auto" prefers "stationary" to "stream", by the same formulas '
        "(ds_fused/engine/zero3/figures.py) and where memory is no matter; "
        f"chunk_mb={CHUNK_MB}, keep_mb={KEEP_MB}, slab_mb={SLAB_MB}. In brackets: these "
        "tokens of all ranks over V. Columns: bytes a second of each GPU's network card.",
        "",
    ]
    names = ("GPUs", *(f"{network / 1e9:g} GB/s" for network in NETWORKS))
    for vocab, hidden in HEADS:
        rows = []
        for ranks in RANKS:
            some = [turn for turn in found if (turn.vocab, turn.hidden, turn.ranks) == (vocab, hidden, ranks)]
            cells = [_turn(turn) for turn in some]
            rows.append((str(ranks), *(cells if len(cells) > 1 else cells * len(NETWORKS))))
        lines += [f"### V = {vocab}, H = {hidden}", "", *table(names, rows), ""]
    return lines


def slabs(machine: Machine) -> list[str]:
    rows = []
    for ranks in RANKS:
        cells = []
        for slab_mb in SLABS_MB:
            head = HeadCosts.cut(Shards(*HEADS[0], ranks), slab_mb * MIB)
            stream = of_stream(head, 8192, CHUNK_MB * MIB, KEEP_MB * MIB)
            cells.append(f"{1e3 * stream.seconds(machine.rates(ranks)):.1f} ({stream.calls}, {stream.held / MIB:,.0f})")
        rows.append((str(ranks), *cells))
    vocab, hidden = HEADS[0]
    return [
        "## What larger slabs save",
        "",
        f'Mode "stream", V = {vocab}, H = {hidden}, 8192 tokens a rank, 50 GB/s: ms, and in brackets collectives and '
        "the MiB that are held.",
        "",
        *table(("GPUs", *(f"slab_mb={slab_mb}" for slab_mb in SLABS_MB)), rows),
        "",
    ]


def _turn(turn: Turn) -> str:
    if turn.tokens >= MOST_TOKENS:
        return "always stationary"
    return f"{turn.tokens:,} ({turn.tokens * turn.ranks / turn.vocab:.2f})"


def rows_of_csv(found: Sequence[Point], fitted: Fit) -> Iterator[dict[str, object]]:
    machine = fitted.setting.machines[MEASURED_ON]
    for point in found:
        model = point.model(fitted.setting)
        same = {"table": "check", "file": point.file, "case": point.case, "way": point.way, "unit": point.unit}
        yield {**same, "measured": f"{point.measured:.6g}", "model": f"{model:.6g}"}
    for p in predictions(machine):
        same = {"table": "prediction", "case": f"{p.job.shape.name}, {p.job.micro_batch} x {p.job.length}"}
        same |= {"way": p.job.way.name, "ranks": p.job.ranks}
        for unit, value in (("tokens/s/GPU hidden", p.fast), ("tokens/s/GPU exposed", p.slow), ("GiB", p.peak_gib)):
            yield {**same, "unit": unit, "model": f"{value:.6g}"}
    for turn in turns(machine):
        case = f"V {turn.vocab}, H {turn.hidden}, {turn.network / 1e9:g} GB/s"
        yield {"table": "crossover", "case": case, "ranks": turn.ranks, "unit": "tokens a rank", "model": turn.tokens}


COLUMNS = ("table", "file", "case", "way", "ranks", "unit", "measured", "model")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=out_folder, default=Path(), help="folder for the results")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    found, skipped = points()
    fitted = fit([point for point in found if point.unit == "ms" and not point.later])
    (options.out / "scale.md").write_text(page(found, skipped, fitted))
    with (options.out / "scale.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows_of_csv(found, fitted))
    machine = fitted.setting.machines[MEASURED_ON]
    curves = list(predictions(machine))
    maps = {
        (head, network): ratios(machine, *head, network) for head in (HEADS[0], HEADS[2]) for network in NETWORKS[::2]
    }
    for reason in (
        draw_scaling(options.out / "scale.png", curves, ROOM_GIB[CARD]),
        draw_crossover(options.out / "scale_crossover.png", maps, MAP_RANKS, TOKENS),
    ):
        if reason is not None:
            print(f"no picture: {reason}")
    for parameter, value in zip(PARAMETERS, fitted.values, strict=True):
        print(f"{parameter.name}: {value:.4g} {parameter.unit}")
    beyond = [point for point in found if abs(error(point, fitted)) > ALLOWED]
    print(f"{len(found)} points, {len(beyond)} not within {100 * ALLOWED:.0f} %: {options.out / 'scale.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
