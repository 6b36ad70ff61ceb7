"""Start N ranks of a real script on the CPU, wait for them, and hand back what they said.

Used by every test that needs more than one process. `launch` starts the ranks itself (what torchrun would set in the
environment, without its agent process); `start` runs any one command in the same prepared environment. Both end all
they started, grandchildren included, when the time is up.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

REPO = Path(__file__).resolve().parents[1]
# what C++ says of a thread that is still running when its object goes
TEARDOWN = "terminate called without an active exception"
# so often is a launch tried that ends so; once the second one did, too
ATTEMPTS = 3
# seconds, on a machine that has much else to do: of what takes half a minute on two free cores
PATIENCE = 600.0
# what ranks that wait for a failed one may still say, and how they end by themselves
AFTER_A_FAILURE = 90.0
# of each process, where they are shown together
LAST_LINES = 40


@dataclass(frozen=True)
class Ended:
    """How one process ended: its exit status and its output, stdout and stderr as one text."""

    status: int
    output: str

    @property
    def aborted_at_its_end(self) -> bool:
        """A rank that had finished, and aborted as it went: one in some hundred starts, without ds_fused too."""
        return self.status != 0 and TEARDOWN in self.output


def launch(
    script: str | Path,
    *args: str,
    ranks: int = 2,
    timeout: float = PATIENCE,
    cwd: Path = REPO,
    env: Mapping[str, str] | None = None,
    expect_success: bool = True,
) -> list[Ended]:
    """Run `script` on `ranks` CPU ranks (gloo) and return how each ended, in rank order.

    With `expect_success` one failed rank fails the test, which then shows every rank's output.
    """
    command = [sys.executable, "-u", str(script), *args]
    for _ in range(ATTEMPTS):
        ended = _launch_once(command, ranks, timeout, cwd, env or {})
        if not (expect_success and any(e.aborted_at_its_end for e in ended)):
            break
    assert not expect_success or not any(e.status for e in ended), _shown(ended)
    return ended


def _launch_once(command: Sequence[str], ranks: int, timeout: float, cwd: Path, env: Mapping[str, str]) -> list[Ended]:
    address = {"WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    address["MASTER_PORT"] = str(free_port())
    started = [
        _Started(command, cpu_environment(RANK=str(rank), LOCAL_RANK=str(rank), **address, **env), cwd)
        for rank in range(ranks)
    ]
    try:
        return _wait(started, timeout)
    finally:
        _free_shared_memory(address["MASTER_PORT"])


def start(
    command: Sequence[str | Path], *, timeout: float = PATIENCE, cwd: Path = REPO, attempts: int = ATTEMPTS, **env: str
) -> Ended:
    """Run one command to its end, whatever its status; again where a rank aborted as it ended."""
    words = [str(word) for word in command]
    for _ in range(attempts):
        try:
            ended = _wait([_Started(command, cpu_environment(**env), cwd)], timeout)[0]
        finally:
            if "--master_port" in words:
                _free_shared_memory(words[words.index("--master_port") + 1])
        if not ended.aborted_at_its_end:
            break
    return ended


def cpu_environment(**more: str) -> dict[str, str]:
    """A copy of this process's environment in which DeepSpeed trains on the CPU and nothing reaches out."""
    env = dict(os.environ)
    # what an outer launcher or another test may have left there
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TRITON_INTERPRET"):
        env.pop(name, None)
    env |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        # a rank that a signal ends says where it was
        "PYTHONFAULTHANDLER": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # what scripts of several folders share lies beside this file
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [env.get("PYTHONPATH")])]),
        # DeepSpeed looks for ninja on PATH, where a venv that is not activated has no place
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)]),
    }
    return env | more


def _free_shared_memory(port: str) -> None:
    """Memory that DeepSpeed's communication op leaves taken: 66 MiB for each CPU rank, of which a run has many."""
    for left in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        left.unlink(missing_ok=True)


def free_port() -> int:
    """Of those that Linux gives no connection by itself: until the ranks are there, nothing else comes by it."""
    # the system's: tests seed the other one, and two at a time would draw the same numbers
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(15000, 32768)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


class _Started:
    """One running process, its output in a file: a full pipe would stop a rank that the others wait for."""

    def __init__(self, command: Sequence[str | Path], env: Mapping[str, str], cwd: Path):
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `ended`)
        self.process = subprocess.Popen(
            [str(c) for c in command],
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            # a session of its own, so that ending it ends its children
            start_new_session=True,
        )

    def end(self) -> None:
        if self.process.poll() is None:
            # `python -m launch` ends its ranks, which have a session of their own
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self) -> Ended:
        with self.output as f:
            f.seek(0)
            return Ended(self.process.returncode, f.read().decode(errors="replace"))


def _wait(started: Sequence[_Started], timeout: float) -> list[Ended]:
    try:
        too_late = _watch(started, time.monotonic() + timeout)
    except KeyboardInterrupt:
        # by somebody's time limit: how far they have come is worth having
        for s in started:
            s.end()
        # pytest shows nothing that is printed here
        raise KeyboardInterrupt(_shown([s.ended() for s in started])) from None
    finally:
        for s in started:
            s.end()
    ended = [s.ended() for s in started]
    assert not too_late, f"not ended after {timeout:g} s\n{_shown(ended)}"
    return ended


def _watch(started: Sequence[_Started], deadline: float) -> bool:
    """Until all have ended, or one has failed and the others had time to notice. True: the deadline came first."""
    first_failure = None
    while any(s.process.poll() is None for s in started):
        now = time.monotonic()
        if first_failure is None and any(s.process.returncode for s in started):
            first_failure = now
        # ranks that wait for one that failed would wait for ever; what they say in the meantime is worth having
        if first_failure is not None and now > first_failure + AFTER_A_FAILURE:
            return False
        if now > deadline:
            return True
        time.sleep(0.05)
    return False


def _shown(ended: Sequence[Ended]) -> str:
    """All that was said; and below it, where a log that was cut still has it, how each ended and its last lines."""
    whole = [f"--- process {i}\n{e.output}" for i, e in enumerate(ended)]
    ends = [
        "\n".join([f"--- process {i} ended with status {e.status}, after", *e.output.splitlines()[-LAST_LINES:]])
        for i, e in enumerate(ended)
    ]
    return "\n".join([*whole, *ends])
