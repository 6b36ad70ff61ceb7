"""quickstart.py's own functions; nothing is installed here."""

from __future__ import annotations

import ast
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launching import REPO, start


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The module, with its environment folder elsewhere."""
    # as `python launch/quickstart.py` finds its neighbours
    monkeypatch.syspath_prepend(str(REPO / "launch"))
    module = importlib.import_module("quickstart")
    monkeypatch.setattr(module, "VENV", tmp_path / "env")
    monkeypatch.setattr(module, "STAMP", tmp_path / "env" / "installed.txt")
    return module


def imports(file: str) -> set[str]:
    # of the module itself: what its functions import comes after the installation
    tree = ast.parse((REPO / "launch" / file).read_text(encoding="utf-8"))
    found = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in found}


def test_it_needs_nothing_but_python():
    ours = {"toolchain", "real_data"}
    for file in ("quickstart.py", "toolchain.py", "real_data.py"):
        assert imports(file) <= set(sys.stdlib_module_names) | ours, file


@pytest.mark.parametrize(
    ("output", "counts"),
    [
        ("== 5 passed in 1.00s ==", (5, 0, 0)),
        ("== 2 failed, 10 passed, 3 skipped, 4 deselected, 7 warnings in 61.20s (0:01:01) ==", (10, 2, 3)),
        ("FAILED a.py - 3 passed here\n= 1 passed, 1 xfailed, 2 errors in 0.01s =", (2, 2, 0)),
        ("no tests ran in 0.00s", (0, 0, 0)),
        ("Killed", (0, 0, 0)),
    ],
)
def test_pytests_closing_line_is_counted(quickstart, output, counts):
    assert tuple(quickstart.count_outcomes(output).values()) == counts


@pytest.mark.parametrize(
    ("runs", "last_line", "status"),
    [
        ([(0, "3 passed in 1s"), (0, "4 passed, 1 skipped in 1s")], "7 passed, 0 failed, 1 skipped", 0),
        ([(1, "3 passed, 2 failed in 1s"), (0, "4 passed in 1s")], "7 passed, 2 failed, 0 skipped", 1),
        # killed before its closing line
        ([(-9, "..."), (0, "4 passed in 1s")], "4 passed, 1 failed, 0 skipped", 1),
        # nothing collected
        ([(5, "no tests ran in 0s"), (0, "4 passed in 1s")], "4 passed, 1 failed, 0 skipped", 1),
    ],
)
def test_the_last_line_and_the_exit_status(quickstart, monkeypatch, capsys, runs, last_line, status):
    waiting = iter(runs)
    monkeypatch.setattr(quickstart, "missing_build_tools", list)
    monkeypatch.setattr(quickstart, "run_pytest", lambda arguments: next(waiting))
    assert quickstart.test(0, []) == status
    assert capsys.readouterr().out.splitlines()[-1] == last_line


@pytest.mark.parametrize("gpus", [0, 1])
def test_two_at_a_time_only_where_there_is_no_gpu(quickstart, monkeypatch, gpus):
    asked = []
    monkeypatch.setattr(quickstart, "missing_build_tools", list)
    monkeypatch.setattr(quickstart, "run_pytest", lambda arguments: asked.append(arguments) or (0, "1 passed in 1s"))
    assert quickstart.test(gpus, ["--all"]) == 0
    assert [("-n" in arguments, arguments[-1]) for arguments in asked] == [(not gpus, "--all")] * 2


def test_every_test_runs_in_one_of_its_processes(quickstart):
    ignored = {a.removeprefix("--ignore=") for arguments in quickstart.TEST_RUNS for a in arguments if "=" in a}
    named = {a for arguments in quickstart.TEST_RUNS for a in arguments if "=" not in a}
    assert "tests" in named and ignored == named - {"tests"}


def test_gpus_are_counted_as_the_driver_lists_them(quickstart, monkeypatch):
    def listed(text: str, status: int = 0):
        monkeypatch.setattr(
            quickstart.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=text, returncode=status)
        )
        return quickstart.count_gpus()

    assert listed("GPU 0: NVIDIA H100 (UUID: x)\nGPU 1: NVIDIA H100 (UUID: y)\n") == 2
    assert listed("NVIDIA-SMI has failed", status=9) == 0

    def absent(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(quickstart.subprocess, "run", absent)
    assert quickstart.count_gpus() == 0


def test_a_complete_installation_is_kept_and_a_changed_one_is_not(quickstart, monkeypatch):
    done = []
    monkeypatch.setattr(quickstart, "make_venv", lambda: quickstart.VENV.mkdir(exist_ok=True))
    monkeypatch.setattr(quickstart, "pip", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(quickstart, "compile_cpu_op", lambda: done.append(("op",)))
    monkeypatch.setattr(quickstart, "has_package", lambda name: False)
    quickstart.install(gpus=0)
    assert ("torch==2.13.0",) in done and any("triton==3.6.0" in arguments for arguments in done)
    done.clear()
    quickstart.install(gpus=0)
    assert not done
    quickstart.install(gpus=1)
    assert ("torch==2.11.0",) in done


def test_the_triton_that_torch_brought_is_kept(quickstart, monkeypatch):
    done = []
    monkeypatch.setattr(quickstart, "make_venv", lambda: quickstart.VENV.mkdir(exist_ok=True))
    monkeypatch.setattr(quickstart, "pip", lambda *arguments: done.append(arguments))
    monkeypatch.setattr(quickstart, "compile_cpu_op", lambda: done.append(("op",)))
    monkeypatch.setattr(quickstart, "has_package", lambda name: name == "triton")
    quickstart.install(gpus=0)
    assert not any("triton==3.6.0" in arguments for arguments in done)


def one_line(capsys: pytest.CaptureFixture) -> str:
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    return said[0]


def test_what_is_lacking_is_said_in_one_line(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "count_gpus", lambda: 0)
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e9))
    assert quickstart.main([]) == 1
    assert "1.0 GB of free disk; the installation needs about 4 GB" in one_line(capsys)

    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert quickstart.main([]) == 1
    assert "install python3-venv" in one_line(capsys)

    monkeypatch.setattr(quickstart, "make_venv", lambda: None)
    assert quickstart.main([]) == 1
    assert "pip could not install" in one_line(capsys)

    monkeypatch.setattr(quickstart, "install", lambda gpus: None)
    monkeypatch.setattr(quickstart, "missing_build_tools", lambda: ["C++ compiler"])
    assert quickstart.main(["test"]) == 1
    assert "has no C++ compiler" in one_line(capsys)

    monkeypatch.setattr(quickstart.sys, "version_info", (3, 9, 2))
    assert quickstart.main([]) == 1
    assert "Python 3.10 or newer is needed" in one_line(capsys)


def test_an_environment_without_pip_is_left_as_it_is(quickstart, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "count_gpus", lambda: 0)
    monkeypatch.setattr(quickstart.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    (quickstart.VENV / "bin").mkdir(parents=True)
    (quickstart.VENV / "mine").touch()
    assert quickstart.main([]) == 1 and (quickstart.VENV / "mine").exists()
    assert f"{quickstart.VENV} is there, but has no pip that works" in one_line(capsys)


# a launch that takes two seconds to end its ranks
CHILD = """
import pathlib, signal, time
try:
    pathlib.Path("there").touch()
    time.sleep(600)
except KeyboardInterrupt:
    time.sleep(2)
    pathlib.Path("all ended").touch()
"""


def test_an_interrupt_leaves_the_launch_the_time_to_end_its_ranks(tmp_path):
    code = f"import quickstart as q, sys; q.ROOT = {str(tmp_path)!r}; q.to_its_end([sys.executable, '-c', {CHILD!r}])"
    # a shell's job in the background ignores interrupts, and hands that on
    wake = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler); {code}"
    job = subprocess.Popen([sys.executable, "-c", wake], cwd=REPO / "launch", start_new_session=True)
    while job.poll() is None and not (tmp_path / "there").exists():
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGINT)
    job.wait(60)
    assert (tmp_path / "all ended").exists()


def test_missing_build_tools_are_named(quickstart, monkeypatch):
    import toolchain

    monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(toolchain.Path, "is_file", lambda path: True)
    assert toolchain.missing_build_tools() == []
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    monkeypatch.setattr(toolchain.Path, "is_file", lambda path: False)
    assert toolchain.missing_build_tools() == ["C++ compiler", "Python headers (Python.h)", "ninja"]


def test_the_main_job_takes_two_ranks_or_the_gpus(quickstart):
    assert "experiment=quickstart_cpu" in quickstart.train_command(gpus=0)
    for gpus, ranks in ((1, 1), (2, 2), (8, 2)):
        command = quickstart.train_command(gpus)
        assert "experiment=quickstart_gpu" in command and f"cluster.ranks={ranks}" in command


def test_ci_calls_the_test_command():
    script = (REPO / ".ci" / "run").read_text(encoding="utf-8")
    assert script.splitlines()[-1] == "python3 launch/quickstart.py test"
    assert start(["bash", "-n", str(REPO / ".ci" / "run")]).status == 0
