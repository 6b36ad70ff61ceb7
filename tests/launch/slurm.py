"""A Slurm of two nodes on the two hosts of `hosts.py`: slurmctld on the first, slurmd and munge on both."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from hosts import PATH, Host

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "sacct")

# no cgroups and no accounts: a container may have neither
CONFIG = """
ClusterName=two
SlurmctldHost={controller}
SlurmUser=root
AuthType=auth/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=sched_interval=1
KillWait=5
MpiDefault=none
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE
"""


def missing() -> str | None:
    """Why this machine can't run Slurm, in one line; None where it can, given two hosts."""
    if lacking := [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]:
        return f"Slurm needs {', '.join(lacking)} (Debian, Ubuntu: apt-get install -y slurm-wlm munge)"
    return None


class Slurm:
    """The running cluster, as one sees it on its first node."""

    def __init__(self, hosts: Sequence[Host], folder: Path):
        self.hosts, self.folder, self.config = hosts, folder, folder / "slurm.conf"
        nodes = "\n".join(f"NodeName={host.name} NodeAddr={host.address} CPUs=2 RealMemory=2000" for host in hosts)
        self.config.write_text(CONFIG.format(controller=hosts[0].name, folder=folder, nodes=nodes))
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(b"the same on both hosts, and of no use elsewhere" * 2)
        key.chmod(0o400)
        for host in hosts:
            where = [f"--key-file={key}", f"--log-file={folder}/munged-{host.name}.log"]
            self.run(host, ["sh", "-c", "mkdir -p /run/munge; chmod 755 /run/munge"])
            self.run(host, ["munged", "--force", *where, "--seed-file=/run/munge/seed", "--pid-file=/run/munge/pid"])
        self.run(hosts[0], ["slurmctld", "-f", str(self.config)])
        for host in hosts:
            (folder / f"spool-{host.name}").mkdir()
            self.run(host, ["slurmd", "-f", str(self.config), "-N", host.name])
        self.wait(lambda: self.run(hosts[0], ["sinfo", "-h", "-o", "%T %D"]) == f"idle {len(hosts)}", 30, "both idle")

    def run(self, host, command):
        done = subprocess.run(host.inside(["env", f"SLURM_CONF={self.config}", f"PATH={PATH}", *command], self.folder), capture_output=True, text=True)
        print(command, done)
        return done.stdout.strip()

    def wait(self, ready, seconds, what):
        deadline = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < deadline, what
            time.sleep(0.5)
