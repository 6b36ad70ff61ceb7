"""A training step of a tiny model as ``deepspeed.initialize`` prepares it, and an evaluation.

    python tests/warm_step.py CONFIG.json TARGET

Prints as JSON the kernels that were compiled in it and those that Triton's cache had. Needs a process of its own,
without TRITON_INTERPRET. Without a GPU launches are compiled and not run.
"""

from __future__ import annotations

import json
import os
import sys

import torch
import triton
from transformers import AutoConfig, AutoModelForCausalLM
from triton.runtime.jit import JITFunction

import ds_fused
from ds_fused.ops import _triton
from ds_fused.ops._ahead import Absent, target_of


def only_compile(target: str) -> None:
    stock_run = JITFunction.run

    def run(self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object) -> object:
        return stock_run(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run
    triton.runtime.driver.set_active(Absent(target_of(target)))
    _triton.LANES = target_of(target).warp_size
    # after the kernels were made: only so that ops take CPU tensors to them
    os.environ["TRITON_INTERPRET"] = "1"


def main(config_file: str, target: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        only_compile(target)
    names: dict[bool, list[str]] = {True: [], False: []}
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: names[cache_hit].append(src.name)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config_file), dtype=torch.bfloat16).to(device)
    ds_fused.apply(model, verify=device == "cuda")
    ids = torch.zeros((2, 64), dtype=torch.int64, device=device)
    with torch.no_grad():
        model.eval()(input_ids=ids, labels=ids)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    print(json.dumps({"found": names[True], "compiled": names[False]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
