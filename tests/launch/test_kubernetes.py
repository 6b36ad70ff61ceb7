"""The manifests of `python -m launch cluster=kubernetes`: as Kubernetes reads them, and what their pods run."""

from __future__ import annotations

import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import runs
import yaml
from launching import REPO, start
from test_clusters import rendered

# all that a manifest may hold
FULL = [
    "cluster=kubernetes", "cluster.image=registry/ds:1", "cluster.claim=runs", "cluster.mounts={data.v2: /data}",
    "cluster.env={NOTE: 'two\nlines', NCCL_DEBUG: INFO}", "cluster.env_from=tokens", "cluster.service_account=trainer",
    "cluster.cpus=64", "cluster.memory=512Gi", "cluster.preflight=true",
]  # fmt: skip
# the keys of a PyTorchJob that are not Kubernetes' own, in the CRD of the training operator 1.9
PYTORCH_JOB = {"runPolicy", "pytorchReplicaSpecs", "elasticPolicy", "nprocPerNode"}
REPLICAS = {"replicas", "restartPolicy", "template"}


def documents(*words: str) -> list[dict]:
    return list(yaml.safe_load_all(rendered(*FULL, *words).files["job.yaml"]))


def as_pods(document: dict) -> list[dict]:
    """A PyTorchJob's pods; any other document as it is. Kubernetes knows the first by the operator's CRD only."""
    if document["kind"] != "PyTorchJob":
        return [document]
    assert document["spec"].keys() <= PYTORCH_JOB
    specs = document["spec"]["pytorchReplicaSpecs"].values()
    assert all(spec.keys() <= REPLICAS and spec["restartPolicy"] == "OnFailure" for spec in specs)
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **spec["template"]} for spec in specs]


# an old release and a new one
@pytest.mark.parametrize("release", ["1.28", "1.37"])
@pytest.mark.parametrize("form", ["job", "pytorchjob"])
def test_kubernetes_own_schema_accepts_it(form, release):
    validator = pytest.importorskip("kubernetes_validate", reason="needs the package kubernetes-validate")
    for nodes in (1, 128):
        for document in documents(f"cluster.form={form}", f"cluster.nodes={nodes}"):
            for part in as_pods(document):
                # strict: a key that the schema doesn't know is an error
                validator.validate(part, release, strict=True)


def test_a_variable_of_two_lines_and_the_number_of_nodes_come_through():
    *_, job = documents("cluster.form=job", "cluster.nodes=128")
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "NOTE", "value": "two\nlines"} in container["env"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == 128
    *_, job = documents("cluster.nodes=128")
    assert [spec["replicas"] for spec in job["spec"]["pytorchReplicaSpecs"].values()] == [1, 127]


# YAML 1.1 as Go reads it takes them for other than text, which this reader doesn't in all cases
@pytest.mark.parametrize(
    "value", ["y", "N", "on", "null", "~", "1e3", "0o7", "0x1f", ".5", "-1", "12:30:45", "2001-01-01"]
)
def test_a_variable_that_is_no_text_without_quotes_has_them(value):
    text = rendered(*FULL, f"cluster.env={{NOTE: '{value}'}}").files["job.yaml"]
    assert re.search(rf"- name: NOTE\n +value: '{re.escape(value)}'\n", text)


def pods_of(form: str) -> list[dict[str, str]]:
    """What the operator, or the controller of Indexed Jobs, puts into the environment of each of two pods."""
    if form == "job":
        return [{"JOB_COMPLETION_INDEX": str(i)} for i in range(2)]
    master = {"MASTER_ADDR": "alpha", "MASTER_PORT": "23456", "WORLD_SIZE": "2", "PET_NNODES": "2"}
    return [{**master, "RANK": str(i), "PET_NODE_RANK": str(i)} for i in range(2)]


@pytest.mark.all
@pytest.mark.parametrize("form", ["job", "pytorchjob"])
def test_two_pods_train_as_two_local_ranks_do(form, two_hosts, tmp_path, tiny_model, text, local_run):
    """Each host is a pod: the container's own command, with the variables and the files that a pod has."""
    folder = tmp_path / "run"
    words = [
        *runs.overrides(tiny_model, text, folder), "cluster=kubernetes", "cluster.image=a", "cluster.claim=b",
        f"cluster.repo={REPO}", "cluster.nodes=2", "cluster.ranks=1", f"cluster.form={form}", "cluster.preflight=true",
    ]  # fmt: skip
    submitted = start([sys.executable, "-m", "launch", *words, "dry_run=true"])
    assert submitted.status == 0, submitted.output
    config, *_, job = yaml.safe_load_all((folder / "job.yaml").read_text())
    if form == "job":
        spec = job["spec"]["template"]["spec"]
        # the Service's name for pod 0
        with (tmp_path / "hosts" / "hosts").open("a") as file:
            file.write(f"198.18.0.1 {job['metadata']['name']}-0.{spec['subdomain']}\n")
    else:
        spec = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
    # the volume, empty but for the files of the ConfigMap
    folder.rename(tmp_path / "launched")
    folder.mkdir()
    for name, content in config["data"].items():
        (folder / name).write_text(content)
    assert json.loads((folder / "ds_config.json").read_text())["ds_fused"] == {"enabled": True}

    container = spec["containers"][0]
    env = {variable["name"]: variable["value"] for variable in container["env"]}
    env |= {"PYTHONPATH": str(REPO), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(pod):
        host, own = pod
        # started again it would not find the other one
        return start(host.inside(container["command"]), attempts=1, **env, **own)

    with ThreadPoolExecutor() as pool:
        first, second = pool.map(run, zip(two_hosts, pods_of(form), strict=True))
    assert all(e.status == 0 or e.aborted_at_its_end for e in (first, second)), first.output + second.output
    assert "preflight: all-reduce over 2 ranks" in first.output
    assert runs.losses(folder) == pytest.approx(runs.losses(local_run), rel=1e-6)
