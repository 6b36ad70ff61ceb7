"""The ways of starting one training that the README shows side by side: one JSON, one result."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
import runs
from launching import REPO, free_port, start

README = (REPO / "README.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def ways() -> list[str]:
    """The commands of the README's table."""
    table = README.partition("| started by | command |")[2].partition("\n\n")[0]
    return re.findall(r"^\| [^|]+ \| `([^`]+)` \|", table, re.MULTILINE)


# what each launcher is told besides, for two ranks on the CPU of one machine; what another run takes is not free
LOCAL = {
    "deepspeed": "--num_accelerators 2 --master_port {port}",
    "torchrun": "--master_port {port}",
    "accelerate launch": "--num_processes 2 --num_machines 1 --main_process_port {port}",
}


def test_the_six_ways_are_there():
    assert len(ways()) == 6 and ways()[-1] == "python -m launch"


def marks(way: str) -> list[pytest.MarkDecorator]:
    """Of Accelerate and of the Trainer tests/scripts has quick ones; cluster=hostfile starts what --hostfile does."""
    return [pytest.mark.all] if re.search("^accelerate | trainer.py | --hostfile ", way) else []


# the last one has made what the others are compared with
@pytest.mark.parametrize("way", [pytest.param(way, marks=marks(way)) for way in ways()[:-1]])
def test_it_trains_as_python_m_launch_does(way, request, tmp_path, tiny_model, text, local_run):
    stands_for = {
        "ds.json": local_run / "ds_config.json", "train.py": runs.TRAIN, "hosts": tmp_path / "hostfile",
        "trainer.py": Path(__file__).with_name("trainer_script.py"),
    }  # fmt: skip

    def command(line: str) -> list[str | Path]:
        program, *words = (stands_for.get(word, word) for word in shlex.split(line))
        return [BIN / program, *words, *runs.options(tiny_model, text, tmp_path)]

    if "--hostfile" in way:
        alpha, _ = request.getfixturevalue("two_hosts")
        (tmp_path / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
        env = {"PYTHONPATH": REPO, "PATH": f"{BIN}:/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        # DeepSpeed's launcher looks for it in the working directory
        (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
        ended = start(alpha.inside(command(way), tmp_path))
    else:
        launcher = next(launcher for launcher in LOCAL if way.startswith(launcher))
        here = f"{launcher} {LOCAL[launcher].format(port=free_port())}"
        ended = start(command(way.replace(launcher, here, 1)))
    assert ended.status == 0, ended.output
    assert "ds_fused: no GPU" in ended.output and "layers replaced" in ended.output, ended.output
    assert runs.losses(tmp_path) == pytest.approx(runs.losses(local_run), rel=1e-6)
