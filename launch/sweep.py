"""sweep.csv: one row for each point of a sweep, with the keys in which the points differ and how each point ended.

python -m launch.sweep FOLDER   collates again, where the points ended later than the command that submitted them
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

RESULTS = ("step", "loss", "held_out_before", "held_out_after", "tokens_per_s", "memory_gb", "seconds")


class Collate(Callback):
    """Hydra calls it when all points of a sweep have been started."""

    def on_multirun_end(self, config: DictConfig, **_: object) -> None:
        print(f"sweep: {collate(Path(config.hydra.sweep.dir))}", flush=True)


def flat(config: Mapping, before: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def settings(point: Path) -> dict[str, object]:
    """The point's configuration, key by key; what only says where the point lies is left out."""
    config = OmegaConf.to_container(OmegaConf.load(point / "run.yaml"))
    return {key: value for key, value in flat(config) if str(point) not in str(value)}


def results(point: Path) -> dict[str, object]:
    metrics = point / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    found = {key: value for row in rows for key, value in row.items()}
    # not the last one, and not the mean: the first steps compile
    speeds = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    if speeds:
        found["tokens_per_s"] = statistics.median(speeds)
    return {key: found.get(key) for key in RESULTS}


def collate(folder: Path) -> Path:
    points = sorted((path.parent for path in folder.absolute().glob("*/run.yaml")), key=lambda p: (len(p.name), p.name))
    configs = [settings(point) for point in points]
    keys = dict.fromkeys(key for config in configs for key in config)
    differing = [key for key in keys if len({json.dumps(config.get(key)) for config in configs}) > 1]
    table = folder / "sweep.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["point", *differing, *RESULTS])
        for point, config in zip(points, configs, strict=True):
            writer.writerow([point.name, *(config.get(key) for key in differing), *results(point).values()])
    return table


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m launch.sweep FOLDER")
    if not any(Path(sys.argv[1]).glob("*/run.yaml")):
        sys.exit(f"launch.sweep: {sys.argv[1]} holds no points of a sweep")
    print(collate(Path(sys.argv[1])))
