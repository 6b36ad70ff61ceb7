"""Draws what end_to_end.py measured, from its JSON alone: speed, memory, losses, and where the time goes."""

from __future__ import annotations

from pathlib import Path

from benchmarks.page import Row, measured
from benchmarks.step_page import at, finished, middle, points_of
from benchmarks.step_timeline import PARTS

# by the first word of a way's name; a way's variants are lighter
COLORS = {"hf": "#8d8d8d", "liger": "#e07b39", "compile": "#4f9d69", "alst": "#b8a13b", "ours": "#1f4e9c"}
OTHER = "#b03060"
PART_COLORS = ("#1f4e9c", "#4f7fc9", "#e07b39", "#c9a227", "#8d6fb0", "#7f7f7f", "#b03060", "#e6e6e6")


def draw(folder: Path, name: str) -> str | None:
    """None, or why there is no picture."""
    try:
        head, rows = measured(folder / f"{name}.json")
    except ValueError as error:
        return str(error)
    rows = finished(rows)
    if not rows:
        return "no way has finished"
    try:
        import matplotlib
    except ImportError:
        return f"needs matplotlib (pip install matplotlib), here or elsewhere: --plot {folder.name}"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((speed, memory), (loss, parts)) = pyplot.subplots(2, 2, figsize=(14, 9))
    ways = list(dict.fromkeys(row["way"] for row in rows))
    _bars(speed, rows, ways, "tokens_s", "tokens/s per GPU", 1.0)
    _bars(memory, rows, ways, "peak_mib", "GiB: peak, and of it the model's states (hatched)", 1024.0)
    _losses(loss, rows, ways)
    _timeline(parts, rows, ways)
    figure.suptitle(f"{head['device']}, {head['versions']}, {head['date']}\n{head['job']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=150)
    pyplot.close(figure)
    return None


def _color(way: str, ways: list[str]) -> tuple[str, float]:
    """The colour of its family and how opaque it is."""
    family = way.split("-")[0].split("+")[0]
    alike = [other for other in ways if other.split("-")[0].split("+")[0] == family]
    return COLORS.get(family, OTHER), 1.0 - 0.6 * alike.index(way) / len(alike)


def _bars(axes: object, rows: list[Row], ways: list[str], key: str, label: str, unit: float) -> None:
    points, width = points_of(rows), 0.8 / len(ways)
    for place, way in enumerate(ways):
        color, alpha = _color(way, ways)
        for group, point in enumerate(points):
            mine = at(rows, point, way)
            value = middle(mine, key)
            if value is None:
                continue
            x = group + (place - (len(ways) - 1) / 2) * width
            bar = axes.bar(x, value / unit, width, color=color, alpha=alpha, label=way if group == 0 else None)
            axes.bar_label(bar, fmt="%.4g", fontsize=6)
            if key == "peak_mib":
                states = middle(mine, "states_mib") / unit
                axes.bar(x, states, width, fill=False, hatch="////", edgecolor="white", linewidth=0)
    axes.set_xticks(range(len(points)), [f"{batch} x {length}" for batch, length in points], fontsize=8)
    axes.set_xlabel("micro batch x tokens", fontsize=8)
    axes.set_ylabel(label, fontsize=8)
    if axes.has_data():
        # room for the names above the bars
        axes.set_ylim(0, 1.25 * axes.get_ylim()[1])
        axes.legend(fontsize=7, ncols=4, loc="upper left")


def _losses(axes: object, rows: list[Row], ways: list[str]) -> None:
    """All steps of a run, one size after the other; the first round of each way."""
    for way in ways:
        mine = [row for row in rows if row["way"] == way and row["round"] == 1]
        color, alpha = _color(way, ways)
        curve = [loss for row in mine for loss in row["losses"]]
        axes.plot(range(1, len(curve) + 1), curve, color=color, alpha=alpha, linewidth=1.2, label=way)
    axes.set_xlabel("step", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    axes.legend(fontsize=7)


def _timeline(axes: object, rows: list[Row], ways: list[str]) -> None:
    """At the largest of the sizes at which the most ways had their step taken apart."""
    profiled = [row for row in rows if isinstance(row.get("parts_ms"), dict)]
    if not profiled:
        axes.set_visible(False)
        return
    point = max(points_of(profiled), key=lambda p: (len(at(profiled, p)), p[0] * p[1]))
    mine = [row for way in ways for row in at(profiled, point, way)[:1]]
    left = [0.0] * len(mine)
    for part, color in zip(PARTS, PART_COLORS, strict=True):
        values = [row["parts_ms"][part] for row in mine]
        axes.barh([row["way"] for row in mine], values, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel(f"ms of a step, {point[0]} x {point[1]} tokens", fontsize=8)
    axes.legend(fontsize=7)
