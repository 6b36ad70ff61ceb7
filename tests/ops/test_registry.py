"""The registry's rows hold what everybody derives from them."""

from __future__ import annotations

import inspect
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

import ds_fused
import ds_fused.ops as ops
from ds_fused.ops.registry import OPS, op

ROOMS = {path.parent.name for path in Path(ops.__file__).parent.glob("*/__init__.py")}


def test_one_word_everywhere():
    public = [name for name, found in vars(ops).items() if inspect.isfunction(found)]
    assert sorted(public) == sorted(row.name for row in OPS)
    for row in OPS:
        assert row.function.__name__ == row.name
        assert row.reference.__name__ == f"{row.name}_reference"
        room, _, name = row.module.__name__.removeprefix("ds_fused.ops.").partition(".")
        assert room in ROOMS and name == row.name
        assert getattr(ops, row.name) is row.function is getattr(ds_fused, row.name)


def test_keys_are_unique():
    keys = [key for row in OPS for key in row.keys]
    assert len(keys) == len(set(keys))
    norms = {"rms_norm", "add_rms_norm", "layer_norm", "group_norm", "gated_rms_norm"}
    mlps = {"swiglu", "geglu", "reglu", "relu2"}
    assert set(keys) == norms | mlps | {
        "rope",
        "qk_norm_rope",
        "experts",
        "lora",
        "cross_entropy",
        "fused_linear_cross_entropy",
    }


def test_options_are_arguments_of_the_function():
    for row in OPS:
        parameters = inspect.signature(row.function).parameters
        for name, option in row.options.items():
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[name].default == option.default
            assert isinstance(option.default, option.type)


def test_a_reference_takes_what_its_op_takes():
    for row in OPS:
        assert [*inspect.signature(row.reference).parameters] == [
            name for name in inspect.signature(row.function).parameters if name not in row.options
        ]


def test_rows_are_frozen():
    with pytest.raises(FrozenInstanceError):
        OPS[0].name = "other"
    with pytest.raises(TypeError):
        OPS[0].options["new"] = 1
    assert len({*OPS}) == len(OPS)  # rows may be keys


def test_an_unknown_op_names_the_known_ones():
    with pytest.raises(ValueError, match="no op 'batch_norm'; there are rms_norm, layer_norm"):
        op("batch_norm")
