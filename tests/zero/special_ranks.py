"""One rank of test_special.py: models and uses that are not the plain case, stock and fused, one after another.

    special_ranks.py OUT CASE...

OUT/CASE.RANK.json holds what the case's function returned on that rank, or {"error"}.
"""

from __future__ import annotations

import json
import sys
import traceback
from datetime import timedelta
from importlib import import_module
from pathlib import Path

import deepspeed
import special_stationary
import torch
import torch.distributed as dist
from special import CASES

import ds_fused

# each of them adds its cases
for module in ("special_models", "special_slabs", "special_steps", "special_gathered"):
    import_module(module)
special_stationary.add_twins()


def main(out: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=60))
    ds_fused.install()
    for name in names:
        try:
            result = CASES[name]()
        except Exception:
            result = {"error": traceback.format_exc()}
        (out / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
