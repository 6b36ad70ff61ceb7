"""Draws what zero3_head.py measured: ``python benchmarks/plot_head.py DIR`` writes zero3_head.png beside its .json.

One panel a shape, one point a way: time against extra memory, both from zero, so the lower left is where to be. The
dotted line is the bare matrix products. Ways without an answer have no point.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# run as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.head_rows import merged
from benchmarks.head_ways import BARE
from benchmarks.page import measured

# by the first word of a way
COLORS = {
    "gather": "#1f4e9c",
    "stream": "#1f4e9c",
    "stationary": "#1f4e9c",
    "replicated": "#9db4d8",
    "liger": "#e07b39",
    "deepspeed": "#4f9d69",
    "whole": "#8d8d8d",
    "stock": "#000000",
}
COLUMNS = 2


def draw(folder: Path) -> str | None:
    """None, or why there is no picture."""
    try:
        header, rows = measured(folder / "zero3_head.json")
    except ValueError as error:
        return str(error)
    rows = [row for row in merged(rows) if "ms" in row]
    points = [row for row in rows if row.get("extra_mib") is not None]
    if not points:
        return "no way has both a time and its memory"
    try:
        import matplotlib
    except ImportError:
        return "needs matplotlib: pip install matplotlib"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(row["shape"] for row in points))
    columns = min(COLUMNS, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(6.5 * columns, 4.2 * lines + 0.4), squeeze=False)
    for panel in axes.flat[len(shapes) :]:
        panel.set_visible(False)
    for shape, panel in zip(shapes, axes.flat, strict=False):
        for row in (row for row in points if row["shape"] == shape):
            color = COLORS.get(row["way"].split()[0], "#b03060")
            panel.scatter(row["ms"], row["extra_mib"], color=color, s=22)
            # the replicated ways lie left of those with ZeRO, and so do their names
            side, offset = ("right", -4) if row["way"].startswith("replicated") else ("left", 4)
            place = {"xytext": (offset, 3), "textcoords": "offset points", "ha": side, "fontsize": 7}
            panel.annotate(row["way"], (row["ms"], row["extra_mib"]), **place)
        for row in (row for row in rows if row["shape"] == shape and row["way"] == BARE):
            panel.axvline(row["ms"], color="black", linewidth=0.8, linestyle=":")
        # room for the names on the right
        panel.set_xlim(0, 1.25 * panel.get_xlim()[1])
        panel.set_ylim(bottom=0)
        panel.set_title(shape, fontsize=9)
        panel.set_xlabel("forward + backward, ms", fontsize=8)
        panel.set_ylabel("extra memory, MiB", fontsize=8)
    figure.suptitle(f"{header['device']}, {header['versions']}, {header['date']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(folder / "zero3_head.png", dpi=150)
    return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with zero3_head.json")
    args = parser.parse_args(argv)
    if not (args.folder / "zero3_head.json").exists():
        parser.error(f"{args.folder / 'zero3_head.json'} is not there")
    reason = draw(args.folder)
    if reason is not None:
        parser.error(reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
