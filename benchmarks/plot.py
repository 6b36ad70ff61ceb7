"""Draws what run.py measured: ``python benchmarks/plot.py benchmarks/results/DEVICE``, from ops.csv there.

ops.png: a group of bars per case, the share of the floor that each provider reaches in forward + backward (1.0 is as
fast as this card's own copy or matmul allows). ops_sizes.png: speed and memory against size, of each op and variant.
Of ``run.py --widths``, a folder of that name, widths.png instead: the share against the width, forward and backward
apart. Refused and failed providers have no bar and no point.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# run as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import OK, Row, read_csv

COLORS = {"ds_fused": "#1f4e9c", "liger": "#e07b39", "compile": "#4f9d69", "torch": "#8d8d8d", "hf_eager": "#c9c9c9"}
PAIRS_A_ROW = 3  # of pictures, speed and memory


def shares(rows: Sequence[Row], header: Mapping[str, str], path: Path) -> None:
    from matplotlib import pyplot

    rows = [row for row in rows if row.full_share]
    cases = list(dict.fromkeys(row.case for row in rows))
    figure, axes = pyplot.subplots(figsize=(11, 1.0 + 0.62 * len(cases)))
    height = 0.8 / len(COLORS)
    for place, (provider, color) in enumerate(COLORS.items()):
        mine = [row for row in rows if row.provider == provider]
        y = [cases.index(row.case) + (place - (len(COLORS) - 1) / 2) * height for row in mine]
        bars = axes.barh(y, [row.full_share for row in mine], height, color=color, label=provider)
        axes.bar_label(bars, [f"{row.full_ms:.3g} ms" for row in mine], fontsize=6, padding=2)
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(cases)), [" ".join(part for part in case if part) for case in cases], fontsize=8)
    axes.set_ylim(len(cases) - 0.5, -0.5)  # the first one on top
    axes.set_xlabel(
        "share of the floor, forward + backward (the rest of 1.0 is what could still be gained)", fontsize=8
    )
    axes.legend(fontsize=8)
    _save(figure, header, path)


def size(row: Row) -> int:
    """The product of a shape's sizes."""
    return math.prod(int(n) for n in row.shape.split()[0].split("x"))


def sizes(rows: Sequence[Row], header: Mapping[str, str], path: Path) -> None:
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case[:2] for row in rows))
    deep = math.ceil(len(cases) / PAIRS_A_ROW)
    figure, grid = pyplot.subplots(deep, 2 * PAIRS_A_ROW, figsize=(18, 2.6 * deep), squeeze=False)
    for axes in grid.flat[2 * len(cases) :]:
        axes.axis("off")
    panels = (
        ("products of sizes per ns", lambda row: size(row) / row.full_ms / 1e6),
        ("MiB", lambda row: row.peak_mib),
    )
    for place, case in enumerate(cases):
        for offset, (name, value) in enumerate(panels):
            axes = grid.flat[2 * place + offset]
            for provider, color in COLORS.items():
                mine = sorted((row for row in rows if (*row.case[:2], row.provider) == (*case, provider)), key=size)
                # a call that takes no memory has no place on a logarithmic axis
                points = [(size(row), value(row)) for row in mine if value(row)]
                axes.plot(*zip(*points, strict=True) if points else ([], []), "o-", color=color, label=provider, ms=3)
            axes.set(xscale="log", yscale="log")
            axes.tick_params(labelsize=6)
            axes.set_title(f"{' '.join(case).strip()}: {name}", fontsize=7)
    grid[0, 0].legend(fontsize=6)
    _save(figure, header, path)


def widths(rows: Sequence[Row], header: Mapping[str, str], path: Path) -> None:
    """A panel for each op and variant; full is forward + backward, forward the dashed line."""
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row.case[:2] for row in rows))
    deep = math.ceil(len(cases) / PAIRS_A_ROW)
    figure, grid = pyplot.subplots(deep, PAIRS_A_ROW, figsize=(18, 2.8 * deep), squeeze=False)
    for axes in grid.flat[len(cases) :]:
        axes.axis("off")
    for axes, case in zip(grid.flat, cases, strict=False):
        mine = [row for row in rows if row.case[:2] == case]
        # the sizes behind the number of rows, which goes by them
        shapes = list(dict.fromkeys(row.shape for row in mine))
        for provider, color in COLORS.items():
            of = [row for row in mine if row.provider == provider and row.full_share]
            at = [shapes.index(row.shape) for row in of]
            axes.plot(at, [row.full_share for row in of], "o-", color=color, label=provider, ms=3)
            axes.plot(at, [row.forward_share for row in of], "--", color=color, linewidth=0.8)
        axes.axhline(1.0, color="black", linewidth=0.8, linestyle=":")
        axes.set_ylim(0, 1.1)
        axes.set_xticks(range(len(shapes)), [shape.partition("x")[2] for shape in shapes], rotation=60, fontsize=6)
        axes.tick_params(axis="y", labelsize=6)
        axes.set_title(f"{' '.join(case).strip()}: share of the floor (dashed: forward alone)", fontsize=7)
    grid[0, 0].legend(fontsize=6)
    _save(figure, header, path)


def _save(figure, header: Mapping[str, str], path: Path) -> None:
    # in inches from the top, whatever the figure's height
    title, panels = (1 - inches / figure.get_figheight() for inches in (0.1, 0.3))
    figure.suptitle(f"forward + backward on {header['device']}, {header['versions']}", fontsize=8, y=title, va="top")
    figure.tight_layout(rect=(0, 0, 1, panels))
    figure.savefig(path, dpi=110)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with ops.csv")
    args = parser.parse_args(argv)
    try:
        header, rows = read_csv(args.folder / "ops.csv")
    except ValueError as error:
        parser.error(str(error))
    # a provider's variants (one more word in the name) stay in the table
    rows = [row for row in rows if row.status == OK and row.full_ms and row.provider in COLORS]
    if not rows:
        parser.error(f"{args.folder / 'ops.csv'}: no finished row to draw")
    try:
        import matplotlib
    except ImportError:
        parser.error("needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    if args.folder.resolve().name == "widths":
        widths(rows, header, args.folder / "widths.png")
        return 0
    shares(rows, header, args.folder / "ops.png")
    sizes(rows, header, args.folder / "ops_sizes.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
