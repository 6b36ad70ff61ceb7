"""The config of ``deepspeed --config FILE``, for a script that gives ``deepspeed.initialize`` none.

A script may give one all the same: the same file, or what Accelerate and the Trainer make of it (values that were
"auto" filled in, others added). Anything else would be two configs for one job: an error that names both.
"""

from __future__ import annotations

import base64
import functools
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from types import ModuleType

from ds_fused.autoload import CONFIG_VARIABLE


def hook(deepspeed: ModuleType) -> None:
    """deepspeed was imported, or (where it was imported before torch) is being imported."""
    if "initialize" in vars(deepspeed):
        _offer(deepspeed, os.environ[CONFIG_VARIABLE])
    else:
        # We came along with torch, which deepspeed imports before it defines anything: wait for the first use.
        deepspeed.__class__ = _HalfBuilt


class _HalfBuilt(ModuleType):
    """deepspeed until somebody asks it for something that it has only when complete."""

    def __getattribute__(self, name: str) -> object:
        if name in ("initialize", "add_config_arguments") and name in self.__dict__:
            self.__class__ = ModuleType
            _offer(self, os.environ[CONFIG_VARIABLE])
            return self.__dict__[name]
        return super().__getattribute__(name)


def _offer(deepspeed: ModuleType, config: str) -> None:
    if hasattr(deepspeed.initialize, "_ds_fused_hook"):
        return
    deepspeed.initialize = _with_default(deepspeed.initialize, config)
    add_core_arguments = deepspeed._add_core_arguments

    @functools.wraps(add_core_arguments)
    def with_defaults(parser):
        parser = add_core_arguments(parser)
        # beneath deepspeed.add_config_arguments, for scripts that read args.deepspeed_config themselves
        parser.set_defaults(deepspeed=True, deepspeed_config=config)
        return parser

    deepspeed._add_core_arguments = with_defaults


def _with_default(initialize, config: str):
    signature = inspect.signature(initialize)

    @functools.wraps(initialize)
    def with_default(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        own = _own_config(bound.arguments)
        if own is None:
            bound.arguments["config"] = config
        else:
            difference = two_configs(config, own)
            if difference is not None:
                raise ValueError(f"two different DeepSpeed configs: {difference}")
        return initialize(*bound.args, **bound.kwargs)

    with_default._ds_fused_hook = True
    return with_default


def _own_config(given: Mapping[str, object]) -> object:
    """The config that the script gives, in any of the ways that deepspeed.initialize accepts."""
    args = given.get("args")
    places = (
        given.get("config"),
        given.get("config_params"),
        getattr(args, "deepspeed_config", None),
        getattr(args, "deepscale_config", None),
    )
    return next((place for place in places if place is not None), None)


def two_configs(file: str, own: object) -> str | None:
    """How ``own`` (a path or a dict) contradicts ``file``; None when it is the same config."""
    if isinstance(own, Mapping):
        name, content = "the dict given to deepspeed.initialize", own
    else:
        content = _read(own) if os.path.isfile(own) else _decoded(own)
        if content is None:
            return f"--config {file} and {own} (no such file, and not base64), given to deepspeed.initialize"
        if os.path.exists(own) and os.path.samefile(file, own):
            return None
        name = f"{own}, given to deepspeed.initialize"
    for where, here, there in _contradictions(_read(file), content):
        return f"--config {file} has {where} = {here}, {name} has {there}"
    return None


def _read(file: str) -> Mapping[str, object]:
    # what DeepSpeed reads its configs with
    from deepspeed.runtime.config import hjson

    with open(file) as f:
        return hjson.load(f)


def _decoded(text: str) -> Mapping[str, object] | None:
    """A config in base64, the third form that DeepSpeed takes; None for any other text."""
    from deepspeed.runtime.config import hjson

    try:
        content = hjson.loads(base64.urlsafe_b64decode(text).decode())
    except ValueError:
        return None
    return content if isinstance(content, Mapping) else None


def _contradictions(file: Mapping, own: Mapping, path: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, value in file, value in own) of what the file sets and the other one sets otherwise, or not at all."""
    for key, value in file.items():
        where = f"{path}.{key}" if path else key
        other = own.get(key, "nothing")
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from _contradictions(value, other, where)
        elif where in _RESET or value == "auto" or (where in _DROPPED and where not in own):
            continue
        elif value != other:
            yield where, json.dumps(value), json.dumps(other, default=str)


# Accelerate sets it to infinity in every config
_RESET = {"steps_per_print"}
# the Trainer and Accelerate take them out for an engine that only evaluates
_DROPPED = {"optimizer", "scheduler"}
