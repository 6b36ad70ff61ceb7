"""From a composed configuration to what is started. Pure functions: nothing here touches a disk, a GPU or a process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

TRAIN = Path(__file__).resolve().with_name("train.py")


@dataclass(frozen=True)
class Host:
    """What the launching machine has; facts that a configuration may leave open."""

    gpus: int
    cores: int
    bin: str  # the folder of the environment's `deepspeed` command
    path: str  # PATH as it is
    free_port: int


@dataclass(frozen=True)
class Job:
    """A command and what it needs in its environment beyond what is there."""

    command: list[str]
    env: dict[str, str]


def ds_config(cfg: Mapping) -> dict:
    """The one JSON that every rank reads: DeepSpeed's configuration with the `ds_fused` block in it."""
    return {**cfg["deepspeed"], "ds_fused": cfg["fused"]}


def train_options(cfg: Mapping) -> list[str]:
    """The options of train.py: every key of the groups model, data and train carries its option's name."""
    options = ["--model", str(cfg["model"]["path"])]
    for group in ("model", "data", "train"):
        for key, value in cfg[group].items():
            # path stands above; fetch is for the launching machine
            if key in ("path", "fetch") or value is None:
                continue
            if isinstance(value, bool):
                options.append(f"--{key}" if value else f"--no-{key}")
            elif isinstance(value, (list, tuple)):
                options += [f"--{key}", *map(str, value)]
            else:
                options += [f"--{key}", str(value)]
    return [*options, "--out", str(cfg["folder"])]


def local(cfg: Mapping, config_file: str, host: Host) -> Job:
    """The ranks of one machine, through DeepSpeed's launcher."""
    cluster = cfg["cluster"]
    accelerator, ranks, port = cluster["accelerator"], cluster["ranks"], cluster["port"]
    if accelerator not in ("auto", "cpu"):
        raise ValueError(f"cluster.accelerator is {accelerator!r}, but must be auto or cpu")
    if ranks != "auto" and (not isinstance(ranks, int) or ranks < 1):
        raise ValueError(f"cluster.ranks is {ranks!r}, but must be auto or a positive number")
    # the environment's own bin: DeepSpeed looks for ninja on PATH, also where the environment is not activated
    env = {"PATH": os.pathsep.join([host.bin, host.path])}
    command = [os.path.join(host.bin, "deepspeed")]
    if accelerator == "cpu" or host.gpus == 0:
        # left to itself DeepSpeed starts one rank per NUMA node
        ranks = 2 if ranks == "auto" else ranks
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(max(1, host.cores // ranks))}
        # huge pages: without, SmolLM2 took 900,000 page faults a step and spent 40 % of its CPU time in the kernel
        env["THP_MEM_ALLOC_ENABLE"] = "1"
    elif ranks != "auto" and ranks > host.gpus:
        raise ValueError(f"cluster.ranks is {ranks}, but this machine has {host.gpus} GPUs")
    # without the option DeepSpeed takes every GPU and honours CUDA_VISIBLE_DEVICES; with it, it ignores that
    if ranks != "auto":
        command += ["--num_gpus", str(ranks)]
    command += ["--master_port", str(host.free_port if port == "auto" else port)]
    return Job([*command, "--config", config_file, str(TRAIN), *train_options(cfg)], env)
