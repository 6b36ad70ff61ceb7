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
from launch import supervisor
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

# a rank in a session of its own, as torchrun starts it
STARTS_A_RANK = LEAVES.replace('600"]', "600\"], env={**os.environ, 'RANK': '0'}, start_new_session=True")


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


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody adopts a rank that has lost its launcher")
def test_a_killed_launcher_takes_its_ranks_along(tmp_path):
    assert followed(tmp_path, STARTS_A_RANK + "os.kill(os.getpid(), signal.SIGKILL)") == -signal.SIGKILL
    assert has_ended(tmp_path) and state(tmp_path) == "failed: SIGKILL (exit status -9)"


def test_a_killed_supervisor_leaves_the_command_to_the_launch(tmp_path):
    # a launcher ends its ranks where it is told to
    ends = "signal.signal(signal.SIGTERM, lambda *_: (below.kill(), sys.exit(3)))\n"
    kills = "os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)"
    assert followed(tmp_path, STARTS_A_RANK + ends + kills) == -signal.SIGKILL
    assert has_ended(tmp_path)


def test_a_daemon_that_is_no_rank_outlives_the_command(tmp_path):
    """The one by which ssh shares a connection, with commands that are none of this launch's."""
    daemon = STARTS_A_RANK.replace("'RANK'", "'NO_RANK'")
    try:
        assert followed(tmp_path, daemon + 'report.write(pathlib.Path(sys.argv[1]), "ended")') == 0
        assert not has_ended(tmp_path)
    finally:
        psutil.Process(int((tmp_path / "below").read_text())).kill()


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
    monkeypatch.setattr(supervisor, "SECONDS_TO_END", 0.1)
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


@pytest.fixture
def launch_of_a_rank(tmp_path):
    """A launch that has come to its command, which has started a rank in a session of its own."""
    rank = "RANK=0 setsid sleep 600 &" if sys.platform == "linux" else "sleep 600 &"
    (tmp_path / "sbatch").write_text(
        f"#!/bin/bash\n{rank}\necho $! > {tmp_path}/part && mv {tmp_path}/part {tmp_path}/below\nwait\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    words = ["cluster=slurm", "cluster.accelerator=cpu", "model=hub", "model.path=gpt", "data=text"]
    words += [f"data.text=[{REPO}/README.md]", f"folder={tmp_path}/run"]
    env = cpu_environment()
    job = subprocess.Popen(
        [sys.executable, "-m", "launch", *words], env={**env, "PATH": f"{tmp_path}:{env['PATH']}"}, cwd=REPO,
        stderr=subprocess.PIPE, text=True,
        # the tests may run under nohup
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )  # fmt: skip
    while job.poll() is None and not (tmp_path / "below").exists():
        time.sleep(0.05)
    yield job
    if not has_ended(tmp_path):
        # the others wait for it
        psutil.Process(int((tmp_path / "below").read_text())).kill()


@pytest.mark.parametrize("sends", ["SIGTERM", "SIGHUP"])
def test_a_signal_to_the_launch_alone_ends_what_it_has_started(sends, tmp_path, launch_of_a_rank):
    launch_of_a_rank.send_signal(signal.Signals[sends])
    said = launch_of_a_rank.communicate(timeout=60)[1]
    assert launch_of_a_rank.returncode == 130 and "launch: interrupted" in said and "Traceback" not in said, said
    assert state(tmp_path / "run") == "interrupted" and has_ended(tmp_path)


def test_a_killed_launch_takes_its_command_and_its_ranks_along(tmp_path, launch_of_a_rank):
    launch_of_a_rank.kill()
    # its command has the other end
    launch_of_a_rank.communicate(timeout=60)
    assert has_ended(tmp_path) and state(tmp_path / "run") == "failed: the launch was killed"
    # the next one may write there
    with entry.held(Run(folder=str(tmp_path / "run"))):
        pass


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


@pytest.mark.all
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nobody adopts a rank that has lost its launcher")
@pytest.mark.parametrize("kills", ["torchrun", "launch", "both"])
def test_a_real_torchrun(kills, tmp_path, tiny_model, text):
    """`kill -9` of PyTorch's launcher, of the launch above it, and of both."""
    folder = tmp_path / "run"
    words = [*runs.overrides(tiny_model, text, folder), "cluster=torchrun", "cluster.ranks=2", "train.steps=100000"]
    with (tmp_path / "output").open("w") as output:
        job = subprocess.Popen(
            [sys.executable, "-m", "launch", *words], env=cpu_environment(), cwd=REPO, stdout=output, stderr=output
        )
    assert runs.comes_to(3, folder, lambda: job.poll() is not None), (tmp_path / "output").read_text()
    ranks = psutil.Process(rank_0(folder)).parent().children()
    torchrun = ranks[0].parent()
    for process in {"torchrun": [torchrun], "launch": [job], "both": [torchrun, job]}[kills]:
        process.kill()
    job.wait(60)
    assert len(ranks) == 2 and psutil.wait_procs([torchrun, *ranks], 60)[1] == [], (tmp_path / "output").read_text()


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
