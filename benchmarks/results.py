"""Rows, the ratios between them, and the two files they become: ops.csv and ops.md."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

OK = "ok"
CEILING = "ceiling"  # not an op: the bare work that the op can't do without
OURS = "ds_fused"
BASE = "base"  # ours, as it was at another commit
LIGER = "liger"
# what is asked for on an H100 of ours at its defaults
LEAST_OF_BEST = 0.97
LEAST_SHARE = 0.92
MOST_OF_LIGER = 0.85
MOST_OF_BARE = 1.07
# a peak that is larger by less has a number for each token in it, or partial sums of a weight's gradient
FEW_MIB = 1.0
# of a cross entropy: reads and writes of the logits, and how many times as long as those it may take. Its row's floor
# is one read and one write
PASSES = {OURS: (3, 1.1), f"{OURS} grad_in_forward": (2, 1.3)}


@dataclass
class Row:
    op: str
    variant: str
    shape: str
    launch_bound: bool
    provider: str
    status: str = OK  # or "ceiling", or why there is no number
    forward_ms: float | None = None
    full_ms: float | None = None  # forward + backward
    forward_share: float | None = None  # floor / measured; 1.0 is as fast as the ceiling allows
    full_share: float | None = None
    peak_mib: float | None = None  # of forward + backward, beyond the inputs
    host_forward_us: float | None = None
    host_full_us: float | None = None
    worst_error: float | None = None  # relative L2 against fp32, over outputs and gradients
    worst_of: str = ""
    best_rival: str = ""
    over_best_rival: float | None = None  # the rival's time / ours, forward + backward; above 1 we are faster
    over_liger: float | None = None
    over_base: float | None = None
    note: str = ""

    @property
    def case(self) -> tuple[str, str, str]:
        return self.op, self.variant, self.shape

    @property
    def ours(self) -> bool:
        return self.provider.split()[0] == OURS

    @property
    def of_base(self) -> bool:
        return self.provider.split()[0] == BASE

    @property
    def cost(self) -> float | None:
        """What is compared: where launches dominate, the host's time."""
        return self.host_full_us if self.launch_bound else self.full_ms


def compare(rows: Sequence[Row]) -> None:
    """Fills the ratios of our rows from the rivals of the same case; rows without a right answer take no part."""
    for row in rows:
        row.best_rival, row.over_best_rival, row.over_liger, row.over_base = "", None, None, None
        if not (row.ours and row.status == OK and row.cost):
            continue
        others = {
            other.provider: other.cost
            for other in rows
            if other.case == row.case and other.status == OK and other.cost and not other.ours
        }
        before = others.get(row.provider.replace(OURS, BASE, 1))
        if before:
            row.over_base = before / row.cost
        rivals = {name: cost for name, cost in others.items() if name.split()[0] != BASE}
        if rivals:
            row.best_rival = min(rivals, key=rivals.__getitem__)
            row.over_best_rival = rivals[row.best_rival] / row.cost
        if LIGER in rivals:
            row.over_liger = rivals[LIGER] / row.cost


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def write_csv(path: Path, header: Mapping[str, str], rows: Sequence[Row]) -> None:
    names = [field.name for field in fields(Row)]
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="") as file:
        file.writelines(f"# {key}: {value}\n" for key, value in header.items())
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows([_text(getattr(row, name)) for name in names] for row in rows)
    partial.replace(path)


def read_csv(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The file's header and rows; (nothing, nothing) if it isn't there; a ValueError where it is no such file."""
    if not path.exists():
        return {}, []
    try:
        return _read_csv(path)
    except ValueError as error:
        raise ValueError(f"{path} is no table of run.py: {error}") from None


def _read_csv(path: Path) -> tuple[dict[str, str], list[Row]]:
    lines = path.read_text().splitlines()
    comments = [line[2:] for line in lines if line.startswith("# ")]
    header = dict(comment.split(": ", 1) for comment in comments)
    rows = []
    for record in csv.DictReader(lines[len(comments) :]):
        values: dict[str, object] = {}
        for field in fields(Row):
            text = record.get(field.name) or ""  # a column may be younger than the file
            if field.type == "bool":
                values[field.name] = text == "True"
            elif field.type == "float | None":
                values[field.name] = float(text) if text else None
            else:
                values[field.name] = text
        rows.append(Row(**values))
    return header, rows


COLUMNS = (
    ("provider", lambda row: row.provider),
    ("forward ms", lambda row: _cell(row.forward_ms, "{:.3f}")),
    ("fwd+bwd ms", lambda row: _cell(row.full_ms, "{:.3f}")),
    ("share of floor", lambda row: _cell(row.full_share, "{:.0%}")),
    ("peak MiB", lambda row: _cell(row.peak_mib, "{:.0f}")),
    ("host us", lambda row: _cell(row.host_full_us, "{:.0f}")),
    ("error", lambda row: _cell(row.worst_error, "{:.1e}") + (f" {row.worst_of}" if row.worst_of else "")),
    ("best rival / ours", lambda row: _cell(row.over_best_rival, "{:.2f}x") + f" {row.best_rival}".rstrip()),
    ("liger / ours", lambda row: _cell(row.over_liger, "{:.2f}x")),
    ("base / ours", lambda row: _cell(row.over_base, "{:.2f}x")),
    ("note", lambda row: row.note if row.status in (OK, CEILING) else f"**{row.status}** {row.note}".strip()),
)


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def summary(rows: Sequence[Row]) -> list[str]:
    """Of ours at its defaults: how it stands to Liger over all cases, and each place where it is behind."""
    mine = [row for row in rows if row.provider == OURS and row.status == OK]
    lines = []
    for name, launch_bound in (("", False), (" of the host where launches are what takes time", True)):
        ratios = [row.over_liger for row in mine if row.over_liger and row.launch_bound == launch_bound]
        if ratios:
            lines.append(
                f"- Liger's time{name} over ours: {statistics.geometric_mean(ratios):.2f} as a geometric mean of "
                f"{len(ratios)} cases, {min(ratios):.2f} to {max(ratios):.2f}"
            )
    for name, (passes, most) in PASSES.items():
        for row in rows:
            if (row.op, row.provider, row.status) == ("cross_entropy", name, OK) and row.full_share:
                case = " ".join(part for part in (*row.case, *name.split()[1:]) if part)
                times = 2 / passes / row.full_share
                lines.append(f"- {case}: {times:.2f} times {passes} passes, at most {most} wanted")
    liger = {row.case: row for row in rows if row.provider == LIGER and row.peak_mib is not None}
    least: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if row.ours and row.status == OK and row.peak_mib is not None:
            least[row.case] = min(row.peak_mib, least.get(row.case, row.peak_mib))
    bare = {row.case: row for row in rows if row.status == CEILING}
    behind = {
        f"a rival needs less than {LEAST_OF_BEST} of the time": [
            row for row in mine if not row.launch_bound and row.over_best_rival and row.over_best_rival < LEAST_OF_BEST
        ],
        f"below {LEAST_SHARE:.0%} of the floor, but for heads": [
            row for row in mine if row.full_share and row.full_share < LEAST_SHARE and row.case not in bare
        ],
        f"above {MOST_OF_BARE} times the bare GEMMs": [
            row for row in mine if row.case in bare and row.full_ms > MOST_OF_BARE * bare[row.case].full_ms
        ],
        f"more than {MOST_OF_LIGER} of Liger's time of the host": [
            row for row in mine if row.launch_bound and row.over_liger and row.over_liger < 1 / MOST_OF_LIGER
        ],
        f"a peak of memory larger than Liger's by more than {FEW_MIB:g} MiB": [
            row for row in mine if row.case in liger and row.peak_mib > liger[row.case].peak_mib + FEW_MIB
        ],
        f"larger by {FEW_MIB:g} MiB or less": [
            row for row in mine if row.case in liger and 0 < row.peak_mib - liger[row.case].peak_mib <= FEW_MIB
        ],
        f"larger by more than {FEW_MIB:g} MiB, whatever options were run": [
            row for row in mine if row.case in liger and least[row.case] > liger[row.case].peak_mib + FEW_MIB
        ],
        f"larger by {FEW_MIB:g} MiB or less, whatever options were run": [
            row for row in mine if row.case in liger and 0 < least[row.case] - liger[row.case].peak_mib <= FEW_MIB
        ],
    }
    for name, found in behind.items():
        cases = "; ".join(" ".join(part for part in row.case if part) for row in found)
        lines.append(f"- {name}: {cases or 'none'}")
    return lines


def markdown(header: Mapping[str, str], rows: Sequence[Row]) -> str:
    """What is to be said of all cases, and a table of each, fastest first; refused and failed providers last."""
    lines = ["# Single ops", ""] + [f"- {key}: {value}" for key, value in header.items()]
    lines += ["", "## Ours at its defaults", "", *summary(rows)]
    ops = list(dict.fromkeys(row.case[:2] for row in rows))
    cases = dict.fromkeys(row.case for row in rows)
    for case in sorted(cases, key=lambda case: ops.index(case[:2])):
        mine = [row for row in rows if row.case == case]
        title = " ".join(part for part in case if part) + (" (launch-bound)" if mine[0].launch_bound else "")
        lines += ["", f"## {title}", ""]
        lines.append("| " + " | ".join(name for name, _ in COLUMNS) + " |")
        lines.append("|" + " --- |" * len(COLUMNS))
        mine.sort(key=lambda row: (row.status not in (OK, CEILING), row.cost or float("inf")))
        lines += ["| " + " | ".join(cell(row).replace("|", "/") for _, cell in COLUMNS) + " |" for row in mine]
    return "\n".join(lines) + "\n"
