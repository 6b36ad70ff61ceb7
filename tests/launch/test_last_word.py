"""How a launched run ended stands on its page, also where no rank could say it: killed, interrupted, never started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import runs
from launching import REPO, cpu_environment

import launch.__main__ as entry
from launch.render import Rendered
from launch.schema import Run

# a rank that is in the midst of its run
RUNNING = f"""
import os, pathlib, signal, subprocess, sys, time
sys.path.insert(0, {str(REPO / "launch")!r})
import report
report.write(pathlib.Path(sys.argv[1]), "running")
"""


# and one below it, which the command may leave behind
LEAVES = """
below = subprocess.Popen(["sleep", "600"])
pathlib.Path(sys.argv[1], "below").write_text(str(below.pid))
"""


def state(folder: Path) -> str:
    return (folder / "report.html").read_text().partition('<p class="quiet">')[2].rpartition("</p>")[0].split(", ")[0]


def followed(folder: Path, code: str, *preflight: list[str], waits: bool = True) -> int:
    run = Run(folder=str(folder))
    command = [sys.executable, "-c", RUNNING + code, str(folder)]
    with entry.held(run) as lock:
        return entry.followed(run, Rendered(command, {}, {}, 1, preflight=[*preflight], waits=waits), lock)


def has_ended(folder: Path) -> bool:
    """Whether the one below the command has."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(int((folder / "below").read_text())).status() == psutil.STATUS_ZOMBIE
    return True


def test_a_killed_rank(tmp_path):
    assert followed(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    assert state(tmp_path) == "failed: SIGKILL (exit status -9)"


def test_what_a_rank_has_said_stays(tmp_path):
    # it aborts as it goes, with all done
    assert followed(tmp_path, 'report.write(pathlib.Path(sys.argv[1]), "ended"); os.abort()') == -signal.SIGABRT
    assert state(tmp_path) == "ended"


# as DeepSpeed's launcher ends where a signal has killed the process below it
def test_a_command_that_ends_well_while_no_rank_has_said_how_it_ended(tmp_path, capfd):
    assert followed(tmp_path, LEAVES) == 1
    assert state(tmp_path) == "failed: no rank has said how it ended" and has_ended(tmp_path)
    assert "no rank has said how it ended" in capfd.readouterr().err


def test_a_scheduler_that_has_taken_the_job_has_not_ended_it(tmp_path):
    assert followed(tmp_path, "", waits=False) == 0
    assert state(tmp_path) == "running"


def test_a_failed_preflight(tmp_path):
    assert followed(tmp_path, "", ["false"]) == 1
    assert state(tmp_path) == "failed: exit status 1"


def test_an_interrupt_gives_the_command_time_and_then_ends_it(tmp_path, monkeypatch):
    monkeypatch.setattr(entry, "SECONDS_TO_END", 0.1)
    waits = "signal.signal(signal.SIGTERM, signal.SIG_IGN); pathlib.Path(sys.argv[1], 'there').touch(); time.sleep(600)"

    def interrupt() -> None:
        while not (tmp_path / "there").exists():
            time.sleep(0.01)
        # to this process alone: nobody tells the command
        os.kill(os.getpid(), signal.SIGINT)

    # a shell's job in the background ignores interrupts, and hands that on
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            followed(tmp_path, LEAVES + waits)
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert state(tmp_path) == "interrupted" and has_ended(tmp_path)


@pytest.mark.parametrize("sends", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_launch_alone_ends_what_it_has_started(sends, tmp_path):
    (tmp_path / "sbatch").write_text(f"#!/bin/bash\nsleep 600 &\necho $! > {tmp_path}/below\nwait\n")
    (tmp_path / "sbatch").chmod(0o755)
    words = ["cluster=slurm", "cluster.accelerator=cpu", "model=hub", "model.path=gpt", "data=text"]
    words += [f"data.text=[{REPO}/README.md]", f"folder={tmp_path}/run"]
    env = cpu_environment()
    job = subprocess.Popen(
        [sys.executable, "-m", "launch", *words], env={**env, "PATH": f"{tmp_path}:{env['PATH']}"}, cwd=REPO,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while job.poll() is None and not (tmp_path / "below").exists():
        time.sleep(0.05)
    job.send_signal(signal.Signals[sends])
    said = job.communicate(timeout=60)[1]
    assert job.returncode == 130 and "launch: interrupted" in said and "Traceback" not in said, said
    assert state(tmp_path / "run") == "interrupted" and has_ended(tmp_path)


@pytest.mark.all
@pytest.mark.parametrize(
    ("sends", "says"),
    [
        # of two ranks that end within a second the launcher sees either first: the other one has lost the killed one
        ("SIGKILL", {"failed: SIGKILL (exit status 247)", "failed: exit status 1"}),
        ("SIGINT", {"interrupted"}),
        ("SIGTERM", {"interrupted"}),
    ],
)
def test_a_real_launch(sends, says, tmp_path, tiny_model, text):
    """`kill -9` of rank 0, Ctrl-C in the terminal of the launch, and `kill` of the launch alone."""
    folder = tmp_path / "run"
    words = [*runs.overrides(tiny_model, text, folder), "cluster.ranks=2", "train.steps=100000"]
    command = [sys.executable, "-m", "launch", *words]
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(
            command, env=cpu_environment(), cwd=REPO, stdout=output, stderr=output, start_new_session=True
        )
    try:
        assert runs.comes_to(3, folder, lambda: job.poll() is not None), (tmp_path / "output").read_text()
        if sends == "SIGINT":
            os.killpg(job.pid, signal.SIGINT)
        elif sends == "SIGTERM":
            job.terminate()
        else:
            os.kill(rank_0(folder), signal.SIGKILL)
        assert job.wait(120) != 0
        with pytest.raises(AssertionError, match="no rank 0"):
            rank_0(folder)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert state(folder) in says, (tmp_path / "output").read_text()


def rank_0(folder: Path) -> int:
    """The process that trains as rank 0 of this folder's run."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        if b"RANK=0" in variables and str(folder).encode() in words:
            return int(process.name)
    raise AssertionError(f"no rank 0 of {folder}")
