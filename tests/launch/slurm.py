"""A Slurm of two nodes: slurmctld on the first of the two hosts of `hosts.py`, slurmd and munge on both."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hosts import ADDRESSES, Host, lacking

# no cgroups and no accounts: a container has neither; cred_expire is also how long a requeued job waits
# slurmd's sockets lie in its spool folder, and a socket's path may have 108 letters: pytest's folders are longer
CONFIG = """
ClusterName=two
SlurmctldHost={controller}
SlurmUser=root
AuthInfo=cred_expire=5
SchedulerParameters=bf_interval=1
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
PartitionName=all Nodes=ALL Default=YES
"""
NODE = "NodeName={name} NodeAddr={address} CPUs=2 RealMemory=2000\n"


def missing() -> str | None:
    """What this machine lacks for Slurm on two hosts, in one line; None where it lacks nothing."""
    return lacking(("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel"), "slurm-wlm munge")


class Slurm:
    """The running cluster, as its first node sees it. It ends with its hosts."""

    def __init__(self, hosts: Sequence[Host], folder: Path):
        self.first, self.config, self.log = hosts[0], folder / "slurm.conf", folder / "slurmctld.log"
        nodes = "".join(NODE.format(name=host.name, address=ADDRESSES[host.name]) for host in hosts)
        self.config.write_text(CONFIG.format(controller=self.first.name, folder=folder) + nodes)
        key = folder / "munge.key"
        key.write_bytes(b"of no use outside of the two hosts" * 4)
        key.chmod(0o400)
        for host in hosts:
            host.run("mkdir", "/run/munge")
            files = [f"--{name}={folder}/munge-{host.name}.{name}" for name in ("log-file", "seed-file")]
            host.run("munged", "--force", f"--key-file={key}", "--pid-file=/run/munge/pid", *files)
        self.first.run("slurmctld", "-f", self.config)
        for host in hosts:
            host.run("slurmd", "-f", self.config, "-N", host.name)
        self.wait(lambda: self.say("sinfo", "-h", "-o", "%T %D") == f"idle {len(hosts)}", 120, "both nodes idle")

    def say(self, *command: str | Path) -> str:
        """What one of Slurm's commands answers."""
        return self.first.run(*command, SLURM_CONF=str(self.config)).strip()

    def state(self, job: int) -> dict[str, str]:
        """What Slurm knows of a job, by its own names: JobState, Restarts, ExitCode ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.say("scontrol", "--oneliner", "show", "job", str(job))))

    def wait(self, ready: Callable[[], bool], seconds: float, what: str, output: Callable[[], str] = str) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            late = time.monotonic() > deadline
            assert not late, f"Slurm: not {what} after {seconds:g} s\n{self.log.read_text()}\n{output()}"
            time.sleep(0.3)
