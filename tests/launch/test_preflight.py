"""The preflight: what is named when nodes differ, are missing or can't be reached; and two ranks that agree."""

from __future__ import annotations

import importlib
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from launching import REPO, Ended, free_port, launch, start

PREFLIGHT = REPO / "launch" / "preflight.py"


@pytest.fixture
def preflight(monkeypatch: pytest.MonkeyPatch):
    # as a script it finds its neighbours
    monkeypatch.syspath_prepend(str(PREFLIGHT.parent))
    return importlib.import_module("preflight")


def report(node: str, free_gb: float = 70.0, rank: int = 0, **same: str) -> dict:
    return {"rank": rank, "node": node, "free_gb": free_gb, "same": {"torch": "2.11.0", "gpu": "H100, 580.1", **same}}


def test_a_mismatch_names_both_sides(preflight):
    assert preflight.mismatches([report("a"), report("a"), report("b", free_gb=1)]) == []
    assert preflight.mismatches([report("a"), report("b", torch="2.13.0"), report("c", peft="0.21")]) == [
        "torch is not the same everywhere: 2.11.0 on a, c; 2.13.0 on b",
        "peft is not the same everywhere: none on a, b; 0.21 on c",
    ]


def test_a_node_is_one_line_with_its_least_free_memory(preflight):
    lines = preflight.table([report("a", 60.0), report("a", 50.5, rank=1), report("b", 70.0, rank=3)])
    assert lines == [
        "a: ranks 0 to 1; 50.5 GB free; torch 2.11.0, gpu H100, 580.1",
        "b: rank 3; 70.0 GB free; torch 2.11.0, gpu H100, 580.1",
    ]


def test_missing_ranks_have_the_hostfiles_names(preflight, tmp_path):
    (tmp_path / "hosts").write_text("# two\na slots=2\n\nb slots=4\n")
    slots = preflight.read_slots(str(tmp_path / "hosts"))
    assert [preflight.node_of(rank, slots) for rank in (0, 1, 2, 5)] == ["a", "a", "b", "b"]
    assert preflight.missing_nodes([3, 4], slots) == ["b is missing (ranks 3 to 4)"]
    assert preflight.missing_nodes([1, 6, 7], {"a": 2}) == ["a is missing (rank 1)", "ranks 6 to 7 missing"]
    assert preflight.missing_nodes([], slots) == []


def test_what_a_launcher_has_not_set_and_a_hostfile_that_is_not_there_are_named(preflight, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for words, says in [
        ([], "a launcher starts this on every rank, and sets RANK, .*: no RANK"),
        (["--hostfile", "/no/hosts"], "/no/hosts can't be read: No such file or directory"),
    ]:
        monkeypatch.setattr(sys, "argv", ["preflight.py", *words])
        assert preflight.main() == 1
        assert re.search(says, "".join(capsys.readouterr()))


@pytest.mark.parametrize("line", ["b", "b 4", "b slots=", "b slots=four"])
def test_a_line_of_a_hostfile_that_is_none_is_named(preflight, tmp_path, line, monkeypatch, capsys):
    file = tmp_path / "hosts"
    file.write_text(f"  # two\na slots=2 # fast\n{line}\n")
    monkeypatch.setattr(sys, "argv", ["preflight.py", "--reach", "--hostfile", str(file)])
    assert preflight.main() == 1
    assert f"{file}, line 3: {line!r} must be `host slots=8`" in "".join(capsys.readouterr())


def test_a_machine_that_does_not_answer_is_named_with_sshs_reason(preflight, tmp_path, monkeypatch):
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/bash\n[[ "$*" == *" a true" ]] || { echo "no route to host" >&2; exit 255; }\n')
    ssh.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert preflight.unreachable(["a", "b"], ssh_port=2222) == {"b": "no route to host"}


def test_two_ranks_report_and_reduce():
    first, second = launch(PREFLIGHT, ranks=2)
    assert "preflight: all-reduce over 2 ranks, " in first.output and ": ranks 0 to 1; " in first.output
    assert "preflight" not in second.output


# the second of two has another peft, as its package's own record says
def test_a_node_with_another_version_ends_all_of_them(tmp_path):
    record = tmp_path / "peft-9.9.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text("Metadata-Version: 2.1\nName: peft\nVersion: 9.9\n")
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    address = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def run(rank: int) -> Ended:
        path = {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])} if rank else {}
        return start([sys.executable, PREFLIGHT, "--hostfile", tmp_path / "hosts"], RANK=str(rank), **address, **path)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(run, range(2))
    assert first.status == second.status == 1, first.output + second.output
    assert re.search("preflight: peft is not the same everywhere: .* on a; 9.9 on b", first.output), first.output


# rank 0 of two, the other never comes
def test_a_missing_node_is_named_in_time(tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\n")
    address = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, PREFLIGHT, "--seconds", "4", "--hostfile", tmp_path / "hosts"]
    ended = start(command, **address, MASTER_PORT=str(free_port()))
    assert ended.status == 1 and "preflight: b is missing (rank 1)" in ended.output, ended.output
    # the one that is there reports all the same
    assert "preflight: a: rank 0; " in ended.output
