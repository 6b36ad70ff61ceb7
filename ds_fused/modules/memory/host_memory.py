"""How much memory of the host is left: pinned memory can't be paged out, and who asks for too much of it is killed."""

from __future__ import annotations

from pathlib import Path

PROC, CGROUP = Path("/proc"), Path("/sys/fs/cgroup")
# (limit, used, statistics, what of the used can be given back) in a container, of version 2 and 1 of Linux's cgroups
LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def available_bytes() -> int | None:
    """What this machine or this container has left, whichever is less; None where neither says."""
    found = [left for left in (_of_machine(), *(_of_container(*names) for names in LIMITS)) if left is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    kib = _listed(PROC / "meminfo").get("MemAvailable:")
    return None if kib is None else kib * 1024


def _of_container(limit: str, used: str, statistics: str, spare: str) -> int | None:
    numbers = [_text(CGROUP / name).strip() for name in (limit, used)]
    # "max": no limit
    if not all(number.isdecimal() for number in numbers):
        return None
    most, now = map(int, numbers)
    return most - now + _listed(CGROUP / statistics).get(spare, 0)


def _listed(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split() for line in _text(path).splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
