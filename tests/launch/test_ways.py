"""The ways of starting one training, as the README shows them side by side: one JSON, one result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import runs
from launching import REPO, free_port, start

BIN = Path(sys.executable).parent
TRAINER = Path(__file__).with_name("trainer_script.py")


@pytest.fixture
def config(local_run: Path) -> Path:
    """The JSON that `python -m launch` has written."""
    return local_run / "ds_config.json"


@pytest.fixture
def equal(tmp_path: Path, local_run: Path):
    """equal(command): the command trains into tmp_path as `python -m launch` has trained."""

    def check(command: list[str | Path], cwd: Path = REPO, rel: float = 1e-6) -> None:
        ended = start(command, cwd=cwd)
        assert ended.status == 0, ended.output
        assert "ds_fused: no GPU" in ended.output and "layers replaced" in ended.output, ended.output
        assert runs.losses(tmp_path) == pytest.approx(runs.losses(local_run), rel=rel)

    return check


@pytest.fixture
def options(tmp_path: Path, tiny_model: Path, text: Path) -> list[str]:
    return runs.options(tiny_model, text, tmp_path)


def test_deepspeed(equal, config, options):
    where = ["--num_accelerators", "2", "--master_port", str(free_port())]
    equal([BIN / "deepspeed", *where, "--config", config, runs.TRAIN, *options])


def test_deepspeed_on_two_hosts(equal, config, options, two_hosts, tmp_path):
    (tmp_path / "hostfile").write_text("alpha slots=1\nbeta slots=1\n")
    # what DeepSpeed's launcher hands on to other hosts; it looks in the working directory
    env = {"PYTHONPATH": REPO, "PATH": f"{BIN}:/usr/bin:/bin", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    (tmp_path / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in env.items()))
    command = [BIN / "deepspeed", "--hostfile", tmp_path / "hostfile", "--config", config, runs.TRAIN, *options]
    equal(two_hosts[0].inside(command, tmp_path))


def test_torchrun(equal, config, options):
    where = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    equal([BIN / "torchrun", *where, runs.TRAIN, "--deepspeed_config", config, *options])


def test_torchrun_and_a_script_without_an_option_for_it(equal, config, options):
    where = ["--nproc_per_node", "2", "--master_port", str(free_port())]
    equal([BIN / "torchrun", *where, "-m", "ds_fused.run", config, runs.TRAIN, *options])


def test_accelerate(equal, config, options):
    where = ["--use_deepspeed", "--deepspeed_config_file", config, "--num_processes", "2", "--num_machines", "1"]
    where += ["--main_process_port", str(free_port())]
    equal([BIN / "accelerate", "launch", *where, runs.TRAIN, "--deepspeed_config", config, *options])


# a Trainer logs four decimals
def test_a_trainer(equal, config, options):
    where = ["--num_accelerators", "2", "--master_port", str(free_port())]
    equal([BIN / "deepspeed", *where, TRAINER, "--deepspeed_config", config, *options], rel=1e-3)
