"""What the pages of results have in common: their header, tables of Markdown, and files that are written row by row."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import math
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

RESUMED = "resumed"
PACKAGES = ("torch", "triton", "deepspeed", "transformers", "liger-kernel")

Row = dict[str, object]
Header = dict[str, str]


def header(script: str, ranks: int, arguments: Sequence[str], packages: Sequence[str] = PACKAGES) -> Header:
    return {
        "device": "",  # the ranks say it
        "ranks": str(ranks),
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
        "date": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        "command": f"python benchmarks/{script} {shlex.join(arguments)}",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(absent)"


def table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rows = [names, ["---"] * len(names), *lines]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]


def positive(text: str) -> int:
    """Of an option's text."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def duration(text: str) -> float:
    """0 or more; inf is for ever."""
    if not (found := _number(text)) >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return found


def amount(text: str) -> float:
    """Above 0, and finite."""
    if not 0 < (found := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number above 0")
    return found


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def port(text: str) -> int:
    if positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; the largest is 65535")
    return int(text)


def out_folder(text: str) -> Path:
    """A folder that is there, or can be made."""
    path = Path(text)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{there} is no folder")
    return path


def in_folder(text: str) -> Path:
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is no folder")
    return path


def file_name(text: str) -> str:
    """Of a file in a folder, without its suffix."""
    if text in ("", ".", "..") or Path(text).name != text:
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a file")
    return text


def measured(path: Path) -> tuple[Header, list[Row]]:
    """The header and the rows of a file that Results has written; a ValueError where it is none."""
    try:
        found = json.loads(path.read_text())
        return found["header"], found["rows"]
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    except (KeyError, TypeError):
        raise ValueError(f"{path} has no header and rows") from None


def number(value: object, form: str) -> str:
    return "-" if value is None else format(value, form)


def without_folders(text: str) -> str:
    """Absolute paths cut down to their last part: a page of results says nothing of the machine's folders."""
    return re.sub(r"(?<![\w./])~?/(?:[^\s/:'\"]+/)*(?=[^\s/:'\"])", "", text)


class Results:
    """All rows so far, written anew with each: what is there survives whatever comes next."""

    def __init__(
        self, path: Path, render: Callable[[Header, Sequence[Row]], str], shown: Callable[[Row], str] = str
    ) -> None:
        self.path, self._render, self._shown = path, render, shown
        self.rows: list[Row] = []
        self.header: Header = {}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(self._shown(row), flush=True)
        self.write()

    def take_up(self, header: Header) -> None:
        """Goes on with the rows that are there, if they are of the same job: of what comes, ``header`` tells."""
        path = self.path.with_suffix(".json")
        if not path.exists():
            self.header = header
            return
        was_header, rows = measured(path)
        for key in ("ranks", "versions", "job"):
            was, now = was_header.get(key), header.get(key)
            if was != now:
                raise ValueError(f"{path.name} can't be gone on with: its {key} was {was}, and is {now} now")
        self.header, self.rows = was_header, rows
        more = f"{header['date']}: {header['command']}"
        self.header[RESUMED] = "; ".join(filter(None, [self.header.get(RESUMED), more]))

    def write(self) -> None:
        self.path.with_suffix(".md").write_text(self.text())
        all_of_it = {"header": self.header, "rows": self.rows}
        self.path.with_suffix(".json").write_text(json.dumps(all_of_it, indent=1) + "\n")

    def text(self) -> str:
        return self._render(self.header, self.rows)
