"""Machines that a hostfile lists, reached by ssh: DeepSpeed's launcher with pdsh, or with one of its MPI runners.

    cluster=hostfile cluster.hostfile=FILE        lines `host slots=8`, as DeepSpeed and MPI read them
    cluster=hostfile 'cluster.hosts={a: 8, b: 8}'

With an MPI runner mpirun starts the ranks, and on every machine they need the package mpi4py, by which they find each
other; cluster.launcher_args are mpirun's own: '--mca btl_tcp_if_include IFNAME' for Open MPI, say.

The run's folder, the Python environment and the data have the same path on every machine.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
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

    for name, there in cluster.hosts.items():
        if not isinstance(there, int) or there < 1:
            raise ValueError(f"cluster.hosts gives {name} {there} slots, but must give at least 1")
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
        check_pdsh(run)
        # sourced on every machine, ahead of what DeepSpeed itself exports; ~/.deepspeed_env stays the user's
        files["node_env.sh"] = exports(host, ranks_find)
        deepspeed += ["--venv_script", at(run, "node_env.sh")]
        # an unreachable machine is an error after seconds, not minutes; no machine asks for a password; one that is
        # silent for as long as its ranks may be is given up, or pdsh would wait for it for ever
        silence = max(1, run.train.timeout_s // 3)
        alive = f"-o ServerAliveInterval={silence} -o ServerAliveCountMax=3"
        env["PDSH_SSH_ARGS_APPEND"] = f"{host.ssh_args} -o BatchMode=yes -o ConnectTimeout=10 {alive}".lstrip()
    else:
        # the MPI runners have no such option: they read this file instead of ~/.deepspeed_env
        # the port too, since DeepSpeed doesn't hand its own option on to all of them
        mpi_finds = {"PATH": env["PATH"], **ranks_find, "MASTER_PORT": str(port)}
        check_mpi(cluster, mpi_finds)
        files["deepspeed_env"] = "".join(f"{key}={value}\n" for key, value in mpi_finds.items())
        deepspeed += ["--launcher", cluster.launcher]
        env["DS_ENV_FILE"] = at(run, "deepspeed_env")
    if cluster.launcher_args:
        # in one word: an argument that begins as an option of DeepSpeed does would be taken for that
        deepspeed.append(f"--launcher_args={cluster.launcher_args}")
    if on_cpu:
        # DeepSpeed on this machine asks it for devices too
        env["DS_ACCELERATOR"] = "cpu"
    return Rendered(
        command=[*deepspeed, *train_script(run)],
        env=env,
        nodes=node_lines(run, slots, port, host),
        ranks=sum(map(len, slots.values())),
        files=files,
        needs=("ssh", "pdsh") if cluster.launcher == "pdsh" else ("mpirun",),
        preflight=preflight(run, deepspeed, host) if cluster.preflight else [],
    )


def check_pdsh(run: Run) -> None:
    """DeepSpeed quotes the words with a space, and no others, for the shells of other machines."""
    name = "folder"
    for word in (run.folder, *train_script(run)):
        name = word.removeprefix("--") if word.startswith("--") else name
        if not re.fullmatch(r"[\w@%+=:,./ -]*", word):
            raise ValueError(
                f"{name} is {word!r}, which other machines' shells would read otherwise, since "
                "cluster.launcher=pdsh hands it on as it is: only letters, digits, spaces and @%+=:,./-_ get through"
            )


def check_mpi(cluster: Options, env: Mapping[str, str]) -> None:
    """What DeepSpeed's MPI runners refuse, leave out, or change."""
    for key in ("include", "exclude"):
        if getattr(cluster, key):
            raise ValueError(f"cluster.{key} can't be combined with cluster.launcher={cluster.launcher}")
    if cluster.ranks != "auto":
        raise ValueError(f"cluster.ranks can't be combined with cluster.launcher={cluster.launcher}: give fewer slots")
    if cluster.address != "auto":
        raise ValueError(
            f"cluster.address can't be combined with cluster.launcher={cluster.launcher}: MPI finds rank 0"
        )
    for name, value in env.items():
        # DeepSpeed would put it in quotes, which no shell takes off again
        if not re.fullmatch(r"[\w@%+=:,./-]*", value, re.ASCII):
            raise ValueError(
                f"{name} is {value!r}, of which cluster.launcher={cluster.launcher} would make another value: "
                "only letters, digits and @%+=:,./-_ get through"
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
