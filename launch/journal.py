"""What train.py tells while it runs: rows in metrics.jsonl, lines in the terminal, the page."""

from __future__ import annotations

import argparse
import json
import os
import sys

import deepspeed
import report
import torch.distributed as dist
from tqdm.auto import tqdm


def say(text: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Journal:
    """metrics.jsonl, report.html, DeepSpeed's monitor and the terminal, on rank 0."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, args: argparse.Namespace):
        self.engine, self.path = engine, args.out / "metrics.jsonl"
        self.is_first = dist.get_rank() == 0
        here = engine.global_steps
        if self.is_first:
            # what lies behind the checkpoint that this run goes on from will be written again
            old = self.path.read_text().splitlines(keepends=True) if args.resume and self.path.exists() else []
            whole = [line for line in old if line.endswith("}\n")]
            self.path.write_text("".join(line for line in whole if json.loads(line)["step"] <= here))
            self.dashboard = report.Dashboard(args.out, engine)
        self.bar = tqdm(
            total=args.steps, initial=here, unit="step", disable=not (self.is_first and sys.stderr.isatty())
        )

    def row(self, **values: float | list[float]) -> None:
        if self.is_first:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": self.engine.global_steps, **values}) + "\n")
            self.dashboard.update()

    def close(self, state: str) -> None:
        self.bar.close()
        if self.is_first:
            report.write(self.path.parent, state)

    def step(self, loss: float, tokens_per_s: float, memory_gb: list[float]) -> None:
        engine = self.engine
        grad_norm = float(engine.get_global_grad_norm() or 0.0)
        lr = engine.get_lr()[0]
        most = max(memory_gb)
        self.row(
            loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=tokens_per_s, memory_gb=most,
            memory_gb_by_rank=[round(peak, 3) for peak in memory_gb],
        )  # fmt: skip
        self.bar.set_postfix(loss=f"{loss:.3f}", tokens_per_s=f"{tokens_per_s:.0f}", memory=f"{most:.2f}GB")
        say(
            f"step {engine.global_steps:>5}/{self.bar.total}  loss {loss:.4f}  grad norm {grad_norm:.3f}  "
            f"{tokens_per_s:.0f} tokens/s  {most:.2f} GB"
        )

    def held_out(self, loss: float) -> None:
        self.row(held_out_loss=loss)
        say(f"step {self.engine.global_steps:>5}/{self.bar.total}  held-out loss {loss:.4f}")
        if self.engine.monitor.enabled:
            self.engine.monitor.write_events([("Train/Samples/held_out_loss", loss, self.engine.global_samples)])
