"""One short run that all ways of starting it can be compared by: the tiny model on two CPU ranks under ZeRO-3."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from launching import REPO

TRAIN = REPO / "launch" / "train.py"
STEPS = 40


def overrides(model: Path, text: Path, folder: Path) -> list[str]:
    """The run, as `python -m launch` is told it; what starts it, and where, is left open."""
    return [
        "model=hub", f"model.path={model}", "data=text", f"data.text=[{text}]", "data.block=32", "data.eval_blocks=4",
        f"train.steps={STEPS}", "train.log_every=1", "train.eval_every=0", "train.save_every=5",
        "deepspeed=zero3", "deepspeed.train_micro_batch_size_per_gpu=1", "deepspeed.bf16.enabled=false",
        "deepspeed.tensorboard.enabled=false", "deepspeed.optimizer.params.lr=0.01",
        # "auto" would measure anew in each run, and other modes round otherwise
        "+fused.fused_linear_cross_entropy.mode=stream",
        # no weight is so small that it stays whole
        "+deepspeed.zero_optimization.stage3_param_persistence_threshold=0",
        # the hosts share the cores of one machine
        "cluster.accelerator=cpu", "cluster.env={OMP_NUM_THREADS: '1'}", f"folder={folder}",
    ]  # fmt: skip


def options(model: Path, text: Path, folder: Path) -> list[str]:
    """The same run, as train.py is told it."""
    data = ["--text", str(text), "--block", "32", "--eval_blocks", "4"]
    return ["--model", str(model), *data, "--steps", str(STEPS), "--out", str(folder)]


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, of a run as far as it has come."""
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        return {}
    # the last line may be half written
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {row["step"]: row["loss"] for row in map(json.loads, lines) if "loss" in row}


def comes_to(step: int, folder: Path, has_ended: Callable[[], bool]) -> bool:
    """Wait until the run has done this step: False where it has ended before."""
    while step not in losses(folder):
        if has_ended():
            return False
        time.sleep(0.01)
    return True
