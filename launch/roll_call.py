"""Whether all nodes have come; runs on each of them, ahead of a launcher that would wait for a missing one in silence.

    python launch/roll_call.py --nodes 4 --node 1 --address A --port P    this is node 1; node 0 is found at A
    python launch/roll_call.py --nodes 4 --address A --port P             nodes without numbers; one of them is A

The node at the address keeps the roll, and says every half minute who is missing; where that is the node itself, the
others do. Where one is missing when the time is over, all that have come say who has and who has not, and end with
status 1.
"""

from __future__ import annotations

import argparse
import functools
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta

from torch.distributed import DistError, TCPStore

# beyond the time itself: for the verdict to come, and to be read by all
GRACE = 5.0
# seconds between two lines of those who wait
SAY_EVERY = 30.0


def parse_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, required=True, help="how many there must be")
    parser.add_argument("--node", type=int, help="the number of this one, where nodes have numbers")
    parser.add_argument("--names", nargs="+", help="what people call the nodes, in the order of their numbers")
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True, help="nothing else may listen there")
    parser.add_argument("--seconds", type=float, default=60.0, help="that nodes have to come")
    return parser.parse_args(argv)


def is_here(address: str) -> bool:
    """Whether it is an address of this machine."""
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, kind, protocol, _, place in found:
        with socket.socket(family, kind, protocol) as s:
            try:
                s.bind(place)
            except OSError:
                continue
            return True
    return False


def verdict(nodes: int, came: Mapping[int, str], names: Sequence[str] | None, numbered: bool, seconds: float) -> str:
    """What is wrong, in one line; nothing where all have come. ``came``: number -> the machine's name of itself."""
    if len(came) == nodes:
        return ""
    if not numbered:
        return f"after {seconds:g} s {len(came)} of {nodes} nodes have come: {', '.join(came.values())}"
    calls = names or [f"node {i}" for i in range(nodes)]
    missing = [calls[i] for i in range(nodes) if i not in came]
    there = [machine if machine == calls[i] else f"{calls[i]} ({machine})" for i, machine in came.items()]
    return f"missing after {seconds:g} s: {', '.join(missing)}; there: {', '.join(there)}"


def keep_the_roll(store: TCPStore, options: argparse.Namespace) -> str:
    """Wait for all nodes, or for the time; say the verdict, and stay until it is read."""
    came: dict[int, str] = {}

    def wrong_after(seconds: float) -> str:
        return verdict(options.nodes, dict(sorted(came.items())), options.names, options.node is not None, seconds)

    ends, waiting = time.monotonic() + options.seconds, Waiting()
    while len(came) < options.nodes and time.monotonic() < ends:
        came |= {i: store.get(f"node/{i}").decode() for i in range(options.nodes) if store.check([f"node/{i}"])}
        if len(came) < options.nodes:
            waiting.say(wrong_after)
        time.sleep(0.1)
    wrong = wrong_after(options.seconds)
    store.set("verdict", wrong)
    ends = time.monotonic() + GRACE
    while store.add("read", 0) < len(came) - 1 and time.monotonic() < ends:
        time.sleep(0.05)
    return wrong


class Waiting:
    """Says now and then what is waited for."""

    def __init__(self) -> None:
        self._began, self._said = time.monotonic(), 0

    def say(self, what: Callable[[float], str]) -> None:
        """``what``: of the seconds that have passed."""
        seconds = int(time.monotonic() - self._began)
        if seconds >= (self._said + 1) * SAY_EVERY:
            self._said += 1
            print(f"preflight: waits; {what(seconds)}", file=sys.stderr, flush=True)


def nobody(options: argparse.Namespace, seconds: float) -> str:
    who = "nobody" if options.node is None else f"{(options.names or ['node 0'])[0]} is missing: nobody"
    return f"{who} listens at {options.address}:{options.port}; {platform.node()} has waited {seconds:g} s"


def listens(options: argparse.Namespace) -> bool:
    """Whether somebody does there before the time is over; a store would fill the terminal while it tries."""
    ends, waiting = time.monotonic() + options.seconds, Waiting()
    while (left := ends - time.monotonic()) > 0:
        try:
            # a host that is not there answers nothing
            socket.create_connection((options.address, options.port), timeout=min(left, SAY_EVERY)).close()
        except OSError:
            waiting.say(functools.partial(nobody, options))
            time.sleep(0.2)
        else:
            return True
    return False


def call(options: argparse.Namespace) -> str:
    """What is wrong, in one line; nothing where all have come."""
    keeps = options.node == 0 or options.node is None and is_here(options.address)
    if not keeps and not listens(options):
        return nobody(options, options.seconds)
    try:
        store = TCPStore(
            options.address, options.port, is_master=keeps, wait_for_workers=False,
            timeout=timedelta(seconds=options.seconds + GRACE),
        )  # fmt: skip
        number = store.add("numbers", 1) - 1 if options.node is None else options.node
        store.set(f"node/{number}", platform.node())
        if keeps:
            return keep_the_roll(store, options)
        wrong = store.get("verdict").decode()
        store.add("read", 1)
        return wrong
    except DistError as error:
        return f"the roll of the nodes is kept at {options.address}:{options.port}, but: {str(error).splitlines()[0]}"


def main() -> int:
    wrong = call(parse_options())
    if wrong:
        print(f"preflight: {wrong}", file=sys.stderr, flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
