"""report.html of a run's folder: one page without scripts or links, written anew as the run goes.

python launch/report.py FOLDER            writes it again from what the folder holds
python launch/report.py FOLDER STATUS     says that the run has ended with this exit status, where no rank could say it
"""

from __future__ import annotations

import argparse
import html
import json
import math
import signal
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path

# a run of many short steps doesn't spend its time on the page
SECONDS_BETWEEN = 10
# a curve of more points looks the same
POINTS = 400
# more ranks than this are shown by the least and the most
LINES = 8
WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 520, 240, 64, 28, 10

STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1b1f24, #e6e8eb); --faint: light-dark(#d9dde2, #3a4048);
  --paper: light-dark(#ffffff, #15181c); --quiet: light-dark(#59636e, #9aa4af); }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2em auto;
  max-width: 1120px; padding: 0 1em; }
h1 { font-size: 1.3em; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 1em; margin: 0 0 .4em; }
.quiet { color: var(--quiet); }
.facts { display: flex; flex-wrap: wrap; gap: .6em 2.2em; margin: 1.2em 0; padding: 0; list-style: none; }
.facts b { display: block; font-size: 1.25em; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 1.6em; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--quiet); font-size: 12px; }
.grid { stroke: var(--faint); stroke-width: 1; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
.key span { margin-right: 1.2em; white-space: nowrap; }
.key i { display: inline-block; width: 1em; height: .25em; margin-right: .4em; vertical-align: middle; }
details { margin: .8em 0; } summary { cursor: pointer; font-weight: 600; }
pre { background: light-dark(#f5f6f8, #1f242a); padding: .8em; overflow-x: auto; font-size: 13px; }
"""
# tell apart on light and on dark, and for the colour-blind
COLOURS = ("#3b82c4", "#d9730d", "#2f9e6e", "#b5539c", "#b59a00", "#6f6fd8", "#c94f4f", "#4aa3b5")

# on a page whose run goes on
REFRESH = f'<meta http-equiv="refresh" content="{SECONDS_BETWEEN}">'

Points = list[tuple[float, float]]


class Dashboard:
    """Keeps report.html of a running engine's folder up to date."""

    def __init__(self, folder: Path, engine: object):
        self.folder, self.written = folder, -math.inf
        # the longest time between two pages so far
        self.longest = SECONDS_BETWEEN
        layers = getattr(engine, "ds_fused_report", None)
        (folder / "layers.txt").write_text(f"{layers or 'no layer was replaced'}\n", encoding="utf-8")

    def update(self) -> None:
        now = time.monotonic()
        if now - self.written >= SECONDS_BETWEEN:
            if self.written > -math.inf:
                self.longest = max(self.longest, math.ceil(now - self.written))
            write(self.folder, "running", every=self.longest)
            self.written = time.monotonic()


def write(folder: Path, state: str, every: int | None = None) -> None:
    """Read the folder and write its page; whole, so that a browser never sees a half of it.

    ``every``: so many seconds later, at most, it is written again while the run goes on.
    """
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    documents = {}
    for path in [folder / "run.yaml", folder / "ds_config.json", *sorted(folder.glob("environment/*.json"))]:
        if path.exists():
            documents[str(path.relative_to(folder))] = path.read_text(encoding="utf-8")
    layers = folder / "layers.txt"
    layers_text = layers.read_text(encoding="utf-8") if layers.exists() else ""
    # the last line may be in the midst of being written
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    aside = folder / ".report.html"
    aside.write_text(page(str(folder), state, rows, layers_text, documents, every), encoding="utf-8")
    aside.replace(folder / "report.html")


def goes_on(folder: Path) -> bool:
    """Whether the page doesn't say how the run ended."""
    shown = folder / "report.html"
    return not shown.exists() or REFRESH in shown.read_text(encoding="utf-8")


def finish(folder: Path, state: str, over: str | None = None) -> None:
    """The last word on a run, where its ranks have not said theirs: a rank that was killed can't; or said `over`."""
    if goes_on(folder) or over and f" - {over}</title>" in (folder / "report.html").read_text(encoding="utf-8"):
        write(folder, state)


def failed(status: int) -> str:
    """How a command failed. A signal n comes as -n, from DeepSpeed's launcher as 256 - n, from a shell as 128 + n."""
    number = -status if status < 0 else 256 - status if status > 192 else status - 128
    # 255 is ssh's own failure
    if status != 255 and number in {member.value for member in signal.Signals}:
        return f"failed: {signal.Signals(number).name} (exit status {status})"
    return f"failed: exit status {status}"


def page(
    name: str,
    state: str,
    rows: Sequence[Mapping],
    layers: str,
    documents: Mapping[str, str],
    every: int | None = None,
) -> str:
    """The whole page; but for the time a pure function."""
    refresh = REFRESH if state in ("starting", "running") else ""
    charts = [
        chart("Loss", {"training": curve(rows, "loss"), "held out": curve(rows, "held_out_loss")}),
        chart("Tokens per second", {"all ranks": curve(rows, "tokens_per_s")}, floor=0),
        chart("Peak memory by rank, GB", memory_by_rank(rows), floor=0),
        chart("Gradient norm", {"before clipping": curve(rows, "grad_norm")}, floor=0),
    ]
    details = [("Replaced layers", layers, True), *((title, text, False) for title, text in documents.items())]
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
{refresh}
<title>{html.escape(Path(name).name)} - {state}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(name)}</h1>
<p class="quiet">{html.escape(state)}, {heard(every)}</p>
<ul class="facts">{"".join(f"<li>{title}<b>{html.escape(value)}</b></li>" for title, value in facts(rows))}</ul>
<div class="charts">
{"".join(charts)}
</div>
{"".join(section(*detail) for detail in details)}
</body>
</html>
"""


def heard(every: int | None) -> str:
    """When the run was last heard of, and how long ago that may be: of a machine that is gone nobody says so."""
    now = time.strftime("%Y-%m-%d %H:%M:%S %z")
    if every is None:
        return now
    return f"last heard of at {now}, until now every {every} s or sooner; much later than that nobody writes this page"


def section(title: str, text: str, is_open: bool) -> str:
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>\n"


def facts(rows: Sequence[Mapping]) -> Iterable[tuple[str, str]]:
    """The few numbers above the charts."""
    if not rows:
        return
    yield "step", str(rows[-1]["step"])
    if any("loss" in row for row in rows):
        yield "loss", latest(rows, "loss")
    if held_out := [row["held_out_loss"] for row in rows if "held_out_loss" in row]:
        first = [f"{held_out[0]:.4f}"] if len(held_out) > 1 else []
        yield "held-out loss", " → ".join([*first, latest(rows, "held_out_loss")])
    if speeds := sorted(value for _, value in curve(rows, "tokens_per_s")):
        # not the mean: the first steps compile
        yield "tokens/s, median", f"{speeds[len(speeds) // 2]:,.0f}"
    if memory := curve(rows, "memory_gb"):
        yield "peak memory", f"{max(value for _, value in memory):.2f} GB"


def latest(rows: Sequence[Mapping], key: str) -> str:
    """The newest value; where it is not finite, with the step from which on none was."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    _, value = points[-1]
    if math.isfinite(value):
        return f"{value:.4f}"
    *_, (since, _) = takewhile(lambda point: not math.isfinite(point[1]), reversed(points))
    return f"{'NaN' if math.isnan(value) else value} from step {since} on"


def curve(rows: Sequence[Mapping], key: str) -> Points:
    """Steps and values of one key; what isn't finite has no place on a chart."""
    return [
        (row["step"], row[key]) for row in rows if isinstance(row.get(key), (int, float)) and math.isfinite(row[key])
    ]


def memory_by_rank(rows: Sequence[Mapping]) -> dict[str, Points]:
    rows = [row for row in rows if row.get("memory_gb_by_rank")]
    ranks = max((len(row["memory_gb_by_rank"]) for row in rows), default=0)
    if ranks > LINES:
        ends = {"most": max, "least": min}
        return {name: [(row["step"], end(row["memory_gb_by_rank"])) for row in rows] for name, end in ends.items()}
    return {
        f"rank {rank}": [
            (row["step"], row["memory_gb_by_rank"][rank]) for row in rows if rank < len(row["memory_gb_by_rank"])
        ]
        for rank in range(ranks)
    }


def thinned(points: Points) -> Points:
    stride = math.ceil(len(points) / POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from low to high."""
    rough = (high - low) / about or 1.0
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title: str, lines: Mapping[str, Points], floor: float | None = None) -> str:
    """Lines over steps as SVG, with a key."""
    lines = {name: thinned(points) for name, points in lines.items() if points}
    if not lines:
        return f'<figure style="margin:0"><h2>{title}</h2><p class="quiet">nothing yet</p></figure>\n'
    xs, ys = zip(*(point for points in lines.values() for point in points), strict=True)
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ys) if floor is None else floor, max(ys)
    # a single point, or a constant, stands in the middle
    x_high, y_high = x_high if x_high > x_low else x_low + 1, y_high if y_high > y_low else y_low + (abs(y_low) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x_low) / (x_high - x_low), (y - y_low) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - 10), ABOVE + (1 - up) * (HEIGHT - ABOVE - BELOW)

    parts = []
    for y in ticks(y_low, y_high, 5):
        _, at = place(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 10}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:,.5g}</text>')
    for x in ticks(x_low, x_high, 6):
        at, _ = place(x, y_low)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{x:,.6g}</text>')
    key = []
    for (name, points), colour in zip(lines.items(), COLOURS, strict=False):
        places = [place(x, y) for x, y in points]
        parts.append(f'<polyline stroke="{colour}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in places)}"/>')
        if len(places) <= 30:
            # few points are seen as such; each says its value to a resting pointer
            for (x, y), (step, value) in zip(places, points, strict=True):
                says = f"<title>step {step}: {value:.6g}</title>"
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}">{says}</circle>')
        key.append(f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>')
    drawing = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over steps">{"".join(parts)}</svg>'
    return f'<figure style="margin:0"><h2>{title}</h2>{drawing}<div class="key quiet">{"".join(key)}</div></figure>\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("status", type=int, nargs="?", metavar="STATUS")
    options = parser.parse_args()
    if not options.folder.is_dir():
        parser.error(f"{options.folder}: no such folder")
    if options.status is not None:
        finish(options.folder, failed(options.status))
    else:
        write(options.folder, state="as of now")


if __name__ == "__main__":
    main()
