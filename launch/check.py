"""Whatever can't run is an error here, before anything starts: one ValueError that names the key and what came."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ds_fused
from launch import checkpoints, limits
from launch.check_deepspeed import check_batch, check_deepspeed, check_parallel
from launch.clusters import KINDS, hostfile
from launch.environment import is_secret
from launch.real_data import FETCH
from launch.schema import Data, Model, Run, Train

# what is given a value, with the value
NAMES = re.compile(r"([\w-]+)\s*[=:](?=\s*['\"]?([^\s,{}\[\]'\"]*))")
# key -> the least that makes sense
LEAST = {
    **limits.LEAST,
    "cluster.ssh_port": 1,
    "cluster.cpus": 1,
    "cluster.notice": 1,
    "cluster.restarts": 0,
    "cluster.wait_s": 1,
}
# and the most: a roll call of nodes takes the port behind the ranks', and each node has a line of its own in what is
# rendered
MOST = {
    **limits.MOST,
    "cluster.port": 65534,
    "cluster.ssh_port": 65535,
    "cluster.nodes": 10**5,
}


def typed(composed: DictConfig) -> Run:
    """The composed configuration as a Run: every key known, every value of its type."""
    kind = OmegaConf.select(composed, "cluster.kind")
    if kind not in KINDS:
        raise ValueError(f"cluster.kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    check_env(composed)
    try:
        schema = OmegaConf.structured(Run)
        schema.cluster = OmegaConf.structured(KINDS[kind].Options)
        run: Run = OmegaConf.to_object(OmegaConf.merge(schema, composed))
    except OmegaConfBaseException as error:
        # the lines behind the first name omegaconf's own objects
        where = error.full_key or unmergeable(schema, composed) or "configuration"
        if "is not a ListConfig" in str(error):
            value = OmegaConf.select(composed, where)
            raise ValueError(f"{where} is {value!r}, but must be a list: '{where}=[{value}]'") from None
        raise ValueError(unknown_key(where, kind) or f"{where}: {str(error).splitlines()[0]}") from None
    if run.resume not in (True, False, "auto"):
        raise ValueError(f"resume is {run.resume!r}, but must be auto, true or false")
    if kind == "hostfile":
        run.cluster.hosts = hostfile.read_hosts(run.cluster)
    return run


def unknown_key(where: str, kind: str) -> str | None:
    """What is said of a key that a typed group doesn't have; None of one that it has, and of the other groups."""
    group, _, name = where.rpartition(".")
    types = {"": Run, "model": Model, "data": Data, "train": Train}
    types |= {"cluster": KINDS[kind].Options} if kind in KINDS else {}
    known = [field.name for field in dataclasses.fields(types[group])] if group in types else [name]
    if name in known:
        return None
    near = difflib.get_close_matches(name, known, n=1)
    there = f"{group} has" if group else "there are"
    return f"{where} is no key: {there} {', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")


def check_env(composed: DictConfig) -> None:
    """A variable's value is text, of which YAML may have made something else: True, 1000.0."""
    env = OmegaConf.to_container(composed.cluster).get("env")
    for name, value in env.items() if isinstance(env, dict) else ():
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise ValueError(
                f"cluster.env.{name} is {value!r}, but must be text: put it in quotes, as {{{name}: 'true'}}"
            )


def unmergeable(schema: DictConfig, composed: DictConfig) -> str | None:
    """The first key whose value is a list where the schema has a mapping, or the reverse: omegaconf doesn't name it."""
    for group in ("model", "data", "train", "cluster"):
        for key in composed[group]:
            try:
                OmegaConf.merge(schema[group], {key: composed[group][key]})
            except OmegaConfBaseException:
                return f"{group}.{key}"
    return None


def refuse_secrets(composed: Mapping, where: str = "") -> None:
    """The run's folder holds the whole configuration, so no secret may come in by it."""
    for key, value in composed.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, f"{where}{key}.")
        elif value is not None and (is_secret(str(key), value) or sets_a_secret(key, value)):
            raise ValueError(
                f"{where}{key} looks like a secret, and would be written to the run's folder: export it instead, or "
                "put it into ~/.deepspeed_env, which DeepSpeed takes to the nodes of a hostfile"
            )


def sets_a_secret(key: object, value: object) -> bool:
    """Whether it is text for a shell that sets a variable which looks like one: `export HF_TOKEN=...`."""
    return key in ("setup", "options", "launcher_args") and any(
        is_secret(*given) for given in NAMES.findall(str(value))
    )


def refuse_secrets_typed(words: Sequence[str]) -> None:
    """The same of a command line: Hydra writes that of a sweep down before any point of it is composed."""
    for word in words:
        for name, value in NAMES.findall(word):
            # a value of several parts is cut
            refuse_secrets({name: word if is_secret("", word) else value})


def refuse_no_folder(words: Sequence[str]) -> None:
    """A variable of the shell that is not set makes it empty, and Hydra would take that for the folder it is in."""
    if any(re.fullmatch(r"\+{0,2}folder=(''|\"\")?", word) for word in words):
        raise ValueError("folder is empty, but must name the run's folder (folder=. is this one)")


def check(run: Run, ranks: int) -> None:
    """What train.py, DeepSpeed and ds_fused would refuse on the ranks."""
    check_numbers(run)
    check_fetch(run)
    check_batch(run.deepspeed, ranks)
    check_parallel(run)
    check_deepspeed(run, ranks)
    check_checkpoint(run, ranks)
    try:
        ds_fused.parse_config(run.fused)
    except ValueError as error:
        raise ValueError(f"fused: {error}") from None


def _given(run: Run, key: str) -> object:
    """None where it stays open, or is a key of another kind of cluster."""
    group, name = key.split(".")
    return getattr(getattr(run, group), name, None)


def check_numbers(run: Run) -> None:
    for key in {**LEAST, **MOST}:
        value = _given(run, key)
        # a port may also be "auto"
        if isinstance(value, int):
            limits.check(key, value, LEAST.get(key), MOST.get(key))
    limits.check_share("data.held_out", run.data.held_out)
    if not run.data.text:
        raise ValueError("data.text is empty, but must name a file or a folder")


def check_fetch(run: Run) -> None:
    for name in ("model", "data"):
        fetch = getattr(run, name).fetch
        if fetch is not None and fetch not in FETCH:
            raise ValueError(f"{name}.fetch is {fetch!r}, but must be one of {', '.join(FETCH)}, or null")


def missing_paths(run: Run) -> Iterator[str]:
    """What the configuration names and this machine doesn't have, each with its key."""
    if run.cluster.kind == "kubernetes":
        # its paths are of the image and of the volumes
        return
    if run.model.fetch is None:
        for key in ("path", "tokenizer"):
            folder = getattr(run.model, key)
            if folder and looks_like_a_folder(folder) and not os.path.isdir(folder):
                yield f"model.{key} is {folder}: no such folder"
        if os.path.isdir(run.model.path) and not os.path.isfile(os.path.join(run.model.path, "config.json")):
            yield f"model.path is {run.model.path}: no config.json in it"
    if run.data.fetch is None:
        for place in run.data.text:
            if not os.path.exists(place):
                yield f"data.text names {place}: no such file or folder"
            elif os.path.isdir(place) and not any(Path(place).rglob("*.txt")):
                yield f"data.text names {place}: no *.txt in it"
    if run.cluster.kind == "hostfile" and run.cluster.launcher != "pdsh" and not find_spec("mpi4py"):
        yield f"cluster.launcher is {run.cluster.launcher}, whose ranks need the package mpi4py: it is not installed"
    yield from missing_checkpoint(run)


def missing_checkpoint(run: Run) -> Iterator[str]:
    folder = Path(run.folder, "checkpoints")
    there = (folder / "latest").is_file()
    if run.resume is True and not there:
        yield f"resume is true, but {folder} holds no checkpoint; resume=auto starts anew then"
    elif run.resume and there:
        try:
            checkpoints.newest(folder)
        except ValueError as error:
            yield f"resume is {str(run.resume).lower()}, but {error}"


def check_checkpoint(run: Run, ranks: int) -> None:
    """Whether the run can go on from the one that is there."""
    folder = Path(run.folder, "checkpoints")
    options = OmegaConf.create(run.deepspeed).get("checkpoint") or {}
    # such ones are for any number of ranks, or lie on other machines too
    asked = any(options.get(name) for name in ("load_universal", "use_node_local_storage"))
    if not run.resume or asked or [*missing_checkpoint(run)] or not (folder / "latest").is_file():
        return
    checkpoint = folder / checkpoints.newest(folder)
    stage = OmegaConf.select(OmegaConf.create(run.deepspeed), "zero_optimization.stage") or 0
    if reason := checkpoints.unlike(checkpoint, ranks, stage):
        raise ValueError(
            f"resume is {str(run.resume).lower()}, but {checkpoint} {reason}; what DeepSpeed's ds_to_universal makes "
            "of it can be loaded with +deepspeed.checkpoint.load_universal=true"
        )


def looks_like_a_folder(name: str) -> bool:
    """A hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
