"""A training step under ZeRO-3 with random weights, stock and with the flag in each mode: time, peak memory, losses.

    python benchmarks/zero3_step.py --gpus 2 --out benchmarks/results/h200x2
    python benchmarks/zero3_step.py --gpus 2 --out benchmarks/results/h200x2 --heads tied --blocks stock,stream

Each is a launch of its own, ``deepspeed --config JSON benchmarks/zero3_step.py job``, and differs in the JSON's
``ds_fused`` block alone. The job below is a plain training loop that knows nothing of the flag. Times are medians over
the steps after the first three, on rank 0; peak memory is the allocator's, over the same steps.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

MICRO_BATCH, LENGTH, STEPS, WARM_UP = 2, 4096, 12, 3
# Llama-3.2-1B's widths with half its layers; the vocabulary is odd, so ranks split a row
SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128257,
}
CONFIG = {
    "train_micro_batch_size_per_gpu": MICRO_BATCH,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": True},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "torch_adam": True}},
    "zero_optimization": {"stage": 3},
    "steps_per_print": STEPS + 1,
}
# what stands in the JSON's ds_fused block
BLOCKS = {
    "stock": {"enabled": False},
    "fused": {"enabled": True},
    "gather": {"enabled": True, "fused_linear_cross_entropy": {"mode": "gather"}},
    "stream": {"enabled": True, "embedding": True, "fused_linear_cross_entropy": {"mode": "stream"}},
    "stationary": {"enabled": True, "embedding": True, "fused_linear_cross_entropy": {"mode": "stationary"}},
}
HEADS = ("untied", "tied")
RESULT = "RESULT "


def job(tied: bool) -> None:
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    deepspeed.init_distributed()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=tied, attn_implementation="sdpa"))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters())
    data = torch.Generator().manual_seed(1 + engine.global_rank)
    losses, norms, ms = [], [], []
    for step in range(STEPS):
        if step == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        ids = torch.randint(SHAPE["vocab_size"], (MICRO_BATCH, LENGTH), generator=data).cuda()
        torch.cuda.synchronize()
        began = time.perf_counter()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        torch.cuda.synchronize()
        ms.append(1e3 * (time.perf_counter() - began))
        losses.append(loss.item())
        norms.append(float(engine.get_global_grad_norm()))
    if engine.global_rank == 0:
        measured = {
            "step_ms": round(statistics.median(ms[WARM_UP:]), 1),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "losses": losses,
            "grad_norms": norms,
            "device": torch.cuda.get_device_name(),
        }
        print(RESULT + json.dumps(measured), flush=True)
    deepspeed.comm.destroy_process_group()


def launched(gpus: int, block: dict[str, object], tied: bool) -> dict[str, object]:
    config = {**CONFIG, "ds_fused": block}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds_config.json"
        path.write_text(json.dumps(config))
        command = ["deepspeed", "--num_gpus", str(gpus), "--config", str(path), __file__, "job"]
        done = subprocess.run([*command, *(["--tied"] if tied else [])], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
    if done.returncode or not lines:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return json.loads(lines[-1].removeprefix(RESULT))


def table(gpus: int, runs: dict[str, dict[str, object]]) -> str:
    packages = ("torch", "triton", "deepspeed", "transformers")
    device = next(iter(runs.values()))["device"]
    lines = [
        "# A training step under ZeRO-3",
        "",
        f"- device: {gpus} x {device}",
        f"- versions: {', '.join(f'{name} {importlib.metadata.version(name)}' for name in packages)}",
        f"- date: {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC",
        f"- command: python benchmarks/zero3_step.py --gpus {gpus}",
        f"- job: {json.dumps(SHAPE)}, {MICRO_BATCH} x {LENGTH} tokens a rank, bf16, gradient checkpointing, AdamW",
        "",
        "| run | step ms | peak GiB | largest loss difference | largest relative difference of the gradient norm |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, run in runs.items():
        stock = runs.get(f"stock, {name.rpartition(', ')[2]}")
        apart = "- | -"
        if stock is not None:
            loss = max(abs(a - b) for a, b in zip(run["losses"], stock["losses"], strict=True))
            norm = max(abs(a / b - 1) for a, b in zip(run["grad_norms"], stock["grad_norms"], strict=True))
            apart = f"{loss:.1e} | {norm:.1e}"
        lines.append(f"| {name} | {run['step_ms']} | {run['peak_gib']} | {apart} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("compare", "job"), default="compare")
    parser.add_argument("--tied", action="store_true")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--blocks", default=",".join(BLOCKS), help=f"some of {','.join(BLOCKS)}")
    parser.add_argument("--heads", default=",".join(HEADS), help=f"some of {','.join(HEADS)}")
    parser.add_argument("--local_rank", type=int, help="set by the launcher")
    options = parser.parse_args()
    if options.what == "job":
        job(options.tied)
        return
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    heads, blocks = chosen(parser, options.heads, HEADS), chosen(parser, options.blocks, BLOCKS)
    options.out.mkdir(parents=True, exist_ok=True)
    runs = {}
    for head in heads:
        for block in blocks:
            name = f"{block}, {head} head"
            runs[name] = launched(options.gpus, BLOCKS[block], head == "tied")
            print(name, {key: runs[name][key] for key in ("step_ms", "peak_gib")}, flush=True)
            # with each run anew: what is there survives whatever comes next
            (options.out / "zero3_step.md").write_text(table(options.gpus, runs))
            (options.out / "zero3_step.json").write_text(json.dumps(runs, indent=1) + "\n")
    print(table(options.gpus, runs))


def chosen(parser: argparse.ArgumentParser, text: str, known: Iterable[str]) -> list[str]:
    words = text.split(",")
    for word in words:
        if word not in known:
            parser.error(f"there is no {word!r}; there are {', '.join(known)}")
    return words


if __name__ == "__main__":
    sys.exit(main())
