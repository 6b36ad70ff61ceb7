"""Ours as it was: ``run.py --base REF`` times an earlier version beside this one, in a process of its own."""

from __future__ import annotations

import io
import multiprocessing
import subprocess
import sys
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.measure import Instruments
from benchmarks.results import BASE, OURS, Row

if TYPE_CHECKING:
    from benchmarks.run import Bench

ROOT = Path(__file__).resolve().parents[1]

# of the base's process
_on: Instruments
_ceilings: dict[str, float]
_bench: Bench | None = None  # of the shape whose hosts are being measured


def _begin(folder: str, device: str, rep_ms: float, ceilings: dict[str, float]) -> None:
    global _on, _ceilings
    import benchmarks.run  # noqa: F401  # this checkout's, whatever else lies in the folder

    # importing torch has loaded this version's plug-in
    for name in [name for name in sys.modules if name.split(".")[0] == "ds_fused"]:
        del sys.modules[name]
    sys.path.insert(0, folder)
    import ds_fused

    if not Path(ds_fused.__file__).is_relative_to(folder):
        raise RuntimeError(f"ds_fused is {ds_fused.__file__}, not that of {folder}")
    _on, _ceilings = Instruments(device, rep_ms), ceilings


def _measure(place: int, shape: tuple[int, ...], row: Row) -> tuple[Row, bool]:
    """The row, and whether another can be measured here."""
    from benchmarks.run import Bench

    Bench(place, shape, _ceilings, _on).fill(row, _ours(row))
    if not _on.alive():
        return row, False
    # the device is run.py's again
    _on.release()
    return row, True


def _host_us(place: int, shape: tuple[int, ...], row: Row) -> tuple[float, float]:
    global _bench
    from benchmarks.run import Bench

    if _bench is None:
        _bench = Bench(place, shape, _ceilings, _on)
    return _bench.host_us(_ours(row))


def _release() -> None:
    global _bench
    _bench = None
    _on.release()


def _ours(row: Row) -> str:
    """The name by which the process knows the row's provider."""
    return row.provider.replace(BASE, OURS, 1)


def check(source: str) -> None:
    """A ValueError where there is no such base: said before anything is measured."""
    look = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{source}:ds_fused"]
    if not (Path(source) / "ds_fused").is_dir() and subprocess.run(look, capture_output=True).returncode:
        raise ValueError(f"--base {source}: neither a folder with ds_fused/ in it nor a commit")


class Base:
    """The process in which `source` is ds_fused: a commit that git knows, or a folder with ds_fused/ in it."""

    def __init__(self, source: str, device: str, rep_ms: float, ceilings: dict[str, float]) -> None:
        self._exported = tempfile.TemporaryDirectory(prefix="ds_fused_base_")
        folder = Path(source).resolve()
        if not (folder / "ds_fused").is_dir():
            folder = Path(self._exported.name).resolve()
            _export(source, folder)
        spawn = multiprocessing.get_context("spawn")
        arguments = str(folder), device, rep_ms, ceilings
        self._begun = partial(ProcessPoolExecutor, 1, spawn, initializer=_begin, initargs=arguments)
        self._process = self._begun()

    def measured(self, place: int, shape: tuple[int, ...], row: Row) -> Row:
        """The row, filled, of the case at `place` in CASES. Behind a row that costs it its device it begins anew."""
        row, is_alive = self._process.submit(_measure, place, shape, row).result()
        if not is_alive:
            self._process.shutdown()
            self._process = self._begun()
        return row

    def host_us(self, place: int, shape: tuple[int, ...], row: Row) -> tuple[float, float]:
        """A batch of the row's calls on the host; inputs are kept for the next until ``release``."""
        return self._process.submit(_host_us, place, shape, row).result()

    def release(self) -> None:
        self._process.submit(_release).result()

    def close(self) -> None:
        self._process.shutdown()
        self._exported.cleanup()


def _export(ref: str, folder: Path) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), "archive", ref, "ds_fused"], capture_output=True)
    if done.returncode:
        said = done.stderr.decode().strip()
        raise ValueError(f"--base {ref}: neither a folder with ds_fused/ in it nor a commit: {said}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
