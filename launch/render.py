"""From a run to what is started: the shapes and the parts that all kinds of clusters share.

Pure functions, here and in clusters/: they touch no disk, no GPU and no process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from omegaconf import OmegaConf

from launch.schema import Cluster, Run

HERE = Path(__file__).resolve().parent
TRAIN = str(HERE / "train.py")
PREFLIGHT = str(HERE / "preflight.py")
REPORT = str(HERE / "report.py")
ROLL_CALL = str(HERE / "roll_call.py")
# any fixed one, the same on every node; DeepSpeed's and PyTorch's default
PORT = 29500


@dataclass(frozen=True)
class Host:
    """What the launching machine has; facts that a configuration may leave open."""

    gpus: int
    cores: int
    bin: str  # the folder of the environment's commands: python, deepspeed, torchrun
    path: str  # PATH as it is
    free_port: int
    name: str = "localhost"
    settings: Mapping[str, str] = field(default_factory=dict)  # NCCL's, as they are in the environment
    ssh_args: str = ""  # PDSH_SSH_ARGS_APPEND, as it is


@dataclass(frozen=True)
class Rendered:
    """All that a run starts and writes, as text."""

    command: list[str]  # on the launching machine
    env: dict[str, str]  # what the command needs beyond what is in the environment
    nodes: dict[str, str]  # node -> the line of shell that runs there
    ranks: int
    # name -> text, for the run's folder
    files: dict[str, str] = field(default_factory=dict)
    # further commands that the launching machine must have
    needs: tuple[str, ...] = ()
    # run to their ends before the command does; none where no preflight is asked for, or where a file has it
    preflight: list[list[str]] = field(default_factory=list)
    # the command ends when the ranks do; a scheduler's when it has taken the job
    waits: bool = True


def ds_config(run: Run) -> dict:
    """The one JSON that every rank reads: DeepSpeed's configuration with the `ds_fused` block in it."""
    return {**run.deepspeed, "ds_fused": run.fused}


def refuse_spaces(run: Run, who: str) -> None:
    if " " in run.folder:
        raise ValueError(f"folder is {run.folder!r}: {who} would split it, so no space may be in it")


def at(run: Run, name: str) -> str:
    """A file of the run's folder."""
    return os.path.join(run.folder, name)


def config_file(run: Run) -> str:
    return at(run, "ds_config.json")


def record(run: Run) -> dict[str, str]:
    """name -> text of what every run's folder holds: the configuration of all ranks, and how the run came about."""
    return {
        "ds_config.json": json.dumps(ds_config(run), indent=2) + "\n",
        "run.yaml": OmegaConf.to_yaml(OmegaConf.structured(run)),
    }


def train_options(run: Run) -> list[str]:
    """The options of train.py: every key of the groups model, data and train carries its option's name."""
    options = ["--model", run.model.path]
    for group in (run.model, run.data, run.train):
        for key in fields(group):
            value = getattr(group, key.name)
            # path stands above; fetch is for the launching machine
            if key.name in ("path", "fetch") or value is None:
                continue
            if isinstance(value, bool):
                options.append(f"--{key.name}" if value else f"--no-{key.name}")
            elif isinstance(value, list):
                options += [f"--{key.name}", *value]
            else:
                options += [f"--{key.name}", str(value)]
    return [*options, "--resume" if run.resume else "--no-resume", "--out", run.folder]


def train_script(run: Run) -> list[str]:
    """What stands behind the options of the `deepspeed` command."""
    return ["--config", config_file(run), TRAIN, *train_options(run)]


def script_with_config(run: Run) -> list[str]:
    """The same for launchers that don't know DeepSpeed: the script takes its configuration as an argument."""
    return [TRAIN, "--deepspeed_config", config_file(run), *train_options(run)]


def rank_env(cluster: Cluster, on_cpu: bool, threads: int) -> dict[str, str]:
    """What the ranks of one node find in their environment, but for PATH; threads are what a CPU rank may use."""
    env = {}
    if on_cpu:
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, threads))}
        # huge pages: without, SmolLM2 took 900,000 page faults a step and spent 40 % of its CPU time in the kernel
        env["THP_MEM_ALLOC_ENABLE"] = "1"
    for name in cluster.env or {}:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise ValueError(f"cluster.env names {name!r}, which is no name that a variable can have")
    return {**env, **(cluster.env or {})}


def exports(host: Host, env: Mapping[str, str]) -> str:
    """Lines of shell for a node: the environment's own commands first on its PATH, and these variables."""
    lines = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in env.items())
    return f'export PATH={shlex.quote(host.bin)}:"$PATH"\n{lines}'


def count(key: str, value: int | str, auto: int | None = None) -> int:
    """A positive number, or what `auto` stands for."""
    if value == "auto" and auto is not None:
        return auto
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        wanted = "a positive number" if auto is None else "auto or a positive number"
        raise ValueError(f"cluster.{key} is {value!r}, but must be {wanted}")
    return value


def choice(key: str, value: str, *known: str) -> str:
    if value not in known:
        raise ValueError(f"cluster.{key} is {value!r}, but must be {', '.join(known[:-1])} or {known[-1]}")
    return value
