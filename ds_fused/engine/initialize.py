"""Where DeepSpeed meets us: four methods of ``DeepSpeedEngine``, the base of every training engine, and a function.

``__init__``: take note of the ``ds_fused`` block before anything happens; report when all is done.
``_configure_distributed_model``: replace right before it. By then AutoTP and AutoEP have put their own layers in place
(earlier, they would replace ours by stock ones); the cast, ZeRO's hooks and the optimizer are still to come.
``destroy``: give the model back as it was, before all of stock's, and after it what copy engines hold. ``__del__``,
which calls it: ranks do so when they like, in the middle of whatever it may be, so nothing may wait for another one or
touch the model. A later engine over the same layers gives it back then: what they are bound to is the earlier one. It
does so too with a copy of an engine's model, whose layers were replaced for that engine's stage of ZeRO.
``init_autocast_params``, of a ``torch_autocast`` section: it marks the parameters that travel in lower precision, by
the class of their layer, for which it is shown the originals'.

Without a block, or with ``"enabled": false``, all else is the originals' and nothing of us is imported.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import json
import logging
import os
import sys
import weakref
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_fused.engine.agreement import Agreement
    from ds_fused.engine.config import Config
    from ds_fused.policies.report import Claim, Left, Report

BLOCK = "ds_fused"

log = logging.getLogger("ds_fused")
# of engines whose models are not given back, and of copies of these models
_reports: weakref.WeakSet[Report] = weakref.WeakSet()


def hook(engine_module: ModuleType) -> None:
    """``deepspeed.runtime.engine`` was imported: wrap the four methods and the function, once."""
    cls = engine_module.DeepSpeedEngine
    if hasattr(cls.__init__, "_ds_fused_hook"):
        return
    # all looked up before any is replaced: half a hook would be worse than none
    init, configure, destroy, collect = cls.__init__, cls._configure_distributed_model, cls.destroy, cls.__del__
    cls.__init__ = _wrapped_init(init)
    cls._configure_distributed_model = _wrapped_configure(configure)
    cls.destroy = _wrapped_destroy(destroy)
    cls.__del__ = _wrapped_del(collect)
    # not in every version
    if hasattr(engine_module, "init_autocast_params"):
        engine_module.init_autocast_params = _wrapped_autocast(engine_module.init_autocast_params)


def _wrapped_init(original):
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(self, *args, **kwargs):
        # some callers pass config_class by position
        config_class = signature.bind(self, *args, **kwargs).arguments.get("config_class")
        block = _block_of(getattr(config_class, "_param_dict", None) or {})
        if block is _ABSENT or (isinstance(block, dict) and block.get("enabled") is False):
            return original(self, *args, **kwargs)

        # past nn.Module.__setattr__: its own __init__ has not run yet
        self.__dict__["_ds_fused_block"] = block
        try:
            original(self, *args, **kwargs)
            _finish(self)
        except BaseException:
            # the model outlives the engine that was not to be; the error that matters is the one on its way
            report, slab_mode = (self.__dict__.get(name) for name in ("ds_fused_report", "_ds_fused_slab_mode"))
            with contextlib.suppress(Exception):
                if report is not None:
                    _undo(report)
            with contextlib.suppress(Exception):
                if slab_mode is not None:
                    slab_mode.close(together=False)
            raise
        return None

    __init__._ds_fused_hook = True
    return __init__


def _wrapped_configure(original):
    @functools.wraps(original)
    def _configure_distributed_model(self, model):
        if _reports:
            _give_back(model)
        if "_ds_fused_block" in self.__dict__:
            _replace(self, model, self.__dict__["_ds_fused_block"])
        return original(self, model)

    return _configure_distributed_model


def _wrapped_destroy(original):
    @functools.wraps(original)
    def destroy(self):
        is_garbage = self.__dict__.get("_ds_fused_is_garbage", False)
        report, slab_mode = (self.__dict__.get(name) for name in ("ds_fused_report", "_ds_fused_slab_mode"))
        try:
            if report is not None and not is_garbage:
                _undo(report)
        finally:
            try:
                original(self)
            finally:
                if slab_mode is not None:
                    slab_mode.close(together=not is_garbage)

    return destroy


def _wrapped_del(original):
    @functools.wraps(original)
    def __del__(self):
        self.__dict__["_ds_fused_is_garbage"] = True
        original(self)

    return __del__


def _wrapped_autocast(original):
    @functools.wraps(original)
    def init_autocast_params(engine, *args, **kwargs):
        swap = sys.modules.get("ds_fused.modules.swap")
        if swap is None:
            # nothing of us was imported, so nothing is swapped
            return original(engine, *args, **kwargs)
        with swap.as_originals(engine.module):
            return original(engine, *args, **kwargs)

    return init_autocast_params


_ABSENT = object()
# of names that are taken for a slip: ds_fusd, ds-fused
_ALIKE = 0.8


def _block_of(config: Mapping[str, object]) -> object:
    """What the JSON has under our name. DeepSpeed passes over what it doesn't know, so one that is misspelt is said."""
    if BLOCK in config:
        return config[BLOCK]
    # from the first rank
    for name in config if os.environ.get("RANK", "0") == "0" else ():
        if difflib.SequenceMatcher(None, str(name).lower(), BLOCK).ratio() >= _ALIKE:
            log.warning('ds_fused: the configuration has "%s" and no "%s": no layer is replaced', name, BLOCK)
    return _ABSENT


def _give_back(model: torch.nn.Module) -> None:
    """As they were: layers of this model that an earlier engine has, or had where they were copied."""
    modules = set(model.modules())
    for report in list(_reports):
        if not modules.isdisjoint(report.model.modules()):
            _undo(report)


def _undo(report: Report) -> None:
    report.restore()
    _reports.discard(report)


def _replace(engine: DeepSpeedEngine, model: torch.nn.Module, block: object) -> None:
    from ds_fused.engine.agreement import Agreement

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
    report.found_in = _reports
    _reports.add(report)


def _resolved(
    engine: DeepSpeedEngine, model: torch.nn.Module, block: object, agree: Agreement
) -> tuple[Config, list[str]]:
    """The block with what its profile adds, and a line about that; the profile is the same on every rank."""
    from ds_fused.engine import estimate, profiles
    from ds_fused.engine.choice import free_bytes
    from ds_fused.engine.config import parse_config
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
    from ds_fused.engine import leaf_modules, zero_sizes
    from ds_fused.policies.blocks import blocks

    most_whole = 0
    if config.leaf_modules:
        engine.__dict__["_ds_fused_leafs_are_set"] = reason = leaf_modules.are_set(engine, model)
        most_whole = 0 if reason else leaf_modules.MOST_BYTES // training_dtype(engine).itemsize
    if config.zero_sizes == "stock":
        return []
    return [zero_sizes.set_sizes(engine, config.zero_sizes, model, blocks(model).values(), most_whole)]


def _check_triton() -> None:
    from ds_fused.engine.builders import no_triton

    reason = no_triton()
    if reason is not None:
        raise RuntimeError(f"ds_fused is enabled in the DeepSpeed config, but has no kernels without Triton: {reason}")


def _replaced(engine: DeepSpeedEngine, model: torch.nn.Module, config: Config, agree: Agreement) -> Report:
    from ds_fused.engine import builders, zero3
    from ds_fused.engine.config import OP_OPTIONS
    from ds_fused.engine.slab_mode import SlabMode
    from ds_fused.modules.scope import HeadWeight
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
            zero3.whole_weight_of(engine), slab_mode.slabs, slab_mode.is_sharded, slab_mode.bias, slab_mode.shard
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

    from ds_fused.engine import collectives, leaf_modules, zero_linear
    from ds_fused.modules.lora import LoRALinear
    from ds_fused.modules.tiled_mlp import TiledMLP
    from ds_fused.policies.blocks import blocks
    from ds_fused.policies.report import Left

    offload = leaf_modules.offload_of(engine)
    if offload is not None:
        zero_linear.remember_signature()
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
    import torch

    if engine.fp16_enabled():
        return torch.float16
    if engine.bfloat16_enabled():
        return torch.bfloat16
    if engine.torch_autocast_enabled():
        return engine.torch_autocast_dtype()
    return torch.float32


def _finish(engine: DeepSpeedEngine) -> None:
    from ds_fused.engine import frequencies

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


def _say(engine: DeepSpeedEngine, line: str) -> None:
    if engine.global_rank == 0:
        log.warning("ds_fused: %s", line)
