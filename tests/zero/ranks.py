"""One rank of tests/zero: trains every case named on the command line, stock and fused, and saves what came out.

    ranks.py OUT CASE...

OUT/CASE.pt holds {"stock": run, "fused": run}; a run is {"error"} or what `train` returns.
"""

from __future__ import annotations

import sys
import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import deepspeed
import jobs
import products
import torch
import torch.distributed as dist
from joining import joined
from transformers import LlamaForCausalLM


def json_of(case: products.Case, fused: bool) -> dict:
    zero = {"stage": case.stage, "stage3_param_persistence_threshold": 0}
    if case.special == "offload":
        zero["offload_optimizer"] = {"device": "cpu"}
    power = products.SCALE_POWER_OF_OVERFLOW if case.special == "overflow" else products.SCALE_POWER
    config = {
        "train_micro_batch_size_per_gpu": products.ROWS,
        "gradient_accumulation_steps": case.accumulation,
        "gradient_clipping": products.CLIP,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.dtype == "bf16"},
        # hysteresis 1: each overflow halves the scale
        "fp16": {"enabled": case.dtype == "fp16", "initial_scale_power": power, "hysteresis": 1},
    }
    if fused:
        # slabs of one row a rank: as many as can be
        mode = products.BY_COPY_ENGINES.get(case.mode, case.mode)
        head = {"mode": mode, "slab_mb": 0, "copy_engines": mode != case.mode}
        config["ds_fused"] = {"enabled": True, "fused_linear_cross_entropy": head}
    return config


def model_of(case: products.Case, config: dict) -> torch.nn.Module:
    weights = jobs.first_weights(case.tied)
    # no dtype: DeepSpeed takes it from the config, while on the CPU it reads any dtype given here as bf16
    scope = deepspeed.zero.Init(config_dict_or_path=config) if case.init else nullcontext()
    with scope:
        model = LlamaForCausalLM(jobs.config_of(case.tied))
    for name, weight in model.named_parameters():
        with (
            deepspeed.zero.GatheredParameters(weight, modifier_rank=0) if case.init else nullcontext(),
            torch.no_grad(),
        ):
            if weight.numel():
                weight.copy_(weights[name])
    return model


def whole(weight: torch.nn.Parameter, stage: int) -> torch.Tensor:
    """The fp32 weight that the optimizer holds."""
    full = deepspeed.utils.safe_get_full_fp32_param(weight) if stage else None
    return (weight.detach() if full is None else full).float().cpu().clone()


def states_of(weight: torch.nn.Parameter, case: products.Case) -> dict[str, torch.Tensor]:
    """What the optimizer keeps of a weight, where DeepSpeed can show it whole."""
    if not case.stage:
        return {}
    read = deepspeed.utils.safe_get_full_optimizer_state
    return {name: read(weight, name).float().cpu().clone() for name in products.STATES[case.optimizer]}


def replaced(engine: deepspeed.DeepSpeedEngine) -> dict[str, int]:
    """JSON key -> how many modules it replaced."""
    counts = Counter()
    for row in engine.ds_fused_report.replaced:
        counts[row.key] += row.count
    return dict(counts)


def head(engine: deepspeed.DeepSpeedEngine) -> str:
    """What the report says of the head."""
    (row,) = (row for row in engine.ds_fused_report.replaced if row.key == "fused_linear_cross_entropy")
    return row.replacement


def train(case: products.Case, fused: bool) -> dict:
    rank = dist.get_rank()
    config = json_of(case, fused)
    model = model_of(case, config)
    optimizer = jobs.optimizer_of(case.optimizer, model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses, norms, scales, skipped = [], [], [], []
    for number, step in enumerate(jobs.batches(case.accumulation)):
        mine = []
        for micro in step:
            ids, labels = (t.to(engine.device) for t in micro[rank])
            loss = engine(input_ids=ids, labels=labels).loss
            engine.backward(loss)
            mine.append(loss.detach().float())
            if engine.is_gradient_accumulation_boundary() and case.stage == 0 and case.dtype == "fp32":
                # this one engine keeps no norm, but its reduced gradients lie whole on every rank until the step
                square = sum(w.grad.double().pow(2).sum() for w in engine.module.parameters())
            engine.step()
        mine = torch.stack(mine)
        all_ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, mine)
        losses.append(torch.stack(all_ranks, dim=1).flatten().tolist())  # micro batch by micro batch, rank by rank
        if engine.skipped_steps > len(skipped):
            skipped.append(number)
        scales.append(float(getattr(engine.optimizer, "cur_scale", 1.0)))
        norm = engine.get_global_grad_norm()
        norms.append(float(square.sqrt() if norm is None else norm))
    run = {
        "losses": losses,
        "norms": norms,
        "scales": scales,
        "skipped": skipped,
        "weights": {name: whole(w, case.stage) for name, w in engine.module.named_parameters()},
        "states": {name: states_of(w, case) for name, w in engine.module.named_parameters()},
        "state": sorted(engine.module.state_dict()),
        "class": type(engine.module).__name__,
        "replaced": replaced(engine) if fused else {},
        "head": head(engine) if fused else "",
    }
    engine.destroy()
    return run


def attempt(case: products.Case, fused: bool) -> dict:
    # one broken case must not take the others' results with it
    try:
        return train(case, fused)
    except Exception:
        return {"error": traceback.format_exc()}


def main(out: Path, names: list[str]) -> None:
    by_name = {case.name: case for case in products.ALL}
    for name in names:
        runs = {"stock": attempt(by_name[name], fused=False), "fused": attempt(by_name[name], fused=True)}
        if dist.get_rank() == 0:
            torch.save(runs, out / f"{name}.pt")
            failed = ", ".join(run for run, result in runs.items() if "error" in result)
            print(name, f"failed: {failed}" if failed else "trained", flush=True)


if __name__ == "__main__":
    with joined():
        main(Path(sys.argv[1]), sys.argv[2:])
