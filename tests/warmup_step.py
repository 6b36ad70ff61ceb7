"""A training step of a tiny model as ``deepspeed.initialize`` prepares it, and an evaluation.

    python tests/warmup_step.py CONFIG.json TARGET [DS.json]

With DS.json it is an engine's step, of the rank that the environment names.
Prints as JSON the kernels that were compiled in it and those that Triton's cache had. Needs a process of its own,
without TRITON_INTERPRET. Without a GPU launches are compiled and not run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import triton
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime.jit import JITFunction

import ds_fused
from ds_fused.ops.common import _launch, _meet, _triton
from ds_fused.ops.common._warmup import Absent, target_of


def only_compile(target: str) -> None:
    stock_run = JITFunction.run

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        return stock_run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run
    triton.runtime.driver.set_active(Absent(target_of(target)))
    _triton.LANES = target_of(target).warp_size
    # CPU tensors are that GPU's
    _meet.DEVICES = ("cpu",) if target_of(target).backend == "cuda" else ()


def engine_of(config: object, ds_file: str, device: str) -> nn.Module:
    import deepspeed

    ds_config = json.loads(Path(ds_file).read_text())
    # forms were told apart by the test that compares them; here nothing is computed
    ds_config["ds_fused"]["verify"] = device == "cuda"
    deepspeed.init_distributed("nccl" if device == "cuda" else "gloo", verbose=False)
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return deepspeed.initialize(model=model, model_parameters=model.parameters(), config=ds_config)[0]


def main(config_file: str, target: str, ds_file: str | None = None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        only_compile(target)
    names: dict[bool, list[str]] = {True: [], False: []}
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: names[cache_hit].append(src.name)
    config = AutoConfig.from_pretrained(config_file)
    if ds_file is None:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)
        ds_fused.apply(model, verify=device == "cuda")
    else:
        model = engine_of(config, ds_file, device)
    if device == "cpu":
        # after the kernels were made, and after forms were told apart: only so that ops take CPU tensors to them
        os.environ["TRITON_INTERPRET"] = "1"
        # nor is a driver asked for, where PyTorch is built for one
        _launch._current_device = _launch._nowhere
    ids = torch.zeros((2, 64), dtype=torch.int64, device=device)
    model.eval()
    with torch.no_grad():
        model(input_ids=ids, labels=ids)
    model.train()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward() if ds_file is None else model.backward(loss)
    print(json.dumps({"found": names[True], "compiled": names[False]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
