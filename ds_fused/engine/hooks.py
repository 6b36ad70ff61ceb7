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

Without a block, or with ``"enabled": false``, all else is the originals' and nothing of us is imported. What is done
with one is in ``initialize.py``.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import logging
import os
import sys
import weakref
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from deepspeed.runtime.engine import DeepSpeedEngine

    from ds_fused.policies.report import Report

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
            from ds_fused.engine.initialize import finish

            original(self, *args, **kwargs)
            finish(self)
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
            _give_back(self, model)
        if "_ds_fused_block" in self.__dict__:
            from ds_fused.engine.initialize import replace

            report = replace(self, model, self.__dict__["_ds_fused_block"])
            report.found_in = _reports
            _reports.add(report)
        return original(self, model)

    return _configure_distributed_model


def _wrapped_destroy(original):
    @functools.wraps(original)
    def destroy(self):
        is_garbage = self.__dict__.get("_ds_fused_is_garbage", False)
        report, slab_mode = (self.__dict__.get(name) for name in ("ds_fused_report", "_ds_fused_slab_mode"))
        try:
            if report is not None and not is_garbage:
                _let_go(report)
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


def _give_back(engine: DeepSpeedEngine, model: torch.nn.Module) -> None:
    """As they were: layers of this model that an earlier engine has, or had where they were copied."""
    from ds_fused.modules.swap import is_fused

    modules = set(model.modules())
    for report in list(_reports):
        theirs = set(report.model.modules())
        if modules.isdisjoint(theirs):
            continue
        # that engine may well go on training
        if engine.global_rank == 0 and any(map(is_fused, theirs - modules)):
            log.warning(
                "ds_fused: layers of this %s are also those of a %s, another engine's model, which is given back as it "
                "was: only what both have is replaced again. Where both train, make that engine last",
                *(type(each).__name__ for each in (model, report.model)),
            )
        _undo(report)


def _let_go(report: Report) -> None:
    """All that can be undone. What can't is no matter of a job that ends, and a later engine says it once more."""
    try:
        _undo(report)
    except ValueError as error:
        log.warning("ds_fused: not all layers could be given back: %s", error)


def _undo(report: Report) -> None:
    report.restore()
    _reports.discard(report)
