"""transformers' auto classes, whose models come with fused kernels.

    model = ds_fused.AutoModelForCausalLM.from_pretrained(NAME, dtype="bfloat16", fused={"rope": False})

Everything else is as with the class of the same name in transformers. ``fused`` are arguments of ``ds_fused.apply``,
or False; ``ds_fused.restore(model)`` undoes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

from ds_fused.policies import apply

Fused = Mapping[str, Any] | bool


class _Fused:
    """Mix-in: what the auto class gives is fused."""

    @classmethod
    def from_pretrained(cls, *args: Any, fused: Fused = True, **named: Any) -> Any:
        _check(cls, fused)
        found = super().from_pretrained(*args, **named)
        # with output_loading_info, a model and what was loaded
        return (_apply(found[0], fused), *found[1:]) if isinstance(found, tuple) else _apply(found, fused)

    @classmethod
    def from_config(cls, *args: Any, fused: Fused = True, **named: Any) -> nn.Module:
        _check(cls, fused)
        return _apply(super().from_config(*args, **named), fused)


def _check(cls: type, fused: Fused) -> None:
    """Before a model is loaded, which may take long."""
    if not isinstance(fused, (bool, Mapping)):
        raise ValueError(
            f"{cls.__name__}: fused is {fused!r}; it can be True, False or an object of arguments of ds_fused.apply"
        )


def _apply(model: nn.Module, fused: Fused) -> nn.Module:
    if fused is not False:
        apply(model, **(fused if isinstance(fused, Mapping) else {}))
    return model


class AutoModelForCausalLM(_Fused, transformers.AutoModelForCausalLM):
    """Language models that go on with a text, fused."""


class AutoModelForSeq2SeqLM(_Fused, transformers.AutoModelForSeq2SeqLM):
    """Language models with an encoder and a decoder, fused."""


class AutoModelForImageTextToText(_Fused, transformers.AutoModelForImageTextToText):
    """Language models that are given pictures too, fused."""


class AutoModelForMaskedLM(_Fused, transformers.AutoModelForMaskedLM):
    """Language models that fill in what is masked, fused."""
