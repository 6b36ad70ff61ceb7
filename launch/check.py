"""Whatever can't run is an error here, before anything starts: one ValueError that names the key and what came."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

import ds_fused
from launch.clusters import KINDS, hostfile
from launch.environment import is_secret
from launch.render import ds_config
from launch.schema import Run

# read by parts of DeepSpeed other than its DeepSpeedConfig
ELSEWHERE = {"ds_fused", "sequence_parallel_size"}


def typed(composed: DictConfig) -> Run:
    """The composed configuration as a Run: every key known, every value of its type."""
    kind = OmegaConf.select(composed, "cluster.kind")
    if kind not in KINDS:
        raise ValueError(f"cluster.kind is {kind!r}, but must be one of {', '.join(KINDS)}")
    try:
        schema = OmegaConf.structured(Run)
        schema.cluster = OmegaConf.structured(KINDS[kind].Options)
        run: Run = OmegaConf.to_object(OmegaConf.merge(schema, composed))
    except OmegaConfBaseException as error:
        # the lines behind the first name omegaconf's own objects
        raise ValueError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
    if run.resume not in (True, False, "auto"):
        raise ValueError(f"resume is {run.resume!r}, but must be auto, true or false")
    if kind == "hostfile":
        run.cluster.hosts = hostfile.read_hosts(run.cluster)
    return run


def refuse_secrets(composed: Mapping, where: str = "") -> None:
    """The run's folder holds the whole configuration, so no secret may come in by it."""
    for key, value in composed.items():
        if isinstance(value, Mapping):
            refuse_secrets(value, f"{where}{key}.")
        elif value is not None and is_secret(str(key), value):
            raise ValueError(
                f"{where}{key} looks like a secret, and would be written to the run's folder: export it instead, or "
                "put it into ~/.deepspeed_env, which DeepSpeed takes to the nodes of a hostfile"
            )


def refuse_secrets_typed(words: Sequence[str]) -> None:
    """The same of a command line: Hydra writes that of a sweep down before any point of it is composed."""
    for word in words:
        for name in re.findall(r"([\w-]+)\s*[=:]", word):
            refuse_secrets({name: word})


def check(run: Run, ranks: int) -> None:
    """What DeepSpeed and ds_fused would refuse on the ranks."""
    check_batch(run.deepspeed, ranks)
    check_deepspeed(run, ranks)
    try:
        ds_fused.parse(run.fused)
    except ValueError as error:
        raise ValueError(f"fused: {error}") from None


def data_parallel(deepspeed: Mapping, ranks: int) -> int:
    """How many ranks see different data."""
    for key in ("tensor_parallel.autotp_size", "sequence_parallel_size"):
        size = OmegaConf.select(OmegaConf.create(dict(deepspeed)), key) or 1
        if ranks % size:
            raise ValueError(f"deepspeed.{key} is {size}, which doesn't divide the {ranks} ranks of the cluster")
        ranks //= size
    return ranks


def check_batch(deepspeed: Mapping, ranks: int) -> None:
    """train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x ranks."""
    ranks = data_parallel(deepspeed, ranks)
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    whole, micro, accumulate = (deepspeed.get(key) for key in keys)
    for key in keys:
        if deepspeed.get(key) is not None and not (isinstance(deepspeed[key], int) and deepspeed[key] > 0):
            raise ValueError(f"deepspeed.{key} is {deepspeed[key]!r}, but must be a positive number")
    if whole is None:
        if micro is None:
            raise ValueError(f"deepspeed.{keys[1]} must be given, or deepspeed.{keys[0]}")
        return
    product = (micro or 1) * (accumulate or 1) * ranks
    exact = micro is not None and accumulate is not None
    if whole != product if exact else whole % product:
        factors = [f"deepspeed.{key} ({deepspeed[key]})" for key in keys[1:] if deepspeed.get(key) is not None]
        raise ValueError(
            f"deepspeed.{keys[0]} is {whole}, but {' x '.join([*factors, f'{ranks} ranks'])} is {product}"
            + ("" if exact else ", which doesn't divide it")
        )


class _Read(dict):
    """A dict that remembers which keys were asked for."""

    def __init__(self, *args: object):
        super().__init__(*args)
        self.asked: set[str] = set()

    def __copy__(self) -> _Read:
        # DeepSpeed reads a copy
        return self

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        # `key in config.keys()` is a question too
        return self


def check_deepspeed(run: Run, ranks: int) -> None:
    """DeepSpeed's own reading of its configuration; a key that it doesn't ask for is a typo."""
    from deepspeed.runtime.config import DeepSpeedConfig

    # its own copy: DeepSpeed renames what is out of date in place
    config = _Read(copy.deepcopy(ds_config(run)))
    if config.get("train_batch_size"):
        # where no rank runs DeepSpeed counts one; check_batch has seen to all of them
        config["train_batch_size"] //= data_parallel(config, ranks)
    try:
        DeepSpeedConfig(config)
    except ValidationError as error:
        # a block's own error knows the path inside of the block only
        wrong = error.errors()[0]
        inside = ".".join(map(str, wrong["loc"]))
        key = next((path for path in paths(run.deepspeed) if f".{path}".endswith(f".{inside}")), inside)
        raise ValueError(f"deepspeed.{key} is {wrong['input']!r}: {wrong['msg']}") from None
    except Exception as error:
        # DeepSpeed's words, whatever their type: assertions and errors of its own
        raise ValueError(f"deepspeed: {error}") from None
    for key in run.deepspeed:
        if key not in config.asked | ELSEWHERE:
            near = difflib.get_close_matches(key, config.asked, n=1)
            raise ValueError(
                f"deepspeed.{key} is no key that DeepSpeed reads" + (f"; did you mean {near[0]}?" if near else "")
            )


def paths(config: Mapping) -> Iterator[str]:
    """Every key of a nested configuration, with dots."""
    for key, value in config.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f"{key}.{path}" for path in paths(value))


def missing_paths(run: Run) -> Iterator[str]:
    """What the configuration names and this machine doesn't have, each with its key."""
    if run.cluster.kind == "kubernetes":
        # its paths are of the image and of the volumes
        return
    if run.model.fetch is None and looks_like_a_folder(run.model.path) and not os.path.isdir(run.model.path):
        yield f"model.path is {run.model.path}: no such folder"
    if run.model.tokenizer and looks_like_a_folder(run.model.tokenizer) and not os.path.isdir(run.model.tokenizer):
        yield f"model.tokenizer is {run.model.tokenizer}: no such folder"
    if run.data.fetch is None:
        for place in run.data.text:
            if not os.path.exists(place):
                yield f"data.text names {place}: no such file or folder"
    if run.resume is True and not os.path.isfile(os.path.join(run.folder, "checkpoints", "latest")):
        yield f"resume is true, but {run.folder}/checkpoints holds no checkpoint; resume=auto starts anew then"


def looks_like_a_folder(name: str) -> bool:
    """A hub name is `name` or `owner/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
