"""What is left of a host's memory, by what a machine and a container say of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ds_fused.modules.memory import host_memory

MEMINFO = "MemTotal:       1000 kB\nMemAvailable:    300 kB\nHugePages_Total:       0\n"
V2 = {"memory.max": "200000\n", "memory.current": "90000\n", "memory.stat": "anon 50000\ninactive_file 20000\n"}
V1 = {
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/memory.usage_in_bytes": "80000",
    "memory/memory.stat": "total_inactive_file 1",
}


@pytest.mark.parametrize(
    ("proc", "cgroup", "left"),
    [
        ({"meminfo": MEMINFO}, {}, 300 * 1024),
        ({"meminfo": MEMINFO}, V2, 130000),
        ({"meminfo": MEMINFO}, V2 | {"memory.max": "max"}, 300 * 1024),
        # without a limit version 1 says the largest number it has
        ({"meminfo": MEMINFO}, V1, 300 * 1024),
        ({}, V1 | {"memory/memory.limit_in_bytes": "100000"}, 20001),
        ({}, {"memory.max": "100", "memory.current": "90"}, 10),
        ({}, {"memory.max": "100"}, None),
        ({"meminfo": "nothing of the kind\n"}, {}, None),
    ],
)
def test_what_is_left(tmp_path, monkeypatch, proc, cgroup, left):
    for name, files in (("PROC", proc), ("CGROUP", cgroup)):
        folder = tmp_path / name
        monkeypatch.setattr(host_memory, name, folder)
        for path, text in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
    assert host_memory.available_bytes() == left


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="no /proc/meminfo, which Linux has")
def test_of_this_machine():
    assert host_memory.available_bytes() > 2**20
