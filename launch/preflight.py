"""Whether the nodes can train together; started by the launcher of the run, ahead of it. It ends within a minute.

    deepspeed --hostfile H launch/preflight.py --hostfile H   every rank reports what it has; a small all-reduce
    python launch/preflight.py --reach --hostfile H           which machines answer to ssh

A mismatch, a rank that is missing and a machine that can't be reached are named, instead of waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
import torch.distributed as dist
from environment import gpus, versions

# of the whole, so that what is wrong is said within a minute
SECONDS = 50
SET_BY_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# 16 MiB: large enough for a bandwidth, small enough for a slow network
ALL_REDUCE_BYTES = 2**24
REPEATS = 5


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--hostfile", help="lines `host slots=8` in the order of the ranks, to call nodes by their names"
    )
    parser.add_argument("--reach", action="store_true", help="only ask every machine of the hostfile over ssh")
    parser.add_argument("--ssh_port", type=int)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    return parser.parse_args(argv)


def read_slots(hostfile: str) -> dict[str, int]:
    with open(hostfile, encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    found = {}
    for number, line in enumerate(lines, 1):
        if not line or line.startswith("#"):
            continue
        match = re.match(r"(\S+)\s+slots=(\d+)(\s|$)", line)
        if match is None:
            raise ValueError(f"{hostfile}, line {number}: {line!r} must be `host slots=8`")
        found[match[1]] = int(match[2])
    return found


def unreachable(hosts: Sequence[str], ssh_port: int | None) -> dict[str, str]:
    """The machines that don't answer, each with ssh's own reason; all are asked at once."""
    ssh = ["ssh", *(["-p", str(ssh_port)] if ssh_port else [])]
    # as pdsh asks them afterwards
    ssh += shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", "-o BatchMode=yes -o ConnectTimeout=10"))

    def ask(host: str) -> str | None:
        command = [*ssh, host, "true"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except subprocess.TimeoutExpired:
            return "no answer in 30 s"
        return None if done.returncode == 0 else done.stderr.strip() or f"exit status {done.returncode}"

    with ThreadPoolExecutor(max_workers=64) as pool:
        answers = dict(zip(hosts, pool.map(ask, hosts), strict=True))
    return {host: reason for host, reason in answers.items() if reason}


def trains_on_cpu() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def free_gb(local_rank: int) -> float:
    """Memory that this rank's GPU has free, or that the node has."""
    if not trains_on_cpu():
        return torch.cuda.mem_get_info(local_rank)[0] / 2**30
    with open("/proc/meminfo", encoding="utf-8") as file:
        return next(int(line.split()[1]) / 2**20 for line in file if line.startswith("MemAvailable"))


def facts(rank: int, node: str, local_rank: int) -> dict[str, object]:
    # model, memory and driver of a GPU are one fact: a node with another kind of GPU is a mismatch too
    gpu = {} if trains_on_cpu() else {"gpu": (gpus() or ["unknown"])[0]}
    return {"rank": rank, "node": node, "free_gb": round(free_gb(local_rank), 1), "same": {**versions(), **gpu}}


def mismatches(reports: Sequence[Mapping]) -> list[str]:
    """One line for each thing that isn't the same everywhere."""
    lines = []
    for name in dict.fromkeys(name for report in reports for name in report["same"]):
        found: dict[str, list[str]] = {}
        for report in reports:
            found.setdefault(report["same"].get(name, "none"), []).append(report["node"])
        if len(found) > 1:
            where = "; ".join(f"{value} on {', '.join(dict.fromkeys(nodes))}" for value, nodes in found.items())
            lines.append(f"{name} is not the same everywhere: {where}")
    return lines


def table(reports: Sequence[Mapping]) -> list[str]:
    """A line for each node: its ranks, what it has, the least free memory."""
    lines = []
    for node in dict.fromkeys(report["node"] for report in reports):
        here = [report for report in reports if report["node"] == node]
        has = ", ".join(f"{name} {value}" for name, value in here[0]["same"].items())
        least = min(report["free_gb"] for report in here)
        lines.append(f"{node}: {spans([report['rank'] for report in here])}; {least} GB free; {has}")
    return lines


def spans(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def node_of(rank: int, slots: Mapping[str, int]) -> str:
    """The hostfile's name for it, which people know; else the node's own."""
    for name, ranks in slots.items():
        if rank < ranks:
            return name
        rank -= ranks
    return platform.node()


def missing_nodes(missing: Sequence[int], slots: Mapping[str, int]) -> list[str]:
    """Who is missing, by name where the hostfile tells it."""
    lines, first = [], 0
    for name, ranks in slots.items():
        absent = [rank for rank in missing if first <= rank < first + ranks]
        if absent:
            lines.append(f"{name} is missing ({spans(absent)})")
        first += ranks
    nameless = [rank for rank in missing if rank >= first]
    return [*lines, f"{spans(nameless)} missing"] if nameless else lines


class Deadline:
    """Ends the process when its time is up, with what it was waiting for: a collective that hangs can't say it."""

    def __init__(self, seconds: float):
        self.seconds, self.waits_for = seconds, "the start"
        self.ends = time.monotonic() + seconds
        timer = threading.Timer(seconds, self.end)
        timer.daemon = True
        timer.start()

    def left(self) -> float:
        return max(0.0, self.ends - time.monotonic())

    def end(self) -> None:
        complain([f"{platform.node()} (rank {os.environ['RANK']}) still waits for {self.waits_for}"])
        os._exit(1)


def complain(lines: Sequence[str]) -> None:
    for line in lines:
        print(f"preflight: {line}", file=sys.stderr, flush=True)


def gather(store: dist.Store, world: int, deadline: Deadline) -> tuple[list[dict], list[int]]:
    """The reports that came, in rank order, and the ranks that haven't sent any when it is time to say so."""
    missing = list(range(world))
    # the others wait for the verdict, so it comes before their time is up
    while missing and deadline.left() > deadline.seconds / 4:
        missing = [rank for rank in missing if not store.check([f"report/{rank}"])]
        time.sleep(0.1)
    return [json.loads(store.get(f"report/{rank}")) for rank in range(world) if rank not in missing], missing


def all_reduce_gb_per_s(store: dist.Store, rank: int, world: int, local_rank: int, deadline: Deadline) -> float:
    """Bytes that each rank sends a second in a ring, 2 (n - 1) / n of the tensor's, in GB."""
    on_cpu = trains_on_cpu()
    device = torch.device("cpu") if on_cpu else torch.device("cuda", local_rank)
    if not on_cpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if on_cpu else "nccl", store=dist.PrefixStore("all_reduce", store), rank=rank, world_size=world,
        timeout=timedelta(seconds=deadline.seconds),
    )  # fmt: skip
    x = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
    began = 0.0
    for repeat in range(REPEATS + 1):
        dist.all_reduce(x)
        # read back, so that the sum is known to be right, and on a GPU to be there
        if x[-1].item() != world:
            raise ArithmeticError(f"an all-reduce of ones over {world} ranks gave {x[-1].item()}")
        x.fill_(1.0)
        if repeat == 0:
            # the first one makes the connections
            began = time.perf_counter()
    seconds = (time.perf_counter() - began) / REPEATS
    dist.destroy_process_group()
    return 2 * (world - 1) / world * ALL_REDUCE_BYTES / seconds / 1e9


def main() -> int:
    options = parse_options()
    try:
        slots = read_slots(options.hostfile) if options.hostfile else {}
    except (ValueError, OSError) as error:
        complain([f"{options.hostfile} can't be read: {error.strerror}" if isinstance(error, OSError) else str(error)])
        return 1
    if options.reach:
        silent = unreachable([*slots], options.ssh_port)
        complain([f"{host} can't be reached: {reason}" for host, reason in silent.items()])
        return 1 if silent else 0

    if absent := [name for name in SET_BY_LAUNCHERS if name not in os.environ]:
        complain([f"a launcher starts this on every rank, and sets {', '.join(SET_BY_LAUNCHERS)}: no {absent[0]}"])
        return 1
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    deadline = Deadline(options.seconds)
    deadline.waits_for = f"{address}:{port}, where rank 0 listens"
    # torchrun's own process listens there
    listens = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = dist.TCPStore(
        address, port, is_master=listens, wait_for_workers=False, timeout=timedelta(seconds=options.seconds)
    )
    deadline.waits_for = "rank 0's verdict"
    store.set(f"report/{rank}", json.dumps(facts(rank, node_of(rank, slots), local_rank)))
    if rank == 0:
        reports, missing = gather(store, world, deadline)
        print("\n".join(f"preflight: {line}" for line in table(reports)), flush=True)
        wrong = missing_nodes(missing, slots) + mismatches(reports)
        complain(wrong)
        store.set("verdict", "wrong" if wrong else "right")
    if store.get("verdict") == b"wrong":
        # the store goes with rank 0, and the others still read the verdict
        time.sleep(1 if rank == 0 else 0)
        return 1
    deadline.waits_for = "an all-reduce of all ranks (a firewall, or NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME?)"
    try:
        bandwidth = all_reduce_gb_per_s(store, rank, world, local_rank, deadline)
    except ArithmeticError as error:
        complain([f"rank {rank}: {error}"])
        return 1
    if rank == 0:
        print(f"preflight: all-reduce over {world} ranks, {bandwidth:.2f} GB/s a rank", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
