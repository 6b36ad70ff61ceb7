"""A residual connection and the norm behind it as one op, inside forwards that nobody rewrites.

    hidden_states, _ = self.self_attn(hidden_states, ...)
    hidden_states = residual + hidden_states
    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)

The layer's own code runs, but its ``self`` is a ``View``: what children return is a ``Branch``, which added to a tensor
is a ``Sum``. A norm of ours that is given a sum computes both by ``add_rms_norm``, and whatever else a sum is used for
computes it by itself. The norm is called with two tensors, as any module is, so its hooks run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ds_fused.modules.layers.attention import exchanged
from ds_fused.modules.layers.norm import takes_more
from ds_fused.modules.layers.postponed import Postponed, computed


class Branch(Postponed):
    """What a child made; scaled (Granite) or added to another branch (Falcon-H1), it still is one."""

    __slots__ = ("value",)

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def real(self) -> Tensor:
        return self.value

    def times(self, other: object) -> Branch:
        return Branch(self.value * computed(other))

    def plus(self, other: object) -> Branch | Sum | Tensor:
        if isinstance(other, Branch):
            return Branch(self.value + other.value)
        other = computed(other)
        if isinstance(other, Tensor) and other.shape == self.value.shape:
            return Sum(other, self.value)
        return self.value + other


class Sum(Postponed):
    """``residual + branch``."""

    __slots__ = ("summands", "total")

    def __init__(self, residual: Tensor, branch: Tensor) -> None:
        self.summands: tuple[Tensor, Tensor] | None = (branch, residual)  # not kept longer than the layer would
        self.total: Tensor | None = None

    def real(self) -> Tensor:
        if self.summands is not None:
            branch, residual = self.summands
            self.total, self.summands = residual + branch, None
        return self.total

    def plus(self, other: object) -> Sum | Tensor:
        return other.plus(self.real()) if isinstance(other, Branch) else self.real() + computed(other)

    def normalised(self, norm: nn.Module) -> Tensor:
        """By a norm that takes a residual."""
        y, self.total = norm(*self.summands)
        self.summands = None
        return y


class Child:
    """A child of the layer, called with tensors."""

    def __init__(self, module: nn.Module) -> None:
        self._ds_fused_module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ds_fused_module, name)

    def __call__(self, *args: Any, **named: Any) -> Any:
        module = self._ds_fused_module
        x = args[0] if len(args) == 1 and not named else None
        if isinstance(x, Sum) and x.summands is not None and takes_more(module):
            return x.normalised(module)
        made = module(*(computed(arg) for arg in args), **{name: computed(arg) for name, arg in named.items()})
        if isinstance(made, Tensor):
            return Branch(made)
        if type(made) is tuple and made and isinstance(made[0], Tensor):
            return Branch(made[0]), *made[1:]
        return made


class View:
    """A layer, as its own forward sees it."""

    def __init__(self, layer: nn.Module) -> None:
        self._ds_fused_layer = layer

    @property
    def forward(self) -> Callable:
        """The class has one, too: a checkpointed layer's asks for it (transformers 5.24), to know if it is the last."""
        return self._ds_fused_layer.forward

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._ds_fused_layer, name)
        return Child(value) if isinstance(value, nn.Module) else value


def _isinstance(value: object, classes: type | tuple[type, ...]) -> bool:
    """``isinstance`` of what a child or a postponed value stands for."""
    return isinstance(value._ds_fused_module if isinstance(value, Child) else computed(value), classes)


def names_in(forward: Callable) -> tuple[str, ...]:
    """What the code of a forward, under its decorators, calls things that are not its own."""
    return inspect.unwrap(forward).__code__.co_names


class Residual:
    """The original forward, in which a norm behind a residual connection is fused with it."""

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module]) -> dict[str, object]:
        stock = cls.forward
        if "isinstance" in names_in(stock):
            stock = exchanged(stock, {"isinstance": _isinstance})

        @functools.wraps(cls.forward)
        def forward(self: nn.Module, *args: Any, **named: Any) -> Any:
            return computed(stock(View(self), *args, **named))

        return {"forward": forward}
