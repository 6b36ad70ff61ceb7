"""Composing conf/ and rendering a launch: pure functions, and one dry run through the command itself."""

from __future__ import annotations

import json
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from launching import REPO, start
from omegaconf import OmegaConf

import launch.__main__ as entry
from launch.render import Host, ds_config, local

LAPTOP = Host(gpus=0, cores=8, bin="/env/bin", path="/usr/bin", free_port=12345)
BOX = Host(gpus=4, cores=64, bin="/env/bin", path="/usr/bin", free_port=12345)


def composed(*overrides: str) -> dict:
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["folder=/runs/a", *overrides])
    return OmegaConf.to_container(cfg, resolve=True)


def test_every_configuration_composes_and_renders():
    names = {
        group.name: [f.stem for f in group.glob("*.yaml")] for group in (REPO / "conf").iterdir() if group.is_dir()
    }
    assert set(names) == {"model", "data", "train", "deepspeed", "fused", "cluster", "experiment"}
    # what only the user can say
    open_keys = {"hub": ["model.path=gpt"], "text": ["data.text=[a.txt]"]}
    for group, stems in names.items():
        for stem in stems:
            cfg = composed(f"{group}={stem}", *open_keys.get(stem, []))
            assert local(cfg, "c.json", LAPTOP).command


def test_the_ds_config_is_deepspeeds_schema_and_the_fused_block():
    from ds_fused.engine.config import parse

    for stage in range(4):
        config = ds_config(composed(f"deepspeed=zero{stage}", "fused=loss", "deepspeed.gradient_clipping=0.5"))
        assert config["zero_optimization"] == {"stage": stage}
        assert config["gradient_clipping"] == 0.5
        assert config["tensorboard"]["output_path"] == "/runs/a"
    assert set(parse(config["ds_fused"]).wanted) == {"cross_entropy", "fused_linear_cross_entropy"}
    assert parse(ds_config(composed())["ds_fused"]).enabled
    assert not parse(ds_config(composed("fused=off"))["ds_fused"]).enabled


def test_a_typo_is_refused_by_name():
    with pytest.raises(HydraException, match="train.stepz"):
        composed("train.stepz=3")


TRAIN = f"{REPO}/launch/train.py"
CACHE = f"{REPO}/.cache"


def test_the_command_of_cpu_ranks():
    job = local(composed("experiment=quickstart_cpu"), "/runs/a/ds_config.json", LAPTOP)
    assert job.env.pop("PATH") == "/env/bin:/usr/bin"
    assert job.env == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4", "THP_MEM_ALLOC_ENABLE": "1"}
    assert " ".join(job.command) == (
        "/env/bin/deepspeed --num_gpus 2 --master_port 12345 --config /runs/a/ds_config.json "
        f"{TRAIN} --model {CACHE}/smollm2 --no-random_weights --no-gradient_checkpointing --zero_init "
        f"--text {CACHE}/shakespeare --block 256 --held_out 0.05 --eval_blocks 8 "
        "--steps 16 --seed 0 --log_every 2 --eval_every 0 --save_every 0 --no-resume --out /runs/a"
    )


def test_the_command_of_gpu_ranks():
    job = local(composed("cluster.port=29500", "data=text", "data.text=[a b.txt,c]"), "c.json", BOX)
    assert job.env == {"PATH": "/env/bin:/usr/bin"}
    # every GPU: left to DeepSpeed, which honours CUDA_VISIBLE_DEVICES
    assert job.command[:6] == ["/env/bin/deepspeed", "--master_port", "29500", "--config", "c.json", TRAIN]
    text = job.command.index("--text")
    assert job.command[text : text + 3] == ["--text", "a b.txt", "c"]
    assert "--num_gpus 3" in " ".join(local(composed("cluster.ranks=3"), "c.json", BOX).command)
    assert local(composed("cluster.accelerator=cpu"), "c.json", BOX).env["DS_ACCELERATOR"] == "cpu"


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("cluster.ranks=5", "cluster.ranks is 5, but this machine has 4 GPUs"),
        ("cluster.ranks=0", "cluster.ranks is 0"),
        ("cluster.accelerator=tpu", "cluster.accelerator is 'tpu'"),
    ],
)
def test_what_cannot_run_is_an_error_that_names_the_key(override, names):
    with pytest.raises(ValueError, match=names):
        local(composed(override), "c.json", BOX)


def test_a_dry_run_writes_the_folder_and_starts_nothing(tmp_path):
    folder = tmp_path / "a run"
    ended = start([sys.executable, "-m", "launch", "dry_run=true", f"folder={folder}", "cluster.accelerator=cpu"])
    assert ended.status == 0, ended.output
    assert "DS_ACCELERATOR=cpu" in ended.output and f"--config '{folder}/ds_config.json'" in ended.output
    assert sorted(path.name for path in folder.iterdir()) == ["ds_config.json", "run.yaml"]
    assert json.loads((folder / "ds_config.json").read_text())["ds_fused"] == {"enabled": True}
    record = OmegaConf.load(folder / "run.yaml")
    assert record.folder == str(folder) and record.train.steps == composed()["train"]["steps"]


def test_a_sweep_has_a_folder_for_every_point(tmp_path):
    points = ["-m", "dry_run=true", f"folder={tmp_path}", "cluster.accelerator=cpu", "train.seed=5,6"]
    ended = start([sys.executable, "-m", "launch", *points])
    assert ended.status == 0, ended.output
    assert [OmegaConf.load(tmp_path / str(i) / "run.yaml").train.seed for i in range(2)] == [5, 6]
    assert f"--out {tmp_path / '1'}" in ended.output


def test_cached_paths_are_where_the_data_is_put():
    assert composed()["model"]["path"] == str(entry.CACHE / "smollm2")
    assert set(entry.FETCH) == {"smollm2", "shakespeare"}
