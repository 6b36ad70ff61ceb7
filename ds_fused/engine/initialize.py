"""What becomes of a ``ds_fused`` block: an engine's layers are replaced, its gathers arranged, and a report says so.

Called by ``hooks.py``, where there is a block. What may need Triton is imported once that was found to be there.
"""

from __future__ import annotations

import json
import logging
import os
from typing import TYPE_CHECKING

import torch

from ds_fused.engine.agreement import Agreement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_fused.engine.config import Config
    from ds_fused.policies.report import Claim, Left, Report

log = logging.getLogger("ds_fused")


def replace(engine: DeepSpeedEngine, model: torch.nn.Module, block: object) -> Report:
    """Right before DeepSpeed casts and shards the model."""
    # Pipeline stages hold different layers; the ranks of one stage have to decide alike.
    agree = Agreement(part=getattr(model, "stage_id", 0) if engine.pipeline_parallelism else 0)
    try:
        _check_triton()
        config, settings = _resolved(engine, model, block, agree)
        report = _replaced(engine, model, config, agree)
        report.settings = (*settings, *_set_up(engine, model, config))
    except Exception as e:
        agree.failed(e)
        raise
    engine.__dict__.update(_ds_fused_config=config, ds_fused_report=report)
    return report


def finish(engine: DeepSpeedEngine) -> None:
    """When all of DeepSpeed's engine is there."""
    from ds_fused.engine.zero3 import frequencies

    config, report = (engine.__dict__.get(name) for name in ("_ds_fused_config", "ds_fused_report"))
    if report is None:
        raise RuntimeError(
            f"ds_fused is enabled, but {type(engine).__name__} builds its model without "
            "DeepSpeedEngine._configure_distributed_model, where the layers are replaced"
        )
    engine.__dict__["_ds_fused_slab_mode"].decide(engine, report)
    _claim(report, *frequencies.claims_of(engine.module, config.rotary_frequencies == "fp32"))
    _arrange_gathers(engine, config, report)
    undone = [f"{len(claim.paths)} x {claim.original}" for claim in report.recheck()]
    if undone:
        line = f"replaced, but undone by something else before deepspeed.initialize ended: {', '.join(undone)}"
        if config.strict:
            raise RuntimeError(f"ds_fused: {line}")
        _say(engine, line)
    if config.report and engine.global_rank == 0:
        print(report, flush=True)


def _resolved(
    engine: DeepSpeedEngine, model: torch.nn.Module, block: object, agree: Agreement
) -> tuple[Config, list[str]]:
    """The block with what its profile adds, and a line about that; the profile is the same on every rank."""
    from ds_fused.engine import profiles
    from ds_fused.engine.config import parse_config
    from ds_fused.engine.zero3 import estimate
    from ds_fused.engine.zero3.choice import free_bytes
    from ds_fused.policies.blocks import blocks

    profile = parse_config(block).profile
    # whatever the profile: ranks that were given different ones must meet here as well
    free = agree.least(free_bytes())
    line = f'profile "{profile}"'
    if profile in profiles.ESTIMATED:
        job = estimate.job_of(engine, model, list(blocks(model).values()), training_dtype(engine))
        profile, why = ("stock", job) if isinstance(job, str) else estimate.fitting(job, free)
        line = f'{line}: "{profile}", {why}'
    block, added = profiles.filled(block, profile)
    engine.__dict__["_ds_fused_block"] = block
    if profile == "stock":
        return parse_config(block), [line] if "profile" in block else []
    values = ", ".join(f"{name} = {json.dumps(value)}" for name, value in added.items()) or "nothing that is not given"
    return parse_config(block), [f"{line}; it sets {values}"]


def _set_up(engine: DeepSpeedEngine, model: torch.nn.Module, config: Config) -> list[str]:
    """What DeepSpeed will read when it builds its optimizer; a line about each."""
    from ds_fused.engine.zero3 import leaf_modules, sizes
    from ds_fused.policies.blocks import blocks

    most_whole = 0
    if config.leaf_modules:
        engine.__dict__["_ds_fused_leafs_are_set"] = reason = leaf_modules.are_set(engine, model)
        most_whole = 0 if reason else leaf_modules.MOST_BYTES // training_dtype(engine).itemsize
    if config.zero_sizes == "stock":
        return []
    return [sizes.set_sizes(engine, config.zero_sizes, model, blocks(model).values(), most_whole)]


def _check_triton() -> None:
    from ds_fused.engine.builders import no_triton

    reason = no_triton()
    if reason is not None:
        raise RuntimeError(f"ds_fused is enabled in the DeepSpeed config, but has no kernels without Triton: {reason}")


def _replaced(engine: DeepSpeedEngine, model: torch.nn.Module, config: Config, agree: Agreement) -> Report:
    from ds_fused.engine import builders
    from ds_fused.engine.config import OP_OPTIONS
    from ds_fused.engine.zero3 import whole_weight
    from ds_fused.engine.zero3.slab_mode import SlabMode
    from ds_fused.modules.loss.head_weight import HeadWeight
    from ds_fused.policies import plan
    from ds_fused.policies.report import Left

    builders.enlist()
    wanted, left = _loadable(config)
    if engine.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        _say(engine, "no GPU: on CPU tensors every op runs its PyTorch reference")
    dtype, block = training_dtype(engine), engine.__dict__["_ds_fused_block"]
    if config.warmup:
        from ds_fused.engine.warmup import warm_up

        warm_up(engine, model, block, dtype)
    slab_mode = engine.__dict__["_ds_fused_slab_mode"] = SlabMode(config)
    asked = {**vars(config), "head": dict(config.head), "wanted": {key: dict(o) for key, o in wanted.items()}}
    asked |= {"recompute": vars(config.recompute), "device": engine.device.type, "dtype": str(dtype)}
    # what the block names stays told from what is on without it: `strict` wants each of the former
    named = {key: wanted.get(key, False) for key in OP_OPTIONS if key in block or key in left}
    report = plan.apply(
        model,
        device=engine.device,
        dtype=dtype,
        verify=config.verify,
        strict=config.strict,
        logits=config.logits,
        eval=config.eval,
        weight=HeadWeight(
            whole_weight.whole_weight_of(engine), slab_mode.slabs, slab_mode.is_sharded, slab_mode.bias, slab_mode.shard
        ),
        tiles=config.tiles,
        recompute=config.recompute,
        agree=lambda decisions: agree({"config": asked, **decisions}),
        **named,
    )
    report.left = (*report.left, *(Left(key, 1, reason) for key, reason in left.items()))
    return report


def _arrange_gathers(engine: DeepSpeedEngine, config: Config, report: Report) -> None:
    """Under ZeRO-3: how weights come, and which together: a tiled MLP's, once for all tiles; an adapter's with those of
    its layer, which opens them; with ``leaf_modules`` those of a repeated layer."""
    from deepspeed.utils import z3_leaf_module

    from ds_fused.engine.zero3 import collectives, leaf_modules, linear
    from ds_fused.modules.layers.lora import LoRALinear
    from ds_fused.modules.layers.tiled_mlp import TiledMLP
    from ds_fused.policies.blocks import blocks
    from ds_fused.policies.report import Left

    offload = leaf_modules.offload_of(engine)
    if offload is not None:
        linear.remember_signature()
        if config.collectives == "in_place":
            _claim(report, *collectives.claims_of(engine, offload))
    slabs = engine.__dict__["_ds_fused_slab_mode"].parameters
    wholes = [
        module
        for module in engine.module.modules()
        if isinstance(module, (TiledMLP, LoRALinear))
        and not z3_leaf_module(module)
        and not any(p in slabs for p in module.parameters())
    ]
    if wholes and offload is not None:
        leaf_modules.gather_as_one(offload, wholes)
        report.undoing = (*report.undoing, leaf_modules.LeafClaim((), wholes, offload).restore)
    if not config.leaf_modules:
        return
    reason = engine.__dict__["_ds_fused_leafs_are_set"]
    if reason is not None:
        report.left = (*report.left, Left(leaf_modules.KEY, 1, reason))
        return
    _claim(report, *leaf_modules.claims_of(engine, blocks(engine.module), slabs))


def _claim(report: Report, claims: Sequence[Claim], left: Sequence[Left]) -> None:
    """Commit what asks for no proof any more."""
    for claim in claims:
        claim.commit()
    report.claims, report.left = (*report.claims, *claims), (*report.left, *left)


def _loadable(config: Config) -> tuple[dict[str, object], dict[str, str]]:
    """The wanted keys whose op loads through its builder, and key -> reason for the others."""
    from ds_fused.engine.builders import builders
    from ds_fused.ops.registry import OPS

    wanted, left = dict(config.wanted), {}
    table = builders()
    for op in OPS:
        builder = table[op.name]()
        keys = [key for key in op.keys if key in wanted]
        if keys and builder.is_compatible():
            builder.load()
            continue
        for key in keys:
            del wanted[key]
            left[key] = f"its op builder is not compatible: {builder.error_log}"
    return wanted, left


def training_dtype(engine: DeepSpeedEngine) -> torch.dtype:
    """What layers will compute in once DeepSpeed has cast the parameters, which is after the replacement."""
    if engine.fp16_enabled():
        return torch.float16
    if engine.bfloat16_enabled():
        return torch.bfloat16
    if engine.torch_autocast_enabled():
        return engine.torch_autocast_dtype()
    return torch.float32


def _say(engine: DeepSpeedEngine, line: str) -> None:
    if engine.global_rank == 0:
        log.warning("ds_fused: %s", line)
