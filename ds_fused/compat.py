"""For those who come from Liger: its functions by their names and arguments, doing what ``ds_fused.apply`` does.

    ds_fused.compat.apply_liger_kernel_to_llama(rope=False, model=model)       # this model, as ds_fused.apply
    patch = ds_fused.compat.apply_liger_kernel_to_llama()                      # Llamas that are built from here on

Without a model, classes are not exchanged in transformers' modules, which would change every model of the process: the
family's ``from_pretrained``, ``from_config`` and constructors apply ds_fused to what they have built. Both ways return
what can be undone by ``restore()``; Liger returns None. ``cross_entropy`` and ``fused_linear_cross_entropy`` may both
be on. A switch is for the whole model: where a text model within has ``rms_norm`` on, so has the tower beside it.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ds_fused.modules import NEEDS, OPS
from ds_fused.policies import apply
from ds_fused.policies.report import Report

log = logging.getLogger("ds_fused")

_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": True}
_NORMS = {"rms_norm": True, "layer_norm": True}
_BOTH_NORMS = {"rope": True, **_LOSS, "layer_norm": True, "rms_norm": True}
_TEXT = {"rope": True, **_LOSS, "rms_norm": True, "swiglu": True}
_GEMMA = {"rope": True, **_LOSS, "rms_norm": True, "geglu": True}
_NO_ROPE = {**_TEXT, "rope": False}

# family -> Liger's switches in Liger's order, with its defaults; the model comes last but where it is named
FAMILIES: Mapping[str, Mapping[str, bool | None]] = {
    "deepseek_v2": _NO_ROPE,
    "deepseek_v3": _NO_ROPE,
    "deepseek_v4": {**_NO_ROPE, "swiglu": False},
    "exaone4": _TEXT,
    "falcon_h1": _TEXT,
    "gemma": _GEMMA,
    "gemma2": _GEMMA,
    "gemma3": {**_BOTH_NORMS, "geglu": True},
    "gemma3_text": _GEMMA,
    "gemma4": {"rope": False, **_LOSS, "layer_norm": False, "rms_norm": True, "geglu": True},
    "gemma4_text": {**_GEMMA, "rope": False},
    "glm4": _NO_ROPE,
    "glm4v": _NO_ROPE,
    "glm4v_moe": _NO_ROPE,
    "gpt_oss": {**_TEXT, "swiglu": False},
    "granite": {**_TEXT, "cross_entropy": True, "fused_linear_cross_entropy": False},
    "hunyuan_v1_dense": _TEXT,
    "hunyuan_v1_moe": _TEXT,
    "internvl": {**_LOSS, **_NORMS},
    "llama": _TEXT,
    "llama4": {**_TEXT, "model": None, "layer_norm": True},
    "llava": _LOSS,
    "ministral": _TEXT,
    "mistral": _TEXT,
    "mixtral": _TEXT,
    "mllama": {**_BOTH_NORMS, "swiglu": True},
    "muse_glimmer": {**_BOTH_NORMS, "swiglu": True},
    "nemotron": {"relu_squared": True, **_LOSS},
    "olmo2": _TEXT,
    "olmo3": _TEXT,
    "paligemma": {**_BOTH_NORMS, "geglu": True},
    "phi3": _TEXT,
    "pixtral": {"rope": True, "rms_norm": True, "swiglu": True},
    "qwen2": _TEXT,
    "qwen2_5_vl": _TEXT,
    "qwen2_vl": {"rope": True, **_LOSS, "rms_norm": True, "layer_norm": True, "swiglu": True},
    "qwen3": _TEXT,
    "qwen3_5": _NO_ROPE,
    "qwen3_5_moe": _NO_ROPE,
    "qwen3_moe": _TEXT,
    "qwen3_next": _NO_ROPE,
    "qwen3_vl": {**_TEXT, "swiglu": False},
    "qwen3_vl_moe": _TEXT,
    "smollm3": _TEXT,
    "smolvlm": {**_LOSS, **_NORMS},
}
# where Liger's function takes more than it names
_TAKES_MORE = ("llava", "nemotron", "internvl", "smolvlm")
# and whose parts, by the names of their configurations, it hands to the functions of their own families, with the rest
_PARTS = {"llava": ("text_config", "vision_config"), "internvl": ("text_config",), "smolvlm": ("text_config",)}
# Liger's words for what has another here
_RENAMED = {"relu_squared": "relu2"}


class Patch:
    """A family whose models are fused as they are built, until ``restore()``."""

    def __init__(self, family: str, switches: Mapping[str, bool]) -> None:
        self.family, self.switches = family, dict(switches)
        self._building = 0
        self._before: list[tuple[type, str, object]] = []
        for cls in _classes(family):
            for name in ("from_pretrained", "_from_config"):
                self._exchange(cls, name, classmethod(self._around(getattr(cls, name).__func__)))
            self._exchange(cls, "__init__", self._around_init(cls.__init__))

    def restore(self) -> None:
        """Models that are built from here on are stock; those that were built stay fused (``ds_fused.restore``)."""
        for cls, name, own in reversed(self._before):
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)
        self._before = []

    def _exchange(self, cls: type, name: str, new: object) -> None:
        self._before.append((cls, name, vars(cls).get(name)))
        setattr(cls, name, new)

    def _around(self, build: Callable) -> Callable:
        @functools.wraps(build)
        def built(cls: type, *args: Any, **named: Any) -> Any:
            with self._outermost() as outermost:
                found = build(cls, *args, **named)
            if outermost:
                self._apply(found[0] if isinstance(found, tuple) else found)
            return found

        return built

    def _around_init(self, build: Callable) -> Callable:
        @functools.wraps(build)
        def built(model: nn.Module, *args: Any, **named: Any) -> None:
            with self._outermost() as outermost:
                build(model, *args, **named)
            if outermost:
                self._apply(model)

        return built

    @contextlib.contextmanager
    def _outermost(self) -> Iterator[bool]:
        """Whether nothing of the family is being built around this; its parts are fused with it."""
        self._building += 1
        try:
            yield self._building == 1
        finally:
            self._building -= 1

    def _apply(self, model: nn.Module) -> None:
        if any(parameter.is_meta for parameter in model.parameters()) or torch.get_default_device().type == "meta":
            log.warning(
                "ds_fused: %s has no weights yet and stays stock: ds_fused.apply it later", type(model).__name__
            )
            return
        apply(model, _wanted(self.family, self.switches, model))


def _classes(family: str) -> list[type[PreTrainedModel]]:
    """The family's models; of a text family that lives in another's module, its own."""
    home = family.removesuffix("_text")
    module = import_module(f"transformers.models.{home}.modeling_{home}")
    found = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    found = [c for c in found if c.__module__ == module.__name__]
    return [c for c in found if home == family or getattr(c.config_class, "model_type", None) == family]


def _function(family: str) -> Callable[..., Report | Patch]:
    switches = {**FAMILIES[family]}
    switches.setdefault("model", None)
    kind = inspect.Parameter
    parameters = [kind(name, kind.POSITIONAL_OR_KEYWORD, default=value) for name, value in switches.items()]
    if family in _TAKES_MORE:
        parameters.append(kind("kwargs", kind.VAR_KEYWORD))
    signature = inspect.Signature(parameters)

    def function(*args: Any, **named: Any) -> Report | Patch:
        try:
            bound = signature.bind(*args, **named)
        except TypeError as error:
            raise TypeError(f"{function.__name__}: {error}; it takes {', '.join(switches)}") from None
        bound.apply_defaults()
        given = {**bound.arguments}
        model, more = given.pop("model"), given.pop("kwargs", {})
        unknown = sorted(more.keys() - _known())
        if unknown:
            raise TypeError(f"{function.__name__}: there is no {unknown[0]!r}; there are {', '.join(sorted(_known()))}")
        given |= more
        return Patch(family, given) if model is None else apply(model, _wanted(family, given, model))

    function.__name__ = function.__qualname__ = f"apply_liger_kernel_to_{family}"
    function.__doc__ = f"Fuse ``model``, or every {family} that is built from here on. Undone by what is returned."
    function.__signature__ = signature
    return function


def _wanted(family: str, switches: Mapping[str, bool], model: nn.Module) -> dict[str, bool]:
    """The JSON keys: as the switches say, and where they don't, as the families of the model's parts have them.

    Experts in one op and norms with the rotation behind them are on where Liger's switches of what is in them are.
    """
    wanted: dict[str, bool] = {}
    for part in _PARTS.get(family, ()):
        config = getattr(getattr(model, "config", None), part, None)
        own = FAMILIES.get(getattr(config, "model_type", None), {})
        for name in own.keys() - _LOSS.keys() - {"model"}:
            wanted[name] = wanted.get(name, False) or own[name]
    wanted |= switches
    wanted = {_RENAMED.get(name, name): value for name, value in wanted.items()}
    wanted.setdefault("experts", any(wanted.get(key) for key in ("swiglu", "geglu")))
    wanted.setdefault("qk_norm_rope", all(wanted.get(key) for key in NEEDS["qk_norm_rope"]))
    return wanted


@functools.cache
def _known() -> frozenset[str]:
    """The JSON keys, and Liger's words for some."""
    return frozenset(key for op in OPS for key in op.keys) | _RENAMED.keys()


_FUNCTIONS = {f"apply_liger_kernel_to_{family}": _function(family) for family in FAMILIES}
globals().update(_FUNCTIONS)
__all__ = ["FAMILIES", "Patch", *_FUNCTIONS]


def __getattr__(name: str) -> object:
    raise AttributeError(f"module 'ds_fused.compat' has no attribute {name!r}; its families are {', '.join(FAMILIES)}")
