"""The kinds of clusters, one file each: its `Options` are the keys of `cluster`, its `render` a pure function."""

from __future__ import annotations

from launch.clusters import hostfile, kubernetes, local, slurm, torchrun

# cluster.kind -> its file
KINDS = {"local": local, "hostfile": hostfile, "slurm": slurm, "torchrun": torchrun, "kubernetes": kubernetes}
