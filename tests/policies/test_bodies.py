"""Every norm, rotary function, gated MLP and mixture in transformers' modelling files, whatever model it belongs to.

The sweep (tests/sweep.py) trains what is a language model. Here nothing is trained: each body is proven as a plan does.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import transformers
from torch import nn

from ds_fused.modules.layers.attention import WORD
from ds_fused.modules.layers.rotary import TURNS, roles_of
from ds_fused.policies.kinds import Way, choose, find, ropes

# it imports 500 files
pytestmark = pytest.mark.all
CPU = torch.device("cpu")
DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def files() -> list[ModuleType]:
    """The modelling files that can be imported with what is installed."""
    found = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        try:
            found.append(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"))
        except ImportError:
            continue
    assert len(found) > 400
    return found


class Config:
    """A configuration of whatever class: sizes and switches by what their names say."""

    num_experts_per_tok = 2

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        if "act" in name and "factor" not in name:
            return "silu"
        if "bias" in name or name.startswith(("use_", "is_")):
            return False
        if "drop" in name or "sparsity" in name:
            return 0.0
        if "eps" in name:
            return 1e-6
        if "limit" in name:
            return 7.0
        if "expert" in name and "size" not in name:
            return 4
        if "intermediate" in name or "inner" in name:
            return 48
        return 32 if "layer" not in name else 0


def layers(
    files: list[ModuleType], wanted: Callable[[type], bool], *ways: Callable[[type], nn.Module]
) -> Iterator[nn.Module]:
    """An object of each layer class that is wanted, in the first way that it can be made."""
    for file in files:
        for cls in vars(file).values():
            is_layer = isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == file.__name__
            if is_layer and wanted(cls):
                for make in ways:
                    try:
                        layer = make(cls)
                    except Exception:
                        continue
                    yield layer
                    break


def outcomes(layers: Iterator[nn.Module]) -> tuple[list[str], dict[str, str]]:
    """Classes that are replaced, and those that are left with the reason."""
    replaced, left = [], {}
    for layer in layers:
        kind, name = find(layer), type(layer).__name__
        ways = "it is of no kind" if kind is None else kind.ways(layer)
        chosen = ways if isinstance(ways, str) else choose(kind, layer, ways, CPU, DTYPE)
        if isinstance(chosen, Way):
            replaced.append(name)
        else:
            left[name] = chosen
    return replaced, left


def test_rms_norms(files: list[ModuleType]) -> None:
    # some have no weight
    ways = (lambda cls: cls(eps=1e-6), lambda cls: cls(32))
    replaced, left = outcomes(layers(files, lambda cls: cls.__name__.endswith("RMSNorm"), *ways))
    assert len(replaced) >= 160 and len(left) <= 3, left


def test_rotary_functions(files: list[ModuleType]) -> None:
    replaced, left = [], {}
    for file in files:
        for name, function in vars(file).items():
            if WORD not in name or not inspect.isfunction(function) or function.__module__ != file.__name__:
                continue
            turns = [] if roles_of(function) is None else [turn for turn in TURNS if ropes._fits(function, turn)]
            proven = any(ropes.differs(function, turn, CPU, DTYPE) is None for turn in turns)
            (replaced.append if proven else left.setdefault)(f"{file.__name__}.{name}")
    assert len(replaced) >= 200 and len(left) <= 10, left


def made_of(*children: str) -> Callable[[type], bool]:
    return lambda cls: "__init__" in vars(cls) and {*children} <= {*inspect.unwrap(cls.__init__).__code__.co_names}


@pytest.mark.parametrize(
    ("wanted", "n_replaced", "n_left"),
    [
        (made_of("gate_proj", "up_proj", "down_proj"), 130, 5),
        (made_of("gate_up_proj", "down_proj", "Parameter"), 50, 2),
    ],
    ids=["gated", "stacked"],
)
def test_mlps_and_experts(
    files: list[ModuleType], wanted: Callable[[type], bool], n_replaced: int, n_left: int
) -> None:
    given = ((Config(),), (Config(), 48), (32, 48, "silu"), (32, 48))
    ways = [lambda cls, arguments=arguments: cls(*arguments) for arguments in given]
    replaced, left = outcomes(layers(files, wanted, *ways))
    assert len(replaced) >= n_replaced and len(left) <= n_left, left
    assert all(left.values())
