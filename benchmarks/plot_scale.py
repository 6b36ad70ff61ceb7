"""Pictures of what scale.py predicts: throughput over the number of GPUs, and where the head's modes cross over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.scale import Prediction

COLORS = {"hf": "#000000", "liger": "#e07b39", "ours": "#9db4d8", "ours-fast": "#1f4e9c", "ours-small": "#4f9d69"}
COLUMNS = 2
NEEDED = "needs matplotlib: pip install matplotlib"


def _pyplot() -> ModuleType | None:
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_scaling(path: Path, predictions: Sequence[Prediction], room_gib: float) -> str | None:
    """One panel a shape and micro batch; a band from "nothing of the network is hidden" to "all". None, or why not."""
    pyplot = _pyplot()
    if pyplot is None:
        return NEEDED
    panels = list(dict.fromkeys((p.job.shape, p.job.micro_batch) for p in predictions))
    lines = -(-len(panels) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(6.5 * COLUMNS, 3.6 * lines), squeeze=False)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    for (shape, batch), panel in zip(panels, axes.flat, strict=False):
        for way, color in COLORS.items():
            some = [p for p in predictions if (p.job.shape, p.job.micro_batch, p.job.way.name) == (shape, batch, way)]
            some = [p for p in some if p.peak_gib <= room_gib]
            ranks = [p.job.ranks for p in some]
            panel.plot(ranks, [p.fast for p in some], color=color, label=way, linewidth=1.2)
            panel.fill_between(ranks, [p.slow for p in some], [p.fast for p in some], color=color, alpha=0.15)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks, [str(n) for n in ranks])
        panel.set_ylim(bottom=0)
        panel.set_title(f"{shape.name}, {batch} x 8192 tokens a GPU", fontsize=9)
        panel.set_xlabel("GPUs", fontsize=8)
        panel.set_ylabel("tokens/s/GPU", fontsize=8)
        panel.legend(fontsize=7, loc="lower left")
    figure.suptitle("predicted, not measured; where there is no line, it does not fit", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None


def draw_crossover(
    path: Path,
    maps: Mapping[tuple[tuple[int, int], float], Sequence[Sequence[float]]],
    ranks: Sequence[int],
    tokens: Sequence[int],
) -> str | None:
    """One panel a head (V, H) and network: times of stationary over stream at [ranks][tokens]. None, or why not."""
    pyplot = _pyplot()
    if pyplot is None:
        return NEEDED
    from matplotlib.colors import LogNorm

    lines = -(-len(maps) // COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(6.5 * COLUMNS, 3.6 * lines), squeeze=False)
    for ((vocab, hidden), network), panel in zip(maps, axes.flat, strict=False):
        ratio = list(zip(*maps[(vocab, hidden), network], strict=True))
        shown = panel.pcolormesh(ranks, tokens, ratio, cmap="RdBu_r", norm=LogNorm(1 / 8, 8), shading="nearest")
        panel.contour(ranks, tokens, ratio, levels=[1.0], colors="black", linewidths=1.2)
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks, [str(n) for n in ranks])
        panel.set_yscale("log", base=2)
        panel.set_yticks(tokens, [str(n) for n in tokens])
        panel.set_title(f"V {vocab}, H {hidden}, {network / 1e9:g} GB/s of network a GPU", fontsize=9)
        panel.set_xlabel("GPUs", fontsize=8)
        panel.set_ylabel("tokens a GPU", fontsize=8)
        figure.colorbar(shown, ax=panel, label="time of stationary / stream")
    figure.suptitle("predicted, not measured; black: equal", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None
