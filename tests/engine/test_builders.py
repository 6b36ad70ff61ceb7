"""Op builders: one per row of the registry, listed by ds_report with the reason where one can't run."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ds_fused.engine import builders, initialize
from ds_fused.engine.config import parse_config
from ds_fused.ops.registry import OPS
from tests.launching import start


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_each_op_has_a_builder_that_loads_its_module(op):
    builder = builders.builders()[op.name]()
    assert builder.is_compatible()
    assert builder.load() is op.module
    assert builder.sources() == []


def test_deepspeed_and_its_accelerator_know_them(monkeypatch):
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    by_class = {}
    accelerator = SimpleNamespace(class_dict=by_class, device_name=lambda: "cpu")
    monkeypatch.setattr(builders, "get_accelerator", lambda: accelerator)
    builders.enlist()
    assert {op.name for op in OPS} <= set(ALL_OPS)
    # where the accelerator keeps a table of classes (CUDA does), create_op_builder finds ours in it
    assert by_class["LinearCrossEntropyBuilder"]().name == "linear_cross_entropy"


def test_an_old_gpu_is_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(builders, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "cuda"))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    builder = builders.builders()["rope"]()
    assert not builder.is_compatible(verbose=True)
    assert "rope: this GPU has compute capability 7.0" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="rope: this GPU"):
        builder.load()


def test_an_op_that_is_not_compatible_is_left_with_its_reason(monkeypatch):
    cls = builders.builders()["rope"]

    def is_compatible(self, verbose=False):
        self.error_log = "rope: not today"
        return False

    monkeypatch.setattr(cls, "is_compatible", is_compatible)
    wanted, left = initialize._loadable(parse_config({"enabled": True}))
    assert "rope" not in wanted and "rms_norm" in wanted
    assert left == {"rope": "its op builder is not compatible: rope: not today"}


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
sys.argv = ["ds_report"]
from deepspeed.env_report import cli_main
cli_main()
"""


def report_of(*command: str | Path) -> str:
    ended = start(command)
    assert ended.status == 0, ended.output
    return ended.output


@pytest.mark.parametrize(
    "command",
    [(Path(sys.executable).with_name("ds_report"),), (sys.executable, "-m", "deepspeed.env_report")],
    ids=["ds_report", "-m"],
)
def test_ds_report_lists_every_op(command):
    report = report_of(*command)
    for op in OPS:
        assert re.search(rf"^{op.name} \.+ .*\[NO\].* \.+ .*\[OKAY\]", report, re.MULTILINE), report


def test_ds_report_says_that_triton_is_missing():
    report = report_of(sys.executable, "-c", WITHOUT_TRITON)
    assert re.search(r"^ds_fused \.+ .*\[NO\].* \.+ .*\[NO\]", report, re.MULTILINE), report
    assert "ds_fused: Triton can't be imported" in report
