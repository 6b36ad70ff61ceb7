"""A script as users write them: knows nothing of ds_fused, strict about its arguments; several engines in turn.

Prints one JSON line per way of giving (or not giving) deepspeed.initialize a config: what the engine got, or the error.
"""

import argparse
import json
import os
import sys

import deepspeed
import torch
from deepspeed import initialize

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=0)
parser.add_argument("--ways", default="none")
parser.add_argument("--own")
parser.add_argument("--text")
args = parser.parse_args()


def with_arguments():
    own = deepspeed.add_config_arguments(argparse.ArgumentParser()).parse_args([])
    return {"args": own, "deepspeed": own.deepspeed}


def filled():
    """What Accelerate and the Trainer make of a file."""
    with open(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"]) as f:
        config = json.load(f)
    del config["optimizer"]
    return config | {"gradient_accumulation_steps": 1, "steps_per_print": 10**9, "bf16": {"enabled": False}}


WAYS = {
    "none": dict,
    "config_none": lambda: {"args": None, "config": None},
    "arguments": with_arguments,
    "own": lambda: {"config": args.own},
    "own_params": lambda: {"config_params": args.own},
    "filled": lambda: {"config": filled()},
    "changed": lambda: {"config": filled() | {"train_micro_batch_size_per_gpu": 7}},
    "block_lost": lambda: {"config": {k: v for k, v in filled().items() if k != "ds_fused"}},
}

for way in args.ways.split(","):
    said = {"way": way, "argv": sys.argv, "path": sys.path[0], "file": __file__, "text": args.text}
    said |= {name: os.environ.get(name) for name in ("RANK", "ACCELERATE_USE_DEEPSPEED")}
    try:
        given = WAYS[way]()
        said["deepspeed"] = given.pop("deepspeed", None)
        engine, *_ = initialize(model=torch.nn.Linear(4, 4), **given)
    except ValueError as e:
        said["error"] = str(e)
    else:
        if engine.optimizer is not None:
            engine.backward(engine(torch.ones(1, 4)).sum())
            engine.step()
        said["config"] = engine._config._param_dict
    # in one write, or the lines of two ranks may mix
    sys.stdout.write("SAID " + json.dumps(said, default=str) + "\n")
    sys.stdout.flush()
