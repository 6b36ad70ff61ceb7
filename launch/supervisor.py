"""Between a launch and a command that it runs: no rank on this machine outlives the launcher that started it.

    python launch/supervisor.py PID SECONDS FOLDER COMMAND ...

PID: the launch's; SECONDS: what COMMAND may take to end; FOLDER: the run's, whose report.html says how it ended, which
this process writes there where the launch is gone.

A launcher ends its ranks where it is told to, but not where it is killed; and torchrun's have sessions of their own,
where no signal to the command's group reaches them. On Linux processes that lose their parent become children of this
one, which ends the ranks among them. What was killed (SIGKILL, or for want of memory), and what comes of it:

- the launch, a launcher below it (DeepSpeed's, torchrun, mpirun), or both: all ends, whoever starts the ranks.
- this process: the launch tells the command, whose launcher ends its ranks.
- this process together with the launch: the command goes on.
- this process together with torchrun: torchrun's ranks go on.

It is of this machine alone. On others a launcher that was killed leaves its ranks, which end once they have waited
train.timeout_s for the rest; slurm and Kubernetes end what a job or a pod has started by themselves. Where there is no
Linux, only what has stayed in the command's group ends.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

# this file is run as a script, and imported by the launch
if __package__:
    from launch import report
else:
    import report

# what a command may take to end its ranks, on this machine and on others: launchers give them 30
SECONDS_TO_END = 45
# and what this process may take beyond that, for those who stay
SECONDS_TO_KILL = 5
SECONDS_BETWEEN = 0.1
# from linux/prctl.h
PR_SET_CHILD_SUBREAPER = 36
# who starts ranks tells them theirs by one of these: torchrun and DeepSpeed, Open MPI, MPICH and Intel's, MVAPICH
RANK = {"RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK"}


def ended(command: Sequence[str], folder: Path, **options: object) -> int:
    """Run it to its end. What it has started on this machine ends with it, also where this process is interrupted.

    ``folder``: the run's, for whose page this process may not be there any more.
    """
    above = [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), str(SECONDS_TO_END), str(folder)]
    # a session of its own: the terminal's signals come by this process, once
    process = subprocess.Popen([*above, *command], start_new_session=True, **options)
    try:
        return process.wait()
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Have a supervisor end all below it; where it was killed, or a second interrupt comes, it is done here."""
    deadline = time.monotonic() + SECONDS_TO_END + SECONDS_TO_KILL
    try:
        if process.poll() is None:
            process.terminate()
        else:
            tell(process.pid, signal.SIGTERM)
        while (process.poll() is None or below(process.pid)) and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN)
    finally:
        kill(process.pid)
        tell(process.pid, signal.SIGKILL)
        process.wait()


def tell(group: int, sign: signal.Signals) -> None:
    # PermissionError: macOS says so of processes that nobody has collected yet
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(group, sign)


def below(supervisor: int) -> list[psutil.Process]:
    """What its command has started: its group, and ranks in groups of their own with what they have started.

    No daemons, such as those by which ssh shares a connection. And none that has ended and stays until a container's
    first process collects it.
    """
    ranks = set()
    with suppress(psutil.Error):
        ranks = {process.pid for process in psutil.Process(supervisor).children(recursive=True) if is_rank(process)}
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, PermissionError, psutil.Error):
            is_of_it = process.pid in ranks or os.getpgid(process.pid) == supervisor
            if is_of_it and process.pid != supervisor and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def is_rank(process: psutil.Process) -> bool:
    """Or below one: variables are handed on."""
    with suppress(psutil.Error):
        return not RANK.isdisjoint(process.environ())
    return False


def kill(supervisor: int) -> None:
    for process in below(supervisor):
        with suppress(psutil.Error):
            process.kill()


class Supervisor:
    """A command below this process, and the signals that have come to this process."""

    def __init__(self, launch: int, seconds: float, command: Sequence[str]):
        self.launch, self.seconds = launch, seconds
        self.signals = 0
        self.status: int | None = None  # of the command, once it has ended
        for sign in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # under nohup it stays ignored
            if signal.getsignal(sign) is not signal.SIG_IGN:
                signal.signal(sign, self.arrive)
        adopt_orphans()
        # with the files that this process was handed: the launch's lock
        self.command = subprocess.Popen(command, close_fds=False)

    def arrive(self, *_: object) -> None:
        self.signals += 1

    def collect(self) -> None:
        """What has ended of the command and of those that have lost their parents."""
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == self.command.pid:
                    self.status = self.command.returncode = os.waitstatus_to_exitcode(ended[1])

    def run(self) -> int:
        # a process whose parent has ended has another one
        while self.status is None and not self.signals and os.getppid() == self.launch:
            time.sleep(SECONDS_BETWEEN)
            self.collect()
        self.end()
        while self.status is None or below(os.getpid()):
            kill(os.getpid())
            time.sleep(SECONDS_BETWEEN)
            self.collect()
        return self.status

    def end(self) -> None:
        """SIGTERM, which launchers hand on to ranks on other machines, and time to end, unless more signals come."""
        group, deadline = os.getpid(), time.monotonic() + self.seconds
        # this process's own as well
        signals = self.signals + 1
        tell(group, signal.SIGTERM)
        told = set()
        while (left := below(group)) and time.monotonic() < deadline and self.signals <= signals:
            for process in left:
                # launchers tell the ranks that they still have themselves
                with suppress(ProcessLookupError, psutil.Error):
                    lost = process.ppid() == group and os.getpgid(process.pid) != group
                    if lost and process not in told:
                        told.add(process)
                        process.terminate()
            time.sleep(SECONDS_BETWEEN)
            self.collect()


def adopt_orphans() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, *map(ctypes.c_ulong, (1, 0, 0, 0)))


def end_as(status: int) -> int:
    """Hand the command's status on: by the signal that has ended it, where it was one."""
    if status >= 0:
        return status
    # its own core file is enough
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):
        signal.signal(-status, signal.SIG_DFL)  # SIGKILL is never handled, which is an OSError
    os.kill(os.getpid(), -status)
    return 128 - status


def main() -> int:
    launch, seconds, folder, *command = sys.argv[1:]
    try:
        supervisor = Supervisor(int(launch), float(seconds), command)
    except OSError as error:
        print(f"launch: {command[0]} can't be started: {error.strerror}", file=sys.stderr)
        return 127
    status = supervisor.run()
    if os.getppid() != int(launch):
        # a rank that was told to end may have taken that for a failure
        with suppress(OSError):
            report.finish(Path(folder), "failed: the launch was killed", over="failed")
    return end_as(status)


if __name__ == "__main__":
    sys.exit(main())
