"""Draws what run.py measured: ``python benchmarks/plot.py benchmarks/results/DEVICE`` writes ops.png beside ops.csv.

One group of bars per case: the share of the floor that each provider reaches in forward + backward (1.0 is as fast as
this card's own copy or matmul allows). Refused and failed providers have no bar.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# run as a script: find this folder's modules
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.results import OK, read_csv

COLORS = {"ds_fused": "#1f4e9c", "liger": "#e07b39", "compile": "#4f9d69", "torch": "#8d8d8d", "hf_eager": "#c9c9c9"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with ops.csv")
    args = parser.parse_args(argv)
    header, rows = read_csv(args.folder / "ops.csv")
    # a provider's variants (one more word in the name) stay in the table; so do launch-bound sizes
    rows = [row for row in rows if row.status == OK and row.full_share and row.provider in COLORS]
    if not rows:
        parser.error(f"{args.folder / 'ops.csv'}: no finished row to draw")
    try:
        import matplotlib
    except ImportError:
        parser.error("needs matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    axes.invert_yaxis()
    axes.set_xlabel(
        "share of the floor, forward + backward (the rest of 1.0 is what could still be gained)", fontsize=8
    )
    axes.set_title(f"{header['device']}, {header['versions']}, {header['date']}", fontsize=8)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(args.folder / "ops.png", dpi=150)
    return 0


if __name__ == "__main__":
    sys.exit(main())
