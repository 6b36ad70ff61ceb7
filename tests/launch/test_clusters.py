"""What each kind of cluster renders for 1, 2, 16 and 128 nodes, against the texts in golden/.

Rewritten with REWRITE_GOLDEN=1; the diff is then the review.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from launching import REPO, free_port, start

import launch.__main__  # noqa: F401  (registers the resolver)
from launch.check import check, typed
from launch.clusters import KINDS, kubernetes
from launch.render import Host, Rendered
from launch.schema import Run

LOGIN = Host(gpus=0, cores=8, bin="/env/bin", path="/usr/bin", free_port=12345, settings={"NCCL_IB_HCA": "mlx5"})
GOLDEN = Path(__file__).with_name("golden")
NODES = (1, 2, 16, 128)


def hosts(nodes: int) -> str:
    return "cluster.hosts={" + ", ".join(f"n{i:03}: 8" for i in range(nodes)) + "}"


# what a user types for so many nodes
TYPED = {
    "hostfile": lambda nodes: ["cluster=hostfile", hosts(nodes), "cluster.ssh_port=2222", "cluster.address=10.0.0.1"],
    "slurm": lambda nodes: ["cluster=slurm", f"cluster.nodes={nodes}", "cluster.setup=[module load cuda]"],
    "torchrun": lambda nodes: ["cluster=torchrun", f"cluster.nodes={nodes}", "cluster.ranks=8", "cluster.address=a"],
    "pytorchjob": lambda nodes: ["cluster=kubernetes", f"cluster.nodes={nodes}", "cluster.image=i", "cluster.claim=c"],
    "indexed_job": lambda nodes: [*TYPED["pytorchjob"](nodes), "cluster.form=job", "cluster.env_from=tokens"],
}


def run_of(*overrides: str) -> Run:
    settings = ["folder=/runs/a", "model=hub", "model.path=gpt", "data=text", "data.text=[/texts/a b]"]
    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        return typed(compose("config", overrides=[*settings, *overrides]))


def rendered(*overrides: str) -> Rendered:
    run = run_of(*overrides)
    result = KINDS[run.cluster.kind].render(run, LOGIN)
    check(run, result.ranks)
    return result


def as_text(result: Rendered) -> str:
    """All of it but for the lines between the first node's and the last one's."""
    ends = list(result.nodes)[0], list(result.nodes)[-1]
    whole = {
        "command": json.dumps(result.command),
        "preflight": json.dumps(result.preflight),
        "env": json.dumps(result.env),
        "ranks": result.ranks,
        **{f"line of {name}": result.nodes[name] for name in dict.fromkeys(ends)},
        **{f"file {name}": f"\n{text}" for name, text in result.files.items()},
    }
    # where the repository lies is of no interest
    return "".join(f"{title}: {text}\n" for title, text in whole.items()).replace(str(REPO), "/repo")


@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("name", TYPED)
def test_it_renders_the_golden_text(name, nodes):
    result = rendered(*TYPED[name](nodes), "cluster.preflight=true")
    assert len(result.nodes) == nodes and result.ranks == nodes * 8
    golden = GOLDEN / f"{name}_{nodes}.txt"
    if os.environ.get("REWRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(as_text(result))
    assert as_text(result) == golden.read_text()


@pytest.mark.parametrize("name", ["slurm", "torchrun"])
def test_its_scripts_are_shell(name):
    for file, script in rendered(*TYPED[name](2), "cluster.preflight=true").files.items():
        ended = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert ended.returncode == 0 and not ended.stderr, f"{file}: {ended.stderr}"


def test_parts_of_a_hostfile_take_part():
    result = rendered("cluster=hostfile", hosts(3), "cluster.include='n000@n002:0,1'", "cluster.preflight=true")
    assert [*result.nodes] == ["n000", "n002"] and result.ranks == 10
    assert result.files["taking_part"] == "n000 slots=8\nn002 slots=2\n"
    assert " --include n000@n002:0,1 " in " ".join(result.command)
    result = rendered("cluster=hostfile", hosts(3), "cluster.exclude=n001", "cluster.env={NCCL_DEBUG: INFO}")
    assert [*result.nodes] == ["n000", "n002"] and result.ranks == 16
    assert "export NCCL_DEBUG=INFO" in result.files["node_env.sh"]
    # pdsh keeps what the user gives to ssh
    login = dataclasses.replace(LOGIN, ssh_args="-i key")
    ssh = KINDS["hostfile"].render(run_of("cluster=hostfile", hosts(1)), login).env["PDSH_SSH_ARGS_APPEND"]
    assert ssh.startswith("-i key -o BatchMode=yes -o ConnectTimeout=10 ")


def test_an_mpi_runner_finds_its_variables_in_a_file():
    result = rendered("cluster=hostfile", hosts(2), "cluster.launcher=openmpi", "cluster.accelerator=cpu")
    assert " --launcher openmpi " in " ".join(result.command) and "--venv_script" not in result.command
    assert result.env["DS_ENV_FILE"] == "/runs/a/deepspeed_env"
    variables = result.files["deepspeed_env"].splitlines()
    assert variables[:3] == ["PATH=/env/bin:/usr/bin", "NCCL_IB_HCA=mlx5", "DS_ACCELERATOR=cpu"]
    # DeepSpeed tells Open MPI's ranks no port
    assert variables[-1] == "MASTER_PORT=29500"


def test_a_slurm_job_of_cpu_ranks_that_is_not_put_back():
    options = ["cluster.accelerator=cpu", "cluster.ranks=2", "cluster.cpus=32", "cluster.requeue=false"]
    files = rendered("cluster=slurm", *options, "cluster.options=['--exclusive']").files
    assert "gres" not in files["job.sh"] and "scontrol requeue" not in files["job.sh"]
    for line in ("#SBATCH --no-requeue", "#SBATCH --exclusive", "export SRUN_CPUS_PER_TASK=32"):
        assert line in files["job.sh"].splitlines()
    assert "export OMP_NUM_THREADS=16" in files["node.sh"].splitlines()


def test_a_folder_that_sbatch_would_read_otherwise():
    job = rendered("cluster=slurm", "folder=/runs/lr%j").files["job.sh"]
    assert "#SBATCH --output=/runs/lr%%j/slurm-%j.out" in job and "--out /runs/lr%j" in job


def test_every_folder_has_a_name_of_its_own_in_kubernetes():
    folders = [
        "/runs/a",
        "/other/runs/a",
        "/runs/A",
        "/runs/\u65e5\u672c",
        "/\u0434/\u043d",
        "/\u0434/\u0430",
        f"/runs/{'a' * 60}b",
    ]
    names = [kubernetes.job_name(folder) for folder in [*folders, f"/runs/{'b' * 60}b"]]
    assert len({*names}) == len(names) and names[0].startswith("ds-fused-runs-a-")
    # the longest pod's is a label
    assert all(kubernetes.LABEL.fullmatch(f"{name}-worker-999") for name in names)


def test_c10d_nodes_run_one_line():
    result = rendered(*TYPED["torchrun"](2), "cluster.rendezvous=c10d")
    assert len({*result.nodes.values()}) == 1
    assert "--rdzv_backend c10d --rdzv_endpoint a:29500 --rdzv_id a " in result.files["node.sh"]


def test_a_pods_manifest_is_yaml_with_names_that_kubernetes_allows():
    mounts = "cluster.mounts={runs: /datasets}"
    result = rendered(*TYPED["pytorchjob"](3), "folder=/home/Me/runs/2026-11-25/A_run.1", mounts)
    config, job = yaml.safe_load_all(result.files["job.yaml"])
    assert json.loads(config["data"]["ds_config.json"])["ds_fused"] == {"enabled": True}
    assert job["metadata"]["name"] == config["metadata"]["name"] == "ds-fused-2026-11-25-a-run-1-4421d2"
    master, worker = job["spec"]["pytorchReplicaSpecs"].values()
    assert (master["replicas"], worker["replicas"]) == (1, 2)
    container = worker["template"]["spec"]["containers"][0]
    # its name is one that another volume has
    assert {"name": "mount-0", "mountPath": "/datasets"} in container["volumeMounts"]
    volumes = {volume["name"]: volume for volume in worker["template"]["spec"]["volumes"]}
    assert volumes["mount-0"]["persistentVolumeClaim"] == {"claimName": "runs"}
    assert volumes["runs"]["persistentVolumeClaim"] == {"claimName": "c"}
    with pytest.raises(ValueError, match="model.fetch is made on this machine"):
        rendered(*TYPED["pytorchjob"](1), "model=smollm2")


def stand_in(folder: Path, name: str, script: str) -> None:
    """A command of a cluster, played by a few lines of shell."""
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod((folder / name).stat().st_mode | stat.S_IXUSR)


# pdsh and ssh that only say what they were asked for
def test_the_lines_of_a_hostfiles_nodes_are_what_deepspeed_has_pdsh_run(tmp_path, tiny_model, text):
    stand_in(tmp_path, "pdsh", 'echo "PDSH $*"; echo "SSH $PDSH_SSH_ARGS_APPEND"')
    stand_in(tmp_path, "ssh", "exit 0")
    options = ["cluster=hostfile", "cluster.hosts={a: 1, b: 1}", "cluster.address=10.0.0.1", "cluster.accelerator=cpu"]
    options += ["model=hub", f"model.path={tiny_model}", "data=text", f"data.text=[{text}]", f"folder={tmp_path}/run"]
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = start([sys.executable, "-m", "launch", *options, "cluster.ssh_port=22"], PATH=path)
    assert ended.status == 1 and "no rank has said how it ended" in ended.output, ended.output
    asked = next(line for line in ended.output.splitlines() if line.startswith("PDSH "))
    assert asked.startswith(f"PDSH -S -f 1024 -w a,b source {tmp_path}/run/node_env.sh; ")
    assert "SSH -o BatchMode=yes -o ConnectTimeout=10" in ended.output
    lines = (tmp_path / "run" / "nodes.txt").read_text().splitlines()
    for rank, (name, line) in enumerate(zip("ab", lines, strict=True)):
        # behind the interpreter, which a link may name otherwise
        _, _, ours = line.removeprefix(f"{name}: ").partition(" ")
        assert asked.replace("--node_rank=%n", f"--node_rank={rank}").endswith(ours), f"{asked}\n{ours}"
    assert "export DS_ACCELERATOR=cpu" in (tmp_path / "run" / "node_env.sh").read_text()


# srun and scontrol of a cluster of one node, which signals the processes of its first job once they train
SRUN = """
while [ "$1" != bash ]; do shift; done
export SLURM_NODEID=0
set -m
"$@" &
if [ -z "$SLURM_RESTART_COUNT" ]; then
  until grep -q '"loss"' {run}/metrics.jsonl; do sleep 0.2; kill -0 $! || exit 1; done 2> /dev/null
  kill -USR1 -- -$!
fi
wait $!
"""


@pytest.mark.all
def test_a_slurm_job_that_is_signalled_saves_requeues_and_goes_on(tmp_path, tiny_model, text):
    run = tmp_path / "run"
    stand_in(tmp_path, "sbatch", 'echo "SUBMITTED $1"')
    stand_in(tmp_path, "scontrol", 'if [ "$1" = show ]; then echo localhost; else echo "REQUEUE $2"; fi')
    stand_in(tmp_path, "srun", SRUN.format(run=run))
    options = ["cluster=slurm", "cluster.ranks=1", "cluster.accelerator=cpu", f"cluster.port={free_port()}"]
    options += ["model=hub", f"model.path={tiny_model}", "data=text", f"data.text=[{text}]", "data.block=32"]
    options += ["train.steps=40", "train.log_every=1", "train.eval_every=0", "data.eval_blocks=1", f"folder={run}"]
    options += [
        "deepspeed=zero0",
        "deepspeed.tensorboard.enabled=false",
        "deepspeed.bf16.enabled=false",
        "deepspeed.train_micro_batch_size_per_gpu=1",
    ]
    env = {"PATH": os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])}
    ended = start([sys.executable, "-m", "launch", *options], **env)
    assert ended.status == 0 and f"SUBMITTED {run}/job.sh" in ended.output, ended.output

    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost"}
    ended = start(["bash", run / "job.sh"], **env)
    assert ended.status == 0 and "REQUEUE 7" in ended.output, ended.output
    last = int(re.search(r"stopped by SIGUSR1 after step (\d+)", ended.output)[1])
    assert (run / "checkpoints" / "latest").read_text() == f"global_step{last}"

    ended = start(["bash", run / "job.sh"], **env, SLURM_RESTART_COUNT="1")
    assert ended.status == 0 and "resumed from" in ended.output and "REQUEUE" not in ended.output, ended.output
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 41))
