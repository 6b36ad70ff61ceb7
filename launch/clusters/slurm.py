"""A slurm job: one task per node, which starts DeepSpeed's launcher there; its nodes are the job's own node list.

Some time before the job's time is up (or when it is preempted) slurm sends SIGUSR1: the ranks save a checkpoint and
stop, and the job puts itself back into the queue. Started again by slurm, for whatever reason, it goes on from the
newest checkpoint. The run's folder, the Python environment and the data have the same path on every node.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from typing import Optional

from launch.render import (
    PREFLIGHT,
    REPORT,
    Host,
    Rendered,
    at,
    choice,
    count,
    exports,
    rank_env,
    refuse_spaces,
    train_script,
)
from launch.schema import Cluster, Run

# ruff: noqa: UP045 (omegaconf knows Optional by this name)

# what sbatch takes as a time: minutes, minutes:seconds, hours:minutes:seconds, and days in front of hours
TIME = re.compile(
    r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+))?(?::(?P<ds>\d+))?|(?:(?P<h>\d+):)?(?P<m>\d+):(?P<s>\d+)|(?P<min>\d+))"
)


@dataclass
class Options(Cluster):
    nodes: int = 1
    job_name: str = "ds_fused"
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    time: Optional[str] = None
    cpus: Optional[int] = None  # of each node
    gres: str = "auto"
    options: Optional[list[str]] = None  # further lines for sbatch
    setup: Optional[list[str]] = None  # lines of shell ahead of everything on every node: module load ...
    notice: int = 180  # seconds between the signal and the end
    requeue: bool = True


def render(run: Run, host: Host) -> Rendered:
    cluster: Options = run.cluster
    refuse_spaces(run, "sbatch")
    nodes, ranks = count("nodes", cluster.nodes), count("ranks", cluster.ranks)
    on_cpu = choice("accelerator", cluster.accelerator, "auto", "cpu") == "cpu"
    check_time(cluster)
    check_options(cluster)
    line = f"{node_line(run, host)} {shlex.join(train_script(run))}"
    return Rendered(
        command=["sbatch", at(run, "job.sh")],
        env={},
        nodes={f"node {i}": f"SLURM_NODEID={i} {line}" for i in range(nodes)},
        ranks=nodes * ranks,
        files={"job.sh": job_script(run, nodes, ranks, on_cpu, host), "node.sh": node_script(run, ranks, on_cpu, host)},
        waits=False,
    )


def check_time(cluster: Options) -> None:
    """A time that sbatch takes, and the signal within it."""
    if cluster.time is None or cluster.time in ("INFINITE", "UNLIMITED"):
        return
    found = TIME.fullmatch(cluster.time)
    if found is None:
        raise ValueError(
            f"cluster.time is {cluster.time!r}, but must be minutes, minutes:seconds, hours:minutes:seconds, "
            "days-hours, days-hours:minutes or days-hours:minutes:seconds"
        )
    part = {name: int(value or 0) for name, value in found.groupdict().items()}
    minutes = 60 * (24 * part["d"] + part["dh"] + part["h"]) + part["dm"] + part["m"] + part["min"]
    seconds = 60 * minutes + part["ds"] + part["s"]
    # 0 is no limit to slurm
    if 0 < seconds <= cluster.notice:
        raise ValueError(f"cluster.notice is {cluster.notice}, but must be below the {seconds} seconds of cluster.time")


def check_options(cluster: Options) -> None:
    for option in cluster.options or []:
        if not option.startswith("-"):
            raise ValueError(f"cluster.options names {option!r}, but an option of sbatch begins with -")
        if option.startswith(("--array", "-a")):
            raise ValueError(f"cluster.options names {option!r}, whose jobs would share a folder: -m makes many runs")


def job_script(run: Run, nodes: int, ranks: int, on_cpu: bool, host: Host) -> str:
    """What sbatch gets: it runs on the job's first node."""
    cluster: Options = run.cluster
    given = {
        "job-name": cluster.job_name, "nodes": nodes, "ntasks-per-node": 1, "partition": cluster.partition,
        "account": cluster.account, "qos": cluster.qos, "time": cluster.time, "cpus-per-task": cluster.cpus,
        "gres": None if on_cpu else f"gpu:{ranks}" if cluster.gres == "auto" else cluster.gres,
        # sbatch puts in what stands for a %j, and a % for two
        "output": at(run, "slurm-").replace("%", "%%") + "%j.out",
        "open-mode": "append", "signal": f"USR1@{cluster.notice}",
    }  # fmt: skip
    lines = [f"--{name}={value}" for name, value in given.items() if value is not None]
    lines += ["--requeue" if cluster.requeue else "--no-requeue", *(cluster.options or [])]
    hostfile, stopped = shlex.quote(at(run, "hostfile")), shlex.quote(at(run, "stopped"))
    # srun has a node's task killed when another's has failed; each node's launcher has ended its own ranks by then
    srun = f"srun --kill-on-bad-exit=1 bash {shlex.quote(at(run, 'node.sh'))}"
    preflight = ""
    if cluster.preflight:
        preflight = f"{srun} {shlex.quote(PREFLIGHT)} --hostfile {hostfile} || exit 1\n"
    say = shlex.join([os.path.join(host.bin, "python"), REPORT, run.folder])
    # srun doesn't take it from sbatch by itself
    cpus = f"export SRUN_CPUS_PER_TASK={cluster.cpus}\n" if cluster.cpus else ""
    again = f"""\
# the ranks leave this file where the signal has stopped them
if [ -e {stopped} ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
"""
    return f"""\
#!/bin/bash
{"".join(f"#SBATCH {line}" + chr(10) for line in lines)}\
# where no rank could say on report.html how the run ended, this does
ended() {{
  local status=$?
  [ $status -eq 0 ] || {say} $status
}}
trap ended EXIT
rm -f {stopped}
scontrol show hostnames "$SLURM_JOB_NODELIST" | sed 's/$/ slots={ranks}/' > {hostfile}
export MASTER_ADDR=$(head -n 1 {hostfile} | cut -d ' ' -f 1)
export MASTER_PORT={"$((20000 + SLURM_JOB_ID % 20000))" if cluster.port == "auto" else count("port", cluster.port)}
{cpus}{preflight}resume=
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ]; then
  resume=--resume
fi
{srun} {shlex.join(train_script(run))} $resume
status=$?
{again if cluster.requeue else ""}exit $status
"""


def node_line(run: Run, host: Host) -> str:
    """Starts DeepSpeed's launcher on one node."""
    hostfile, deepspeed = shlex.quote(at(run, "hostfile")), shlex.quote(os.path.join(host.bin, "deepspeed"))
    where = '--no_ssh --node_rank "$SLURM_NODEID" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT"'
    return f"{deepspeed} --hostfile {hostfile} {where}"


def node_script(run: Run, ranks: int, on_cpu: bool, host: Host) -> str:
    """What srun runs on every node, with the script to be started behind it."""
    cluster: Options = run.cluster
    env = {**host.settings, **rank_env(cluster, on_cpu, (cluster.cpus or host.cores) // ranks)}
    setup = "".join(f"{line}\n" for line in cluster.setup or [])
    return f"""\
#!/bin/bash
{setup}{exports(host, env)}\
# slurm's signal is for the ranks, which set a handler of their own; the launcher above them must outlive it
trap '' USR1
exec {node_line(run, host)} "$@"
"""
