"""``"warmup": true``: before layers are replaced, one rank of each host has the model's kernels compiled.

``python -m ds_fused.warmup`` does it, in a process of its own. The other ranks of the host wait for the first one that
came, through the job's key-value store: no GPU waits. A warm-up that fails costs time later and nothing else, so it is
a line in the log.
"""

from __future__ import annotations

import itertools
import json
import logging
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import distributed as dist
from torch import nn

from ds_fused.engine.zero3.copy_engines import boot_id
from ds_fused.ops.common._warmup import target_here
from ds_fused.policies.kinds import ADAPTER

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

# the 30 kernels of an 8B Llama took half a minute on two busy cores
PATIENCE = timedelta(minutes=20)

log = logging.getLogger("ds_fused")

# engines are made in the same order on the ranks of a host
_made = itertools.count()


def warm_up(engine: DeepSpeedEngine, model: nn.Module, block: Mapping[str, object], dtype: torch.dtype) -> None:
    """Compiles what the model will launch, once per host; returns when that is done."""
    target = target_here() if engine.device.type == "cuda" else None
    config = _config_of(model)
    if target is None or config is None:
        if engine.global_rank == 0:
            what = "there is no GPU" if target is None else f"{type(model).__name__} has no config of HuggingFace's"
            log.warning("ds_fused: no kernels are warmed up: %s", what)
        return
    # containers of one host may have one cache or several; machines that were never given a name have the same one
    here = f"{socket.gethostname()}/{boot_id()}/{next(_made)}"
    try:
        store = dist.PrefixStore("ds_fused/warmup", dist.distributed_c10d._get_default_store())
        if store.add(f"{here}/ranks", 1) > 1:
            log.warning("ds_fused: rank %d waits for the warm-up of kernels on its host", engine.global_rank)
            store.wait([f"{here}/done"], PATIENCE)
            return
        try:
            said = _compile(config, _ds_config(engine, block, dtype), target, dist.get_world_size(), _lora_ranks(model))
            print(said, end="", flush=True)
        finally:
            store.set(f"{here}/done", "")
    except Exception as error:
        log.warning("ds_fused: kernels are compiled when they are needed, the warm-up failed: %s", error)


def _config_of(model: nn.Module) -> object | None:
    """Of the first module inside, the model itself first, that a causal language model can be built from."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_json_file") and hasattr(config, "model_type"):
            return config
    return None


def _lora_ranks(model: nn.Module) -> list[int]:
    """Of the adapters on its layers, each once."""
    layers = filter(ADAPTER.recognises, model.modules())
    children = [child for layer in layers for child in layer.lora_A.values()]
    return sorted({child.out_features for child in children if isinstance(child, nn.Linear)})


def _ds_config(engine: DeepSpeedEngine, block: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    precision = {torch.bfloat16: {"bf16": {"enabled": True}}, torch.float16: {"fp16": {"enabled": True}}}
    return {
        "ds_fused": block,
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "zero_optimization": {"stage": engine.zero_optimization_stage()},
        **precision.get(dtype, {}),
    }


def _compile(
    config: object, ds_config: Mapping[str, object], target: str, ranks: int, lora_ranks: Iterable[int] = ()
) -> str:
    """What `python -m ds_fused.warmup` has to say."""
    with tempfile.TemporaryDirectory(prefix="ds_fused_warmup") as folder:
        model_file, ds_file = Path(folder, "config.json"), Path(folder, "ds_config.json")
        config.to_json_file(model_file)
        ds_file.write_text(json.dumps(ds_config), encoding="utf-8")
        options = ["--config", str(ds_file), "--target", target, "--ranks", str(ranks)]
        options += [f"--lora-rank={rank}" for rank in lora_ranks]
        command = [sys.executable, "-m", "ds_fused.warmup", str(model_file), *options]
        # others wait no longer
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE.total_seconds())
    if done.returncode:
        raise RuntimeError(done.stderr.strip().rpartition("\n")[2] or f"it ended with {done.returncode}")
    return done.stdout
