"""What DeepSpeed would refuse on the ranks, or do without in silence: keys, types, and a batch that multiplies.

DeepSpeed reads its configuration itself here. What it only asks for later is checked in its place: the types of single
values, and the options of the optimizer and of the scheduler, which are arguments of Python classes.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import pkgutil
from collections.abc import Iterable, Iterator, Mapping

from omegaconf import OmegaConf
from pydantic import ValidationError

from launch.render import ds_config
from launch.schema import Run

# read by parts of DeepSpeed other than its DeepSpeedConfig
ELSEWHERE = {"ds_fused", "sequence_parallel_size"}
UNREAD = "is no key that DeepSpeed reads"
# blocks of which DeepSpeed asks every key by its name; the others refuse an unknown one, or are read later
BY_NAME = (
    "optimizer", "scheduler", "activation_checkpointing", "aio", "checkpoint", "data_types", "flops_profiler",
    "torch_autocast",
)  # fmt: skip
# optimizer.type, in small letters -> the classes that may get optimizer.params; any other is a class of torch.optim
OPTIMIZERS = {
    "adam": ("torch.optim.Adam", "deepspeed.ops.adam.FusedAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam"),
    "adamw": ("torch.optim.AdamW", "deepspeed.ops.adam.FusedAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam"),
    "adagrad": ("torch.optim.Adagrad", "deepspeed.ops.adagrad.DeepSpeedCPUAdagrad"),
    "lamb": ("deepspeed.ops.lamb.FusedLamb",),
    "lion": ("deepspeed.ops.lion.FusedLion", "deepspeed.ops.lion.DeepSpeedCPULion"),
}
# what DeepSpeed itself takes out of the params of adam and adamw
TAKEN_OUT = {"torch_adam", "adam_w_mode", "fp32_optimizer_states"}
# of an optimizer's options those that are numbers in all of them, and none below 0
NUMBERS = ("lr", "weight_decay", "eps")


def data_parallel(deepspeed: Mapping, ranks: int) -> int:
    """How many ranks see different data."""
    for key in ("tensor_parallel.autotp_size", "sequence_parallel_size"):
        size = OmegaConf.select(OmegaConf.create(dict(deepspeed)), key) or 1
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"deepspeed.{key} is {size!r}, but must be a positive number")
        if ranks % size:
            raise ValueError(f"deepspeed.{key} is {size}, which doesn't divide the {ranks} ranks of the cluster")
        ranks //= size
    return ranks


def check_parallel(run: Run) -> None:
    """What train.py can't do where ranks share their data."""
    deepspeed = OmegaConf.create(run.deepspeed)
    if (size := deepspeed.get("sequence_parallel_size") or 1) > 1:
        raise ValueError(
            f"deepspeed.sequence_parallel_size is {size}, but must be 1: train.py gives every rank whole sequences"
        )
    if (OmegaConf.select(deepspeed, "tensor_parallel.autotp_size") or 1) == 1:
        return
    if deepspeed.get("train_batch_size"):
        raise ValueError(
            "deepspeed.train_batch_size can't be combined with tensor_parallel.autotp_size, since DeepSpeed multiplies "
            "by all ranks: give train_micro_batch_size_per_gpu and gradient_accumulation_steps"
        )
    if (
        OmegaConf.select(deepspeed, "zero_optimization.stage") == 3
        and run.model.zero_init
        and not run.model.random_weights
    ):
        raise ValueError(
            "model.zero_init is true, but must be false under ZeRO-3 with tensor_parallel.autotp_size: transformers "
            "reads no weights into such a model"
        )


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
    """A dict that remembers which keys were asked for, as the blocks in it do."""

    def __init__(self, config: Mapping):
        super().__init__({key: _Read(value) if isinstance(value, dict) else value for key, value in config.items()})
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

    if "ds_fused" in run.deepspeed:
        raise ValueError("deepspeed.ds_fused is the group fused: set its keys there")
    check_types(run.deepspeed)
    check_optimizer(run.deepspeed)
    check_scheduler(run.deepspeed)
    # its own copy: DeepSpeed renames what is out of date in place
    config = _Read(copy.deepcopy(ds_config(run)))
    if config.get("train_batch_size"):
        # where no rank runs DeepSpeed counts one; check_batch has seen to all of them
        config["train_batch_size"] //= data_parallel(run.deepspeed, ranks)
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
    refuse_unknown("deepspeed", run.deepspeed, config.asked | ELSEWHERE, UNREAD)
    for name in BY_NAME:
        # DeepSpeed may leave a block that is switched off unread
        if isinstance(config.get(name), _Read) and config[name].asked:
            refuse_unknown(f"deepspeed.{name}", run.deepspeed[name], config[name].asked, UNREAD)


def refuse_unknown(where: str, given: Iterable[str], known: Iterable[str], why: str) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"{where}.{key} {why}" + (f"; did you mean {near[0]}?" if near else ""))


def check_types(deepspeed: Mapping) -> None:
    """DeepSpeed takes single values as they are: each must be of the kind of its default in DeepSpeed's constants."""
    from deepspeed.runtime import constants

    names = vars(constants)
    defaults = {names[name]: names.get(f"{name}_DEFAULT") for name in names if isinstance(names[name], str)}
    # a number may be given without its point; the type itself, since true is a number to Python
    kinds = {bool: ((bool,), "true or false"), float: ((int, float), "a number"), int: ((int,), "a whole number")}
    for key, value in deepspeed.items():
        allowed, words = kinds.get(type(defaults.get(key)), ((), ""))
        if allowed and type(value) not in allowed:
            raise ValueError(f"deepspeed.{key} is {value!r}, but must be {words}")
    check_not_negative("deepspeed", deepspeed, ("gradient_clipping",))


def check_not_negative(where: str, given: Mapping, names: Iterable[str]) -> None:
    for name in names:
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
            raise ValueError(f"{where}.{name} is {value!r}, but must be a number, and not below 0")


def arguments(*classes: type) -> set[str]:
    """The options that any of the classes takes behind its first argument: parameters, or an optimizer."""
    return {name for cls in classes for name in [*inspect.signature(cls).parameters][1:]}


def kind_and_params(deepspeed: Mapping, name: str) -> tuple[str, Mapping]:
    """A block's type and params; each empty where it isn't given."""
    where, block = f"deepspeed.{name}", deepspeed.get(name) or {}
    if not isinstance(block, Mapping):
        raise ValueError(f"{where} is {block!r}, but must be a block with type and params")
    kind, params = block.get("type") or "", block.get("params") or {}
    if not isinstance(kind, str):
        raise ValueError(f"{where}.type is {kind!r}, but must be a name")
    if not isinstance(params, Mapping):
        raise ValueError(f"{where}.params is {params!r}, but must be a block")
    return kind, params


def check_optimizer(deepspeed: Mapping) -> None:
    """train.py makes no optimizer of its own, so DeepSpeed must; its options are its class's arguments."""
    import torch
    from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS

    kind, params = kind_and_params(deepspeed, "optimizer")
    if not kind:
        raise ValueError("deepspeed.optimizer.type must be given")
    if kind.lower() in OPTIMIZERS:
        classes = [pkgutil.resolve_name(name) for name in OPTIMIZERS[kind.lower()]]
        is_adam = kind.lower().startswith("adam")
        # with torch_adam it is PyTorch's, whatever else there is
        known = arguments(*classes[: 1 if is_adam and params.get("torch_adam") else None])
        known |= TAKEN_OUT if is_adam else set()
    elif kind.lower() in DEEPSPEED_OPTIMIZERS:
        # of packages that may be missing here, or of several classes at once
        return
    elif isinstance(getattr(torch.optim, kind, None), type):
        known = arguments(getattr(torch.optim, kind))
    else:
        near = difflib.get_close_matches(kind.lower(), DEEPSPEED_OPTIMIZERS, n=1)
        raise ValueError(
            f"deepspeed.optimizer.type is {kind!r}, but must be one of {', '.join(DEEPSPEED_OPTIMIZERS)}, or a class "
            "of torch.optim" + (f"; did you mean {near[0]}?" if near else "")
        )
    refuse_unknown("deepspeed.optimizer.params", params, known, f"is no option of {kind}")
    check_not_negative("deepspeed.optimizer.params", params, NUMBERS)


def check_scheduler(deepspeed: Mapping) -> None:
    import torch
    from deepspeed.runtime import lr_schedules

    kind, params = kind_and_params(deepspeed, "scheduler")
    if not kind:
        return
    found = getattr(lr_schedules, kind, None) or getattr(torch.optim.lr_scheduler, kind, None)
    if not isinstance(found, type):
        own = lr_schedules.VALID_LR_SCHEDULES
        near = difflib.get_close_matches(kind, own, n=1)
        raise ValueError(
            f"deepspeed.scheduler.type is {kind!r}, but must be one of {', '.join(own)}, or a class of "
            "torch.optim.lr_scheduler" + (f"; did you mean {near[0]}?" if near else "")
        )
    refuse_unknown("deepspeed.scheduler.params", params, arguments(found), f"is no option of {kind}")


def paths(config: Mapping) -> Iterator[str]:
    """Every key of a nested configuration, with dots."""
    for key, value in config.items():
        yield str(key)
        if isinstance(value, Mapping):
            yield from (f"{key}.{path}" for path in paths(value))
