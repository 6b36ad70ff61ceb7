"""Code is equal while nobody has patched any of it, and only then."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ds_fused.modules.code import Code

HERE = sys.modules[__name__]
FACTOR = 2.0


def twice(x):  # noqa: ANN001, ANN201
    return FACTOR * x


def through(f: Callable) -> Callable:
    @functools.wraps(f)
    def wrapper(*args):  # noqa: ANN002, ANN202
        return f(*args)

    return wrapper


@functools.cache
def table(n: int) -> torch.Tensor:
    return torch.sin(torch.arange(n))


class Base(nn.Module):
    def inner(self, x):  # noqa: ANN001, ANN201
        return nn.functional.silu(x)

    @property
    def table(self) -> torch.Tensor:
        return table(3)


class Layer(Base):
    scale = 1.0

    @through
    def forward(self, x, power=3):  # noqa: ANN001, ANN201
        def last(y):  # noqa: ANN001, ANN202
            return twice(y) ** power

        return last(self.inner(x)).cos() * self.table * self.scale


class Other(Base):
    pass


def rewritten(f: Callable) -> Callable:
    return lambda *args, **named: f(*args, **named)


# what is patched -> where it is, and its name
PATCHES: dict[str, tuple[object, str]] = {
    "the forward": (Layer, "forward"),
    "a method of the base": (Base, "inner"),
    "a method that comes before the base's": (Layer, "inner"),
    "a property": (Base, "table"),
    "a number of the class": (Layer, "scale"),
    "a function in a function in a wrapper": (HERE, "twice"),
    "a number that it reads": (HERE, "FACTOR"),
    "PyTorch's, by a module of a module": (F, "silu"),
    "PyTorch's, behind a cache and a property": (torch, "sin"),
    "a tensor's": (torch.Tensor, "cos"),
    "how layers are called": (nn.Module, "__call__"),
}


@pytest.mark.parametrize("what", PATCHES)
def test_a_patch_is_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name = PATCHES[what]
    before, again = Code(Layer), Code(Layer)
    assert before == again and hash(before) == hash(again)
    found = getattr(home, name)
    monkeypatch.setattr(home, name, rewritten(found) if callable(found) else 5.0, raising=False)
    assert Code(Layer) != before
    monkeypatch.undo()
    assert Code(Layer) == before


def test_a_function_that_is_changed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Code(twice)
    monkeypatch.setattr(twice, "__code__", (lambda x: 3.0 * x).__code__)
    assert Code(twice) != before
    monkeypatch.undo()
    assert Code(twice) == before
    before = Code(Layer)
    monkeypatch.setattr(Layer.forward.__wrapped__, "__defaults__", (4,))
    assert Code(Layer) != before


def test_names() -> None:
    assert Code(Layer).names >= {"inner", "twice", "scale", "silu"} and "scale" not in Code(Base).names


@pytest.mark.parametrize("cls", [nn.LayerNorm, nn.SiLU])
def test_layers_of_pytorch(cls: type, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Code(cls)
    name = {nn.LayerNorm: "layer_norm", nn.SiLU: "silu"}[cls]
    monkeypatch.setattr(F, name, rewritten(getattr(F, name)))
    patched = Code(cls)
    assert patched != before
    monkeypatch.setattr(cls, "forward", rewritten(cls.forward))
    assert Code(cls) not in (before, patched)


def test_what_is_not_in_it_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Code(Layer)
    monkeypatch.setattr(Other, "inner", rewritten(Base.inner), raising=False)
    monkeypatch.setattr(HERE, "through", rewritten(through))
    monkeypatch.setattr(F, "gelu", rewritten(F.gelu))
    assert Code(Layer) == before != Code(Other)


def test_modules_that_name_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ModuleType("first"), ModuleType("second")
    first.second, second.first, second.twice = second, first, twice
    monkeypatch.setattr(HERE, "first", first, raising=False)

    def calls(x):  # noqa: ANN001, ANN202
        return first.second.first.second.twice(x)

    names = {"first": first, "__name__": __name__}
    rebound = type(calls)(compile("lambda x: first.second.first.second.twice(x)", "f", "eval").co_consts[0], names)
    before = Code(rebound)
    second.twice = rewritten(twice)
    assert Code(rebound) != before
