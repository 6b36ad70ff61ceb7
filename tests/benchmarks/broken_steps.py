"""benchmarks/end_to_end.py with ways that fail; it takes the same arguments, and its ranks are this file.

full    has no memory left on the last rank alone, at two sequences, while the others are in a collective
long    has no memory left beyond 40 tokens
hung    says nothing any more on all ranks
odd     has a loss that is no number

Its shapes tiny-moe and tiny-gemma-256k are those without the beginning, but small.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

# benchmarks/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import end_to_end, step_job
from benchmarks.step_shapes import SHAPES
from benchmarks.step_ways import WAYS, Way


def before_forward(act: Callable[[torch.Size], None]) -> Callable[..., object]:
    """A check, which every way has, that lets `act` see the shape of the tokens."""
    return lambda model, type_: model.register_forward_pre_hook(
        lambda m, args, kwargs: act(kwargs["input_ids"].shape), with_kwargs=True
    )


def full(shape: torch.Size) -> None:
    if shape[0] == 2 and os.environ["RANK"] != "0":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def long(shape: torch.Size) -> None:
    if shape[1] > 40:
        raise RuntimeError("NCCL Error 1: Failed to CUDA calloc async 12 bytes")


def hung(shape: torch.Size) -> None:
    time.sleep(600)


def odd(model: torch.nn.Module, type_: str) -> None:
    model.model.norm.weight.ds_tensor.fill_(torch.nan)


WAYS.update({act.__name__: Way("broken", check=before_forward(act)) for act in (full, long, hung)})
WAYS["odd"] = Way("broken", check=odd)
SMALL = {
    key: getattr(SHAPES["tiny"], key) for key in ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocab")
}
SHAPES.update({f"tiny-{name}": replace(SHAPES[name], **SMALL, head_dim=16) for name in ("moe", "gemma-256k")})
end_to_end.JOB = Path(__file__)

if __name__ == "__main__":
    if "RANK" in os.environ:
        step_job.main(sys.argv[1])
    else:
        sys.exit(end_to_end.main())
