"""Pods: a PyTorchJob of Kubeflow's training operator, or an Indexed Job, which every Kubernetes knows.

In a pod the run's folder has the path that it has here: it is a folder of the volume `cluster.claim`, and the two files
that all ranks read lie in it out of a ConfigMap. Model and text are paths of the image or of `cluster.mounts`. A pod
that is started again goes on from the newest checkpoint.
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
from dataclasses import dataclass
from typing import Optional

import yaml
from omegaconf import MISSING

from launch.render import PORT, Host, Rendered, at, choice, count, rank_env, record, script_with_config
from launch.schema import Cluster, Run

# ruff: noqa: UP045 (omegaconf knows Optional by this name)

NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# what Kubernetes' reader takes for a number or a truth without quotes, where PyYAML sets none: y, 1e3, 0o7
NO_TEXT = re.compile(r"[yYnN]|[-+.0-9].*")
SIZE = re.compile(r"[0-9]+(\.[0-9]+)?([KMGTPE]i?|k|m)?")


class _Readable(yaml.SafeDumper):
    """Texts of several lines as such; nothing as a reference to an earlier part."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else "'" if NO_TEXT.fullmatch(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Readable.add_representer(str, _text)


@dataclass
class Options(Cluster):
    image: str = MISSING  # holds the environment, with its commands on PATH
    claim: str = MISSING  # the volume of the runs' folders
    repo: str = "/workspace/ds_fused"  # where launch/ lies in the image
    form: str = "pytorchjob"
    nodes: int = 1
    namespace: str = "default"
    mounts: Optional[dict[str, str]] = None  # further claims, each with its path in the pods
    env_from: Optional[str] = None  # a Secret, whose keys become variables; the manifest has its name only
    service_account: Optional[str] = None
    cpus: Optional[int] = None
    memory: Optional[str] = None
    shared_memory: str = "16Gi"
    restarts: int = 3
    wait_s: int = 300  # that the preflight waits for all pods to come


def render(run: Run, host: Host) -> Rendered:
    cluster: Options = run.cluster
    for key in ("model", "data"):
        if getattr(run, key).fetch:
            raise ValueError(f"{key}.fetch is made on this machine, where no pod sees it: take model=hub and data=text")
    nodes, ranks = count("nodes", cluster.nodes), count("ranks", cluster.ranks)
    check_names(cluster)
    name = job_name(run.folder)
    choice("form", cluster.form, "pytorchjob", "job")
    documents = pytorch_job(run, name, nodes) if cluster.form == "pytorchjob" else indexed_job(run, name, nodes)
    text = yaml.dump_all([config_map(run, name), *documents], Dumper=_Readable, sort_keys=False, width=1000)
    command = pod_command(run, name)
    # the pods of a PyTorchJob: one master, and workers that are counted from 0
    pods = [f"{name}-{i}" for i in range(nodes)]
    if cluster.form == "pytorchjob":
        pods = [f"{name}-master-0", *(f"{name}-worker-{i}" for i in range(nodes - 1))]
    return Rendered(
        command=["kubectl", "apply", "--filename", at(run, "job.yaml")],
        env={},
        nodes={pod: command.replace(node_rank(cluster), str(i)) for i, pod in enumerate(pods)},
        ranks=nodes * ranks,
        files={"job.yaml": text},
        waits=False,
    )


def check_names(cluster: Options) -> None:
    """What Kubernetes would refuse by the form of its words."""
    if not LABEL.fullmatch(cluster.namespace):
        raise ValueError(
            f"cluster.namespace is {cluster.namespace!r}, but must be at most 63 small letters, digits and -, "
            "and neither begin nor end with -"
        )
    names = [(f"cluster.{key}", getattr(cluster, key)) for key in ("claim", "env_from", "service_account")]
    names += [("cluster.mounts", claim) for claim in cluster.mounts or {}]
    for key, name in names:
        if name is not None and not NAME.fullmatch(name):
            raise ValueError(f"{key} names {name!r}, but a name has small letters, digits, - and . only")
    for claim, path in (cluster.mounts or {}).items():
        if not path.startswith("/"):
            raise ValueError(f"cluster.mounts.{claim} is {path!r}, but must be a whole path")
    for key in ("memory", "shared_memory"):
        size = getattr(cluster, key)
        if size is not None and not SIZE.fullmatch(size):
            raise ValueError(f"cluster.{key} is {size!r}, but must be a size as 64Gi")


def job_name(folder: str) -> str:
    """A name that Kubernetes allows, from the last parts of the run's folder, and of this folder only."""
    parts = "-".join(folder.rstrip("/").split("/")[-2:]).lower()
    # of letters that it doesn't allow nothing is left, and other folders may have the same last parts
    digest = hashlib.sha256(folder.encode()).hexdigest()[:6]
    # 33: the pods' names are longer, and must stay below 64
    words = re.sub("[^a-z0-9]+", "-", parts).strip("-")[-33:].strip("-")
    return "-".join(filter(None, ["ds-fused", words, digest]))


def metadata(cluster: Options, name: str) -> dict:
    return {"name": name, "namespace": cluster.namespace, "labels": {"app": name}}


def config_map(run: Run, name: str) -> dict:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(run.cluster, name), "data": record(run)}


def node_rank(cluster: Options) -> str:
    return '"$RANK"' if cluster.form == "pytorchjob" else '"$JOB_COMPLETION_INDEX"'


def pod_command(run: Run, name: str) -> str:
    """The line of shell of every pod."""
    cluster: Options = run.cluster
    torchrun = f"torchrun --nnodes {cluster.nodes} --nproc_per_node {cluster.ranks} --node_rank {node_rank(cluster)}"
    port = count("port", cluster.port, PORT)
    if cluster.form == "pytorchjob":
        address, meets_at = '"$MASTER_ADDR"', '"$MASTER_PORT"'
        names = f"{name}-master-0 {name}-worker-{{0..{cluster.nodes - 2}}}"
    else:
        address, meets_at = f"{name}-0.{name}", str(port)
        names = f"{name}-{{0..{cluster.nodes - 1}}}"
    torchrun += f" --master_addr {address} --master_port {meets_at}"
    _, *options = script_with_config(run)
    train = f"{torchrun} {shlex.join([script(cluster, 'train.py'), *options, '--resume'])}"
    if not cluster.preflight:
        return train
    preflight = f"{torchrun} --rdzv_conf timeout=55 {shlex.quote(script(cluster, 'preflight.py'))}"
    if cluster.nodes == 1:
        return f"{preflight} && {train}"
    where = f"--address {address} --port {port + 1} --seconds {cluster.wait_s}"
    call = f"python {shlex.quote(script(cluster, 'roll_call.py'))} --nodes {cluster.nodes} --node {node_rank(cluster)}"
    # the pods' names are in braces, which the shell spells out
    return f"{call} {where} --names {names} && {preflight} && {train}"


def script(cluster: Options, name: str) -> str:
    """A file of launch/ in the image."""
    return os.path.join(cluster.repo, "launch", name)


def pod(run: Run, name: str) -> dict:
    cluster: Options = run.cluster
    on_cpu = choice("accelerator", cluster.accelerator, "auto", "cpu") == "cpu"
    env = rank_env(cluster, on_cpu, (cluster.cpus or 1) // cluster.ranks)
    volumes = {
        "runs": {"persistentVolumeClaim": {"claimName": cluster.claim}},
        "config": {"configMap": {"name": name}},
        # what NCCL and the workers of a loader share; a container's own is 64 MiB
        "shared-memory": {"emptyDir": {"medium": "Memory", "sizeLimit": cluster.shared_memory}},
    }
    mounts = [{"name": "runs", "mountPath": run.folder, "subPath": name}]
    mounts += [{"name": "config", "mountPath": at(run, file), "subPath": file} for file in record(run)]
    mounts += [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    for i, (claim, path) in enumerate((cluster.mounts or {}).items()):
        # a claim's name may be one of the volumes above, or have dots, which a volume's may not
        volumes[f"mount-{i}"] = {"persistentVolumeClaim": {"claimName": claim}}
        mounts.append({"name": f"mount-{i}", "mountPath": path})
    limits = {
        "nvidia.com/gpu": None if on_cpu else cluster.ranks, "cpu": cluster.cpus, "memory": cluster.memory
    }  # fmt: skip
    container = {
        # the operator looks for a container of this name
        "name": "pytorch",
        "image": cluster.image,
        "command": ["bash", "-c", pod_command(run, name)],
        "env": [{"name": key, "value": value} for key, value in env.items()],
        "resources": {"limits": {key: value for key, value in limits.items() if value is not None}},
        "volumeMounts": mounts,
    }
    if cluster.env_from:
        container["envFrom"] = [{"secretRef": {"name": cluster.env_from}}]
    spec = {"containers": [container], "volumes": [{"name": key, **volume} for key, volume in volumes.items()]}
    if cluster.service_account:
        spec["serviceAccountName"] = cluster.service_account
    return spec


def pytorch_job(run: Run, name: str, nodes: int) -> list[dict]:
    def replicas(number: int) -> dict:
        return {"replicas": number, "restartPolicy": "OnFailure", "template": {"spec": pod(run, name)}}

    specs = {"Master": replicas(1)}
    if nodes > 1:
        specs["Worker"] = replicas(nodes - 1)
    return [
        {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "metadata": metadata(run.cluster, name),
            "spec": {"runPolicy": {"backoffLimit": run.cluster.restarts}, "pytorchReplicaSpecs": specs},
        }
    ]


def indexed_job(run: Run, name: str, nodes: int) -> list[dict]:
    """A Service without an address of its own, by which pod 0 is found, and the Job."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(run.cluster, name),
        # pods find each other before they are ready
        "spec": {"clusterIP": "None", "selector": {"app": name}, "publishNotReadyAddresses": True},
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(run.cluster, name),
        "spec": {
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            # where one fails all do, and each counts
            "backoffLimit": run.cluster.restarts * nodes,
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"subdomain": name, "restartPolicy": "OnFailure", **pod(run, name)},
            },
        },
    }
    return [service, job]
