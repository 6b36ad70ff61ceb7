"""What DeepSpeed's flops profiler counts of a fused model: the products of stock's forward."""

from __future__ import annotations

import pytest
import torch
from deepspeed.profiling.flops_profiler import FlopsProfiler
from torch import nn

import ds_fused
from tests.policies.tiny import NAMED, VOCAB

TOKENS = 24


def products(model: nn.Module) -> dict[str, int]:
    """Module -> the multiplications of a forward that were counted in it and its own."""
    profiler = FlopsProfiler(model)
    ids = torch.arange(1, 1 + TOKENS).view(2, -1)
    profiler.start_profile()
    model(input_ids=ids, labels=ids).loss.backward()
    profiler.stop_profile()
    counts = {name: sum(m.__macs__ for m in module.modules()) for name, module in model.named_modules()}
    profiler.end_profile()
    return counts


@pytest.mark.parametrize("options", [True, {"grad_in_forward": False, "keep_mb": 0, "chunk_mb": 1}])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_head(options, frozen):
    model = NAMED["Llama"].make()
    model.lm_head.requires_grad_(not frozen)
    stock = products(model)
    report = ds_fused.apply(model, fused_linear_cross_entropy=options)
    fused = products(model)
    # the last tokens have no label, but a row of logits
    assert stock["lm_head"] == fused["lm_head"] == TOKENS * VOCAB * model.config.hidden_size
    assert stock[""] == fused[""]
    report.restore()
    assert products(model) == stock


def test_experts():
    model = NAMED["Qwen3Moe"].make(experts_implementation="eager")
    stock = products(model)
    report = ds_fused.apply(model)
    assert any(row.key == "experts" for row in report.replaced)
    fused = products(model)
    assert fused == stock and fused["model.layers.1.mlp.experts"] > 0
