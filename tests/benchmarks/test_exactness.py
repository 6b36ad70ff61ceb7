"""exactness.py: what it says of a model in bf16 is what a comparison by hand finds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

# benchmarks/ is no installed package
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import exactness
from benchmarks.exactness import Compared
from benchmarks.results import OK


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    out = tmp_path_factory.mktemp("exactness")
    arguments = ["--shape", "tiny", "--length", "32", "--batches", "2", "--ways", "hf,hf-cudnn,ours", "--out", str(out)]
    assert exactness.main(arguments) == 0
    page = (out / "exactness.md").read_text()
    assert str(out) not in page and "| hf-cudnn | - |" in page
    return {row["way"]: row for row in json.loads((out / "exactness.json").read_text())["rows"]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this way runs")
def test_a_way_that_needs_a_gpu_says_so_and_leaves_the_others(rows):
    assert rows["hf-cudnn"]["status"] == "failed: RuntimeError: needs a GPU"
    assert rows["ours"]["status"] == OK


@pytest.mark.parametrize("way", ["hf", "ours"])
def test_bf16_is_near_fp32_and_not_the_same(rows, way):
    row = rows[way]
    assert row["status"] == OK and len(row["apart"]) == 2
    assert all(0 < abs(apart) < 1e-2 for apart in row["apart"])
    figures = row["gradients"]
    # a rounding of bf16 is 2e-3 on average
    assert 1e-3 < figures["median"] <= figures["worst"] < 5e-2 and 1e-3 < figures["all"] < 5e-2


def test_ours_is_fused(rows):
    assert rows["ours"]["replaced"]["fused_linear_cross_entropy"] == 1
    assert "replaced" not in rows["hf"]


def test_figures_are_relative_errors_of_the_gradients():
    model = nn.Linear(3, 2)
    exact = {"weight": torch.tensor([[3.0, 0, 0], [0, 4.0, 0]]), "bias": torch.tensor([0.0, 2.0])}
    compared = Compared(exact)
    with compared.watching(model):
        # d/dw (w * g).sum() is g
        moved = {"weight": exact["weight"] + 0.5, "bias": exact["bias"] * 1.25}
        sum((weight * moved[name]).sum() for name, weight in model.named_parameters()).backward()
    assert all(weight.grad is None for weight in model.parameters())
    figures = compared.figures()
    weight, bias = (6 * 0.25) ** 0.5 / 5, 0.25
    assert figures["worst_of"] == "bias" and figures["worst"] == pytest.approx(bias)
    assert figures["median"] == pytest.approx((weight + bias) / 2)
    assert figures["all"] == pytest.approx(((6 * 0.25 + 0.25) / 29) ** 0.5)
    # no longer watched
    model(torch.ones(3)).sum().backward()
    assert model.bias.grad is not None


def test_a_weight_without_a_gradient_is_named():
    compared = Compared({"weight": torch.ones(1), "bias": torch.ones(1)})
    with pytest.raises(RuntimeError, match="no gradient came to bias, weight, of 2 weights"):
        compared.figures()


@pytest.mark.parametrize(
    ("ways", "words"), [("liger,hf", "liger has to be the last way"), ("hf,none", "there is no way 'none'")]
)
def test_ways_that_cannot_be(ways, words, capsys):
    with pytest.raises(SystemExit):
        exactness.main(["--ways", ways])
    assert words in capsys.readouterr().err
