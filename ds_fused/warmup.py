"""Compiles the kernels that a model will train with, before it trains, into Triton's cache.

    python -m ds_fused.warmup MODEL --config ds.json
    python -m ds_fused.warmup runs/mine/run.yaml --target sm90

MODEL: a folder or hub name in HuggingFace's format, its config.json, or the run.yaml of ``python -m launch``, which
names model and config itself. The model is built without memory (on PyTorch's meta device), its layers are replaced as
``deepspeed.initialize`` would, and a step and an evaluation run through it in which nothing is computed and every
launch is noted. What was noted is compiled by several processes; what Triton's cache holds already is found there.

No GPU is needed where ``--target`` names one. Under ZeRO-3 the kernels of the head depend on ``--ranks``, as rows of it
do. Those of an autocast are not among them: they are compiled at their first launch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import hjson
import torch
import transformers
import triton
import yaml
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.errors import PTXASError

from ds_fused.engine.config import Config, parse_config
from ds_fused.engine.profiles import ESTIMATED, filled
from ds_fused.engine.zero3.stand_ins import ways_of
from ds_fused.modules.loss.head_weight import HeadWeight
from ds_fused.ops import lora_linear
from ds_fused.ops.common._warmup import META, Done, Launch, compile_noted, noted, target_here, target_of
from ds_fused.ops.vocab.slabs import WeightSlabs
from ds_fused.ops.vocab.vocab_shard import VocabShard
from ds_fused.policies import plan
from ds_fused.policies.kinds import adapters, experts

# tokens of a sequence where nothing says more: kernels ask of it only whether 16 divides it
LENGTH = 1024
# but experts take larger tiles where each has rows enough: as few tokens as that may be and as many as it takes (of 512
# experts, ten for each token)
LENGTHS_OF_EXPERTS = (LENGTH, 16384)
# more processes than this wait for each other's disk
MOST_PROCESSES = 16


class Job(NamedTuple):
    """What is to be warmed up for."""

    model: str  # a folder, a hub name or a config.json
    ds_config: Mapping[str, object]
    length: int


def main(argv: list[str] | None = None) -> None:
    args = options_of(argv)
    try:
        job = job_of(args.model, args.config)
        config = config_of(job.ds_config.get("ds_fused", {"enabled": True}))
        target = target_of(args.target)
        model = model_of(job.model, dtype_of(job.ds_config))
        is_sharded = block_of(job.ds_config, "zero_optimization").get("stage") == 3
    except ValueError as error:
        refuse(error)
    batch = job.ds_config.get("train_micro_batch_size_per_gpu", 1)
    shape = (batch if isinstance(batch, int) else 1, job.length)

    began = time.perf_counter()
    launches, problem = launches_of(model, config, shape, target, args.ranks if is_sharded else None, args.lora_rank)
    try:
        done = list(compile_noted(launches, target, args.processes))
    except PTXASError as error:
        if "'gpu-name'" not in str(error):
            raise
        refuse(f"target is {args.target!r}, which this Triton's ptxas doesn't know")
    print(f"ds_fused.warmup: {type(model).__name__} in {str(model.dtype).removeprefix('torch.')} on {args.target}")
    print(_table(done))
    fresh = sum(not one.was_there for one in done)
    print(
        f"  {fresh} kernels compiled, {len(done) - fresh} found in {triton.knobs.cache.dir}: "
        f"{time.perf_counter() - began:.1f} s, {args.processes} processes"
    )
    for line in dict.fromkeys(one.without for one in done if one.without):
        print(f"  their launchers are left to the first launch: {line}")
    if problem is not None:
        raise SystemExit(f"ds_fused.warmup: {type(model).__name__} {problem}")


def refuse(why: object) -> NoReturn:
    print(f"ds_fused.warmup: {why}", file=sys.stderr)
    raise SystemExit(2)


def config_of(block: object) -> Config:
    """The block with what its profile adds; "auto" is taken for "fast", since what fits depends on the job's GPUs."""
    profile = parse_config(block).profile
    return parse_config(filled(block, "fast" if profile in ESTIMATED else profile)[0])


def options_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m ds_fused.warmup", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, a config.json or a run.yaml")
    parser.add_argument("--config", help="the DeepSpeed JSON; without it bf16 and all ops")
    parser.add_argument("--target", help="sm90, gfx942, ...; without it the GPU of this machine")
    parser.add_argument("--ranks", type=int, default=1, help="of the job, over which ZeRO-3 shards the head")
    parser.add_argument(
        "--lora-rank",
        type=int,
        action="append",
        metavar="R",
        default=[],
        help="of adapters that it will get; may be repeated",
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=min(cores, MOST_PROCESSES), help="that compile side by side")
    args = parser.parse_args(argv)
    # asked only where nobody says it: the answer opens the GPU
    args.target = args.target or target_here()
    if args.target is None:
        parser.error("there is no GPU here: name one, such as --target sm90")
    numbers = [("--ranks", args.ranks), ("--processes", args.processes), *(("--lora-rank", r) for r in args.lora_rank)]
    for name, number in numbers:
        if number < 1:
            parser.error(f"{name} is {number}; it must be at least 1")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: nothing is compiled under it")
    return args


def job_of(model: str, config: str | None) -> Job:
    """What MODEL and --config say together."""
    length = LENGTH
    ds_config: Mapping[str, object] = {"bf16": {"enabled": True}}
    if Path(model).suffix in (".yaml", ".yml"):
        run, file = _mapping(model, yaml.safe_load), model
        try:
            model, length = run["model"]["path"], run["data"]["block"]
            ds_config = {**run["deepspeed"], "ds_fused": run["fused"]}
        except KeyError as error:
            raise ValueError(f"{file} is no run.yaml of python -m launch: it has no {error}") from error
        except TypeError as error:
            raise ValueError(f"{file} is no run.yaml of python -m launch: {error}") from error
    if config is not None:
        ds_config = _mapping(config, hjson.loads)
    return Job(model, ds_config, length)


def _mapping(file: str, read: Callable[[str], object]) -> Mapping:
    try:
        found = read(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} can't be read: {error.strerror}") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{file} holds {found!r}, but must hold keys with their values")
    return found


def block_of(ds_config: Mapping[str, object], key: str) -> Mapping[str, object]:
    block = ds_config.get(key) or {}
    if not isinstance(block, Mapping):
        raise ValueError(f"{key} is {block!r}, but must be a block")
    return block


def dtype_of(ds_config: Mapping[str, object]) -> torch.dtype:
    """What the parameters will be cast to."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if block_of(ds_config, key).get("enabled") is True:
            return dtype
    return torch.float32


def model_of(name: str, dtype: torch.dtype) -> nn.Module:
    """The causal language model of that config, without memory."""
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        with META:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        # each library below says in a way of its own that it has no such file, name or class
        raise ValueError(f"there is no causal language model {name}: {error}".partition("\n")[0]) from error
    model.config.use_cache = False
    return model


def launches_of(
    model: nn.Module,
    config: Config,
    shape: tuple[int, int],
    target: GPUTarget,
    ranks: int | None = None,
    lora_ranks: Iterable[int] = (),
) -> tuple[list[Launch], str | None]:
    """What the proof, steps and an evaluation of a model on meta launch; what stopped them, if anything did.

    ``ranks``: over which its parameters are sharded; None: they are whole. ``lora_ranks``: of adapters on its layers.
    """
    problem = None
    # the weight of the head: whole, then in each way in which it may come
    how, ways = config.head, []
    if ranks is not None:
        weight = model.get_output_embeddings().weight
        ways = ways_of(weight, ranks, how["mode"], how["slab_mb"] * 2**20, how["copy_engines"])
    way: WeightSlabs | VocabShard | None = None
    with noted(target) as launches:
        report = plan.apply(
            model,
            config.wanted,
            device=META,
            dtype=model.dtype,
            verify=config.verify,
            logits=config.logits,
            eval=config.eval,
            weight=HeadWeight(slabs=lambda head, n_tokens, inside: way),
            tiles=config.tiles,
        )
        batch, length = shape
        has_experts = any(row.key == experts.KEY for row in report.replaced)
        most = getattr(model.config, "max_position_embeddings", None) or max(LENGTHS_OF_EXPERTS)
        runs = [(each, length) for each in (None, *ways)]
        runs += [(None, min(each, most)) for each in LENGTHS_OF_EXPERTS if has_experts and each != length]
        try:
            for way, length in runs:  # noqa: B007 (read by HeadWeight)
                ids = torch.zeros((batch, length), dtype=torch.int64, device=META)
                # a mask ready made: to make one, models look into what they are given
                mask = torch.ones((batch, 1, length, length), dtype=torch.bool, device=META)
                given = {"input_ids": ids, "attention_mask": mask, "labels": ids}
                with torch.no_grad():
                    model.eval()(**given)
                model.train()(**given).loss.backward()
        except Exception as error:
            # a model whose forward looks at data; what was noted until then is compiled all the same
            said = f"{type(error).__name__}: {error}".partition("\n")[0]
            problem = f"did not run to the end without data: {said}"
        if not report.replaced and report.left:
            problem = f"keeps all of its layers: {report.left[0].reason}"
        if adapters.KEY in config.wanted:
            for rank in lora_ranks:
                _with_adapter(model.dtype, rank)
    return launches, problem


def _with_adapter(dtype: torch.dtype, rank: int) -> None:
    """A layer with an adapter in fp32, of which no config of a model tells; kernels ask of its sizes only whether 16
    divides them."""
    sizes = {"x": (16, 32), "weight": (64, 32), "a": (rank, 32), "b": (64, rank)}
    kinds = {"x": dtype, "weight": dtype, "a": torch.float32, "b": torch.float32}
    tensors = [torch.ones(size, dtype=kinds[name], device=META, requires_grad=True) for name, size in sizes.items()]
    for lora_x in (None, torch.ones(sizes["x"], device=META)):  # without a dropout, and with one
        lora_linear(*tensors, lora_x=lora_x).sum().backward()


def _table(done: list[Done]) -> str:
    """A line for each kernel: how many of it, and for how long a process worked at them."""
    by_name: dict[str, list[Done]] = defaultdict(list)
    for one in done:
        by_name[one.name].append(one)
    lines = [
        f"  {len(ones):3} x {name:<36} {sum(one.seconds for one in ones):6.2f} s"
        for name, ones in sorted(by_name.items())
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
