"""Ranks and who starts them: a launch whose lines are listened to, and what ranks tell the launcher and one another."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import psutil  # DeepSpeed needs it too
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
# of what a launch that failed had to say
TAIL = 4000


@dataclass
class Ended:
    """How a launch ended."""

    status: int
    tail: str
    silent: bool  # nothing was heard for so long that it was ended


def listen(
    command: Sequence[str],
    hear: Callable[[str], None],
    patience: float | None = None,
    env: Mapping[str, str] = os.environ,
) -> Ended:
    """Runs a command to its end and hands on its lines as they come.

    After ``patience`` seconds without a line, all that was started is ended.
    """
    # first: the ds_fused of this checkout, not one that is installed
    path = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    silent = False
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            errors="replace",
            env={**env, "PYTHONPATH": path},
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        said: list[str] = []
        try:
            while (line := lines.get(timeout=patience)) is not None:
                said.append(line)
                hear(line)
            process.wait(timeout=patience)
        except (queue.Empty, subprocess.TimeoutExpired):
            silent = True
        finally:
            _end(process)
            reader.join()
            process.stdout.close()
        errors.seek(0)
        tail = "".join(said)[-TAIL:] + errors.read()[-TAIL:]
    return Ended(process.returncode, tail, silent)


def _end(process: subprocess.Popen[str]) -> None:
    """Of the whole tree: a session of its own would be ended at once, but outlive whoever ends this process's."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.kill()
    process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def say(what: str, values: object) -> None:
    """A line for the launcher."""
    # in one write: the launcher mixes the lines of all ranks
    sys.stdout.write(f"\n{what}{json.dumps(values)}\n")
    sys.stdout.flush()


def said(error: BaseException) -> str:
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first[:200]}"


def exchanged(store: dist.Store, place: str, mine: object, rank: int, ranks: int, patience: timedelta) -> list:
    """What each rank has to say, through the store: no collective, so that a rank which hangs in one is found out."""
    store.set(f"{place}/{rank}", json.dumps(mine))
    keys = [f"{place}/{r}" for r in range(ranks)]
    store.wait(keys, patience)
    return [json.loads(store.get(key)) for key in keys]
