"""PyTorch's launcher, one process on each node, started there by hand or by whatever runs commands on your nodes.

    cluster=torchrun                                     this machine
    cluster=torchrun cluster.nodes=2 cluster.address=A   node 0 starts here; the other nodes' lines are printed

`cluster.rendezvous=c10d` numbers the nodes itself, so that all of them run one line. The run's folder, the Python
environment and the data have the same path on every node.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass

from launch.render import (
    PORT,
    PREFLIGHT,
    ROLL_CALL,
    Host,
    Rendered,
    at,
    choice,
    count,
    exports,
    rank_env,
    script_with_config,
)
from launch.schema import Cluster, Run


@dataclass
class Options(Cluster):
    nodes: int = 1
    address: str = "auto"
    rendezvous: str = "static"
    wait_s: int = 60  # that the preflight waits for all nodes to come


def render(run: Run, host: Host) -> Rendered:
    cluster: Options = run.cluster
    nodes = count("nodes", cluster.nodes)
    on_cpu = choice("accelerator", cluster.accelerator, "auto", "cpu") == "cpu" or (nodes == 1 and host.gpus == 0)
    ranks = count("ranks", cluster.ranks, 2 if on_cpu else host.gpus or None)
    address = cluster.address if cluster.address != "auto" else "127.0.0.1" if nodes == 1 else host.name
    port = count("port", cluster.port, host.free_port if nodes == 1 else PORT)
    env = {**host.settings, **rank_env(cluster, on_cpu, host.cores // ranks)}
    files = {"node.sh": node_script(run, host, address, port, ranks, env)}
    line = f"bash {shlex.quote(at(run, 'node.sh'))}"
    return Rendered(
        command=["bash", at(run, "node.sh"), "0"],
        env={},
        # a rendezvous of its own numbers the nodes by itself
        nodes={f"node {i}": f"{line} {i}" if cluster.rendezvous == "static" else line for i in range(nodes)},
        ranks=nodes * ranks,
        files=files,
    )


def node_script(run: Run, host: Host, address: str, port: int, ranks: int, env: dict[str, str]) -> str:
    cluster: Options = run.cluster
    command = f"{shlex.quote(os.path.join(host.bin, 'torchrun'))} --nnodes {cluster.nodes} --nproc_per_node {ranks}"
    if choice("rendezvous", cluster.rendezvous, "static", "c10d") == "static":
        command += f' --node_rank "$1" --master_addr {shlex.quote(address)} --master_port {port}'
    else:
        job = shlex.quote(os.path.basename(run.folder))
        command += f" --rdzv_backend c10d --rdzv_endpoint {shlex.quote(address)}:{port} --rdzv_id {job}"
    preflight = ""
    if cluster.preflight:
        # left to itself torchrun waits a quarter of an hour for a node, and then can't say which
        waits = f"--rdzv_conf {'timeout' if cluster.rendezvous == 'static' else 'join_timeout'}=55"
        if cluster.nodes > 1:
            where = f"--address {shlex.quote(address)} --port {port + 1} --seconds {cluster.wait_s}"
            number = ' --node "$1"' if cluster.rendezvous == "static" else ""
            python = shlex.quote(os.path.join(host.bin, "python"))
            preflight = f"{python} {shlex.quote(ROLL_CALL)} --nodes {cluster.nodes}{number} {where} || exit 1\n"
        preflight += f"{command} {waits} {shlex.quote(PREFLIGHT)} || exit 1\n"
    return f"""\
#!/bin/bash
# runs on every node{", with the number of the node" if cluster.rendezvous == "static" else ""}
{exports(host, env)}\
{preflight}exec {command} {shlex.join(script_with_config(run))}
"""
