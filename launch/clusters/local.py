"""The ranks of the launching machine, through DeepSpeed's launcher."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from launch.render import PREFLIGHT, Host, Rendered, choice, count, rank_env, train_script
from launch.schema import Cluster, Run


@dataclass
class Options(Cluster):
    """Nothing more."""


def render(run: Run, host: Host) -> Rendered:
    cluster: Options = run.cluster
    on_cpu = choice("accelerator", cluster.accelerator, "auto", "cpu") == "cpu" or host.gpus == 0
    ranks = count("ranks", cluster.ranks, 2 if on_cpu else host.gpus)
    if not on_cpu and ranks > host.gpus:
        raise ValueError(f"cluster.ranks is {ranks}, but this machine has {host.gpus} GPUs")
    deepspeed = [os.path.join(host.bin, "deepspeed")]
    # without the option DeepSpeed takes every GPU and honours CUDA_VISIBLE_DEVICES; with it, it ignores that
    if cluster.ranks != "auto":
        deepspeed += ["--num_gpus", str(ranks)]
    elif on_cpu:
        # left to itself DeepSpeed starts one rank per NUMA node
        deepspeed += ["--num_gpus", str(ranks)]
    deepspeed += ["--master_port", str(count("port", cluster.port, host.free_port))]
    command = [*deepspeed, *train_script(run)]
    return Rendered(
        command=command,
        # the environment's own bin: DeepSpeed looks for ninja on PATH, also where the environment is not activated
        env={"PATH": os.pathsep.join([host.bin, host.path]), **rank_env(cluster, on_cpu, host.cores // ranks)},
        nodes={host.name: shlex.join(command)},
        ranks=ranks,
        preflight=[[*deepspeed, PREFLIGHT]] if cluster.preflight else [],
    )
