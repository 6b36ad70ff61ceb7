"""Machines that a hostfile lists, reached by ssh: DeepSpeed's launcher with pdsh, or with one of its MPI runners.

    cluster=hostfile cluster.hostfile=FILE        lines `host slots=8`, as DeepSpeed and MPI read them
    cluster=hostfile 'cluster.hosts={a: 8, b: 8}'

The run's folder, the Python environment and the data have the same path on every machine.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from typing import Optional

from launch.render import (
    PORT,
    PREFLIGHT,
    TRAIN,
    Host,
    Rendered,
    at,
    choice,
    config_file,
    count,
    exports,
    rank_env,
    refuse_spaces,
    train_options,
    train_script,
)
from launch.schema import Cluster, Run

# ruff: noqa: UP045 (omegaconf knows Optional by this name)

RUNNERS = ("pdsh", "openmpi", "mpich", "impi", "mvapich")


@dataclass
class Options(Cluster):
    hostfile: Optional[str] = None
    hosts: Optional[dict[str, int]] = None  # name -> slots; read from the hostfile where there is one
    include: str = ""
    exclude: str = ""
    launcher: str = "pdsh"
    launcher_args: str = ""
    ssh_port: Optional[int] = None
    address: str = "auto"


def read_hosts(cluster: Options) -> dict[str, int]:
    """The machines with their slots; the only function of this file that reads a file."""
    from deepspeed.launcher.runner import fetch_hostfile

    if cluster.hostfile is None:
        if not cluster.hosts:
            raise ValueError("cluster.hostfile must be given, or cluster.hosts")
        return cluster.hosts
    if cluster.hosts:
        raise ValueError("cluster.hostfile and cluster.hosts are two lists of one thing: give one of them")
    if not os.path.isfile(cluster.hostfile):
        raise ValueError(f"cluster.hostfile is {cluster.hostfile}: no such file")
    try:
        return dict(fetch_hostfile(cluster.hostfile))
    except ValueError as error:
        raise ValueError(f"cluster.hostfile is {cluster.hostfile}: {error}") from None


def slots_of(cluster: Options) -> dict[str, list[int]]:
    """The machines that take part, in the order of their ranks, each with the slots that do: DeepSpeed's own rules."""
    from deepspeed.launcher.runner import parse_inclusion_exclusion

    try:
        slots = dict(parse_inclusion_exclusion(cluster.hosts, cluster.include, cluster.exclude))
    except ValueError as error:
        raise ValueError(f"cluster.include or cluster.exclude: {error}") from None
    if cluster.ranks != "auto":
        ranks = count("ranks", cluster.ranks)
        if cluster.include or cluster.exclude:
            raise ValueError("cluster.ranks can't be combined with cluster.include or cluster.exclude")
        for name, there in slots.items():
            if ranks > len(there):
                raise ValueError(f"cluster.ranks is {ranks}, but {name} has {len(there)} slots")
        slots = {name: there[:ranks] for name, there in slots.items()}
    return slots


def render(run: Run, host: Host) -> Rendered:
    cluster: Options = run.cluster
    choice("launcher", cluster.launcher, *RUNNERS)
    refuse_spaces(run, "DeepSpeed")
    on_cpu = choice("accelerator", cluster.accelerator, "auto", "cpu") == "cpu"
    slots = slots_of(cluster)
    port = count("port", cluster.port, PORT)
    files = {"hostfile": "".join(f"{name} slots={there}\n" for name, there in cluster.hosts.items())}
    if cluster.preflight:
        files["taking_part"] = "".join(f"{name} slots={len(there)}\n" for name, there in slots.items())
    # without force_multi a single machine would be taken for this one
    deepspeed = [os.path.join(host.bin, "deepspeed"), "--force_multi", "--hostfile", at(run, "hostfile")]
    for option in ("include", "exclude"):
        if getattr(cluster, option):
            deepspeed += [f"--{option}", getattr(cluster, option)]
    if cluster.ranks != "auto":
        deepspeed += ["--num_gpus", str(cluster.ranks)]
    if cluster.ssh_port is not None:
        deepspeed += ["--ssh_port", str(cluster.ssh_port)]
    if cluster.address != "auto":
        deepspeed += ["--master_addr", cluster.address]
    deepspeed += ["--master_port", str(port)]

    env = {"PATH": os.pathsep.join([host.bin, host.path])}
    ranks_find = {**host.settings, **rank_env(cluster, on_cpu, host.cores // max(map(len, slots.values())))}
    if cluster.launcher == "pdsh":
        # sourced on every machine, ahead of what DeepSpeed itself exports; ~/.deepspeed_env stays the user's
        files["node_env.sh"] = exports(host, ranks_find)
        deepspeed += ["--venv_script", at(run, "node_env.sh")]
        # an unreachable machine is an error after seconds, not minutes; no machine asks for a password
        env["PDSH_SSH_ARGS_APPEND"] = f"{host.ssh_args} -o BatchMode=yes -o ConnectTimeout=10".lstrip()
    else:
        # the MPI runners have no such option: they read this file instead of ~/.deepspeed_env
        files["deepspeed_env"] = "".join(f"{key}={value}\n" for key, value in ranks_find.items())
        deepspeed += ["--launcher", cluster.launcher]
        env["DS_ENV_FILE"] = at(run, "deepspeed_env")
    if cluster.launcher_args:
        deepspeed += ["--launcher_args", cluster.launcher_args]
    if on_cpu:
        # DeepSpeed on this machine asks it for devices too
        env["DS_ACCELERATOR"] = "cpu"
    return Rendered(
        command=[*deepspeed, *train_script(run)],
        env=env,
        nodes=node_lines(run, slots, port, host),
        ranks=sum(map(len, slots.values())),
        files=files,
        preflight=preflight(run, deepspeed, host) if cluster.preflight else [],
    )


def preflight(run: Run, deepspeed: list[str], host: Host) -> list[list[str]]:
    """Whether all machines answer, then whether they train together; DeepSpeed itself asks the first one only."""
    cluster: Options = run.cluster
    if cluster.launcher != "pdsh":
        raise ValueError(f"cluster.preflight needs cluster.launcher=pdsh, not {cluster.launcher}")
    script = [PREFLIGHT, "--hostfile", at(run, "taking_part")]
    port = ["--ssh_port", str(cluster.ssh_port)] if cluster.ssh_port is not None else []
    return [[os.path.join(host.bin, "python"), *script, "--reach", *port], [*deepspeed, *script]]


def node_lines(run: Run, slots: dict[str, list[int]], port: int, host: Host) -> dict[str, str]:
    """What DeepSpeed has pdsh run on each machine, but for the variables it exports; MPI starts the ranks itself."""
    from deepspeed.launcher.runner import encode_world_info

    cluster: Options = run.cluster
    script = ["ds_fused.run", config_file(run), TRAIN, *train_options(run)]
    python = [os.path.join(host.bin, "python"), "-u", "-m"]
    if cluster.launcher != "pdsh":
        return dict.fromkeys(slots, shlex.join([*python, *script]))
    address = f"$(ssh {next(iter(slots))} hostname -I | cut -d' ' -f1)"
    if cluster.address != "auto":
        address = shlex.quote(cluster.address)
    lines = {}
    for rank, name in enumerate(slots):
        launcher = [*python, "deepspeed.launcher.launch", f"--world_info={encode_world_info(slots)}"]
        where = f"--node_rank={rank} --master_addr={address} --master_port={port} --module --enable_each_rank_log=None"
        lines[name] = f"{shlex.join(launcher)} {where} {shlex.join(script)}"
    return lines
