"""What end_to_end.py says of its rows: pages of Markdown, and one CSV."""

from __future__ import annotations

import csv
import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.page import Header, Row, number, table
from benchmarks.results import OK
from benchmarks.step_timeline import PARTS

STOCK, LIGER = "hf", "liger"
# stock with other kernels for its attention: as far apart as right runs are
OTHER_STOCK = STOCK + "-"
EXACT = "fp32"
RATE = "matmul_tflop_s"
COLUMNS = (
    "way", "step ms", "all ranks and rounds", "tokens/s/GPU", "over hf", "over liger", "MFU", "peak GiB", "dynamic GiB",
    "of liger's", "states GiB", "reserved GiB", "loss apart", "grad norm apart", "note",
)  # fmt: skip
CSV = (
    "way", "round", "micro_batch", "length", "status", "ms", "first_ms", "tokens_s", "tflop_s", "peak_mib",
    "dynamic_mib", "states_mib", "reserved_mib", "first_loss", "last_loss",
)  # fmt: skip

CURVES = ("way", "round", "micro_batch", "length", "step", "loss", "grad_norm")

Point = tuple[int, int]


def points_of(rows: Iterable[Row]) -> list[Point]:
    return list(dict.fromkeys((row["micro_batch"], row["length"]) for row in rows))


def at(rows: Iterable[Row], point: Point, way: str | None = None) -> list[Row]:
    """The rows of one size, of one way or of all."""
    return [r for r in rows if (r["micro_batch"], r["length"]) == point and way in (None, r["way"])]


def finished(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["status"] == OK]


def middle(rows: Sequence[Row], key: str) -> float | None:
    """The median over rounds."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return statistics.median(values) if values else None


def apart(rows: Sequence[Row], stock: Sequence[Row]) -> tuple[float | None, float | None]:
    """Largest difference of a loss, and relative one of a gradient's norm, from the first round of stock.

    Of stock itself: what its other rounds differ by, which is what a run's own noise is.
    """
    others = [row for row in rows if stock and row is not stock[0]]
    pairs = [(row, stock[0]) for row in others]
    losses = [abs(a - b) for r, s in pairs for a, b in zip(r["losses"], s["losses"], strict=True)]
    norms = [abs(a / b - 1) for r, s in pairs for a, b in zip(r["grad_norms"], s["grad_norms"], strict=True)]
    return (max(losses), max(norms)) if losses else (None, None)


def _times(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}x" if value and other else "-"


def _gib(mib: float | None) -> str:
    return number(None if mib is None else mib / 1024, ".2f")


def steps_page(head: Header, rows: Sequence[Row]) -> str:
    """One table a size, fastest first; ways without an answer last, with their reason. Then where the time goes."""
    lines = ["# Whole training steps", "", *(f"- {key}: {value}" for key, value in head.items()), *MEANING]
    for point in points_of(rows):
        here = at(rows, point)
        ways = list(dict.fromkeys(row["way"] for row in here))
        times = {way: middle(finished(at(here, point, way)), "ms") for way in ways}
        ways.sort(key=lambda way: times[way] or float("inf"))
        stock, liger = (finished(at(here, point, way)) for way in (STOCK, LIGER))
        lines += ["", f"## micro batch {point[0]}, {point[1]} tokens", ""]
        lines += table(COLUMNS, [_line(way, at(here, point, way), stock, liger, head) for way in ways])
        done = {way: finished(at(here, point, way)) for way in ways}
        exact = done.pop(EXACT, [])
        lines += [*_spread(done, stock), *_from_exact(done, exact)]
        lines += _parts([at(here, point, way) for way in ways])
    first = [row for row in finished(rows) if row.get("first_ms")]
    if first:
        lines += ["", "The first step of a process, over a later one of the same size:", ""]
        lines += [f"- {row['way']}: {row['first_ms']:.0f} ms, {row['first_ms'] / row['ms']:.2f}x" for row in first]
    replaced = {row["way"]: row["replaced"] for row in finished(rows) if row.get("replaced")}
    if replaced:
        lines += ["", "Layers that ds_fused replaced:", ""]
        kinds = {way: ", ".join(f"{n} x {key}" for key, n in counts.items()) for way, counts in replaced.items()}
        lines += [f"- {way}: {text}" for way, text in kinds.items()]
    return "\n".join(lines) + "\n"


MEANING = (
    "- step: from a synchronised device to the end of forward, backward and optimizer. The median of the steps after "
    "the warm-up on rank 0, and of that over rounds; beside it the least and the largest of any rank's and round's.",
    "- MFU: FLOPs that the model needs (nothing that is computed again) over time and this card's own rate of a matrix "
    "product.",
    "- states: allocated between two steps, after the first of them (weights, fp32 copies, moments, kept gradients, "
    "DeepSpeed's buffers). dynamic: the peak of the measured steps less the states of the same run. All of rank 0.",
    "- over hf, over liger: tokens/s divided by theirs; of liger's: dynamic memory divided by its.",
    "- apart: the largest difference of any step from the first round of hf; of hf, what its other rounds differ by.",
    "- parts: one more step under the profiler. A moment belongs to the first of the columns that is at work.",
)


def _spread(done: dict[str, Sequence[Row]], stock: Sequence[Row]) -> list[str]:
    """Which ways are as near to stock as two runs of stock with different attentions are to one another."""
    runs = [row for way, rows in done.items() for row in rows if way == STOCK or way.startswith(OTHER_STOCK)]
    pairs = [apart([a], [b]) for a, b in itertools.combinations(runs, 2) if a["way"] != b["way"]]
    pairs = [both for both in pairs if None not in both]
    if not pairs or not stock:
        return []
    loss, norm = map(max, zip(*pairs, strict=True))
    n = len(pairs)
    far = f"{loss:.1e} (loss) and {norm:.1e} (gradient's norm)"
    of = "in the one pair there is" if n == 1 else f"in {n} pairs of runs"
    lines = ["", f"Stock with another attention is up to {far} from stock, {of}; the others:", ""]
    for way, rows in done.items():
        its_loss, its_norm = apart(rows, stock)
        if way != STOCK and not way.startswith(OTHER_STOCK) and its_loss is not None:
            within = "within that" if its_loss <= loss and its_norm <= norm else "**beyond that**"
            lines.append(f"- {way}: {its_loss:.1e} and {its_norm:.1e}, {within}")
    return lines


def _from_exact(done: dict[str, Sequence[Row]], exact: Sequence[Row]) -> list[str]:
    """How far every run in 16 bits is from the one in fp32, which no kernel's rounding is in."""
    if not exact:
        return []
    losses = exact[0]["losses"]
    lines = ["", "From the run in fp32, which began with the same weights, a loss is at most and on average apart:", ""]
    for way, rows in done.items():
        for row in rows:
            differences = [abs(a - b) for a, b in zip(row["losses"], losses, strict=True)]
            lines.append(f"- {way}: {max(differences):.1e}, {sum(differences) / len(differences):.1e}")
    return lines


def _line(way: str, rows: Sequence[Row], stock: Sequence[Row], liger: Sequence[Row], head: Header) -> list[str]:
    done = finished(rows)
    note = rows[0]["note"]
    bad = [row["status"] for row in rows if row["status"] != OK]
    if bad:
        note = f"**{bad[0]}** {note}" if not done else f"{note}; in another round **{bad[0]}**"
    if not done:
        return [way, *["-"] * (len(COLUMNS) - 2), note]
    ms = middle(done, "ms")
    every = [ms for row in done for ms in row["ranks"]["ms"]]
    share = None if RATE not in head else middle(done, "tflop_s") / float(head[RATE])
    loss, norm = apart(done, stock)
    return [
        way,
        f"{ms:.1f}",
        f"{min(every):.1f} to {max(every):.1f}",
        f"{middle(done, 'tokens_s'):.0f}",
        *(_times(middle(other, "ms"), ms) for other in (stock, liger)),
        number(share, ".0%"),
        *(_gib(middle(done, key)) for key in ("peak_mib", "dynamic_mib")),
        _times(middle(done, "dynamic_mib"), middle(liger, "dynamic_mib")),
        *(_gib(middle(done, key)) for key in ("states_mib", "reserved_mib")),
        number(loss, ".1e"),
        number(norm, ".1e"),
        note,
    ]


def _parts(ways: Sequence[Sequence[Row]]) -> list[str]:
    profiled = [next((r for r in rows if r.get("parts_ms")), None) for rows in ways]
    cells = []
    for row in (row for row in profiled if row is not None):
        parts = row["parts_ms"]
        if isinstance(parts, str):
            cells.append([row["way"], f"**{parts}**", *["-"] * len(PARTS)])
            continue
        cells.append([row["way"], f"{sum(parts.values()):.1f}", *(f"{parts[part]:.1f}" for part in PARTS)])
    return ["", *table(("way, ms", "step", *PARTS), cells)] if cells else []


def longest_page(head: Header, rows: Sequence[Row]) -> str:
    lines = ["# Longest sequences that train", "", *(f"- {key}: {value}" for key, value in head.items()), ""]
    lines += [
        "Micro batch 1. A process trains two steps of a length that fits, then one of each that is tried, for as long "
        "as they train: around where the peaks of the two before say that memory ends, a sixteenth apart; where they "
        "don't say, lengths are doubled, then bisected to an eighth.",
        "",
    ]
    longest = {row["way"]: row["longest"] for row in rows}
    cells = []
    for row in rows:
        over = [_times(row["longest"], longest.get(other)) for other in (STOCK, LIGER)]
        best = next((t for t in reversed(row["tries"]) if t["length"] == row["longest"]), {})
        took = [number(best.get("ms"), ".0f"), _gib(best.get("peak_mib"))]
        cells.append([row["way"], str(row["longest"] or "-"), *over, *took, row["status"]])
    lines += table(("way", "tokens", "over hf", "over liger", "step ms", "peak GiB", "end of the search"), cells)
    return "\n".join(lines) + "\n"


def write_csv(path: Path, head: Header, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in head.items())
        writer = csv.writer(file)
        writer.writerow([*CSV, *(f"{part} ms" for part in PARTS)])
        for row in rows:
            losses = row.get("losses") or [None]
            parts = row["parts_ms"] if isinstance(row.get("parts_ms"), dict) else {}
            values = {**row, "first_loss": losses[0], "last_loss": losses[-1]}
            writer.writerow([values.get(name) for name in CSV] + [parts.get(part) for part in PARTS])


def write_curves(path: Path, rows: Sequence[Row]) -> None:
    """Every step's loss and norm of the gradient, warm-up included, one line each."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CURVES)
        for row in finished(rows):
            for step, both in enumerate(zip(row["losses"], row["grad_norms"], strict=True), 1):
                writer.writerow([*(row[name] for name in CURVES[:4]), step, *both])
