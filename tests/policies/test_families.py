"""Each family on a tiny random model: equal to stock fused and after restore, and claimed to the last layer."""

from __future__ import annotations

import pytest
import torch

import ds_fused
from tests.policies.tiny import (
    LAYER_KEYS,
    LLAMA,
    NAMED,
    Tiny,
    assert_as_accurate,
    assert_same_state,
    assert_same_step,
    classes,
    counts,
    each_family,
    every_family,
    step,
    twins,
)

PHI3 = NAMED["Phi3"]


@every_family
def test_equals_stock_fused_and_restored(family: Tiny) -> None:
    model, stock = twins(family)
    parameters = list(model.parameters())
    report = ds_fused.apply(model, LAYER_KEYS, strict=False)
    assert counts(report) == family.counts
    assert sum(row.count for row in report.left) == family.left, report.left
    assert_same_state(model, stock)
    # the same objects: optimizers made before, tied weights and ds_id keep pointing at them
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert_same_step(model, stock, tolerance=1e-5)

    report.restore()
    assert classes(model) == classes(stock)
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in stock.modules()]
    assert_same_state(model, stock)
    loss, grads = step(model)
    stock_loss, stock_grads = step(stock)
    assert torch.equal(loss, stock_loss)
    assert all(torch.equal(grads[name], stock_grads[name]) for name in stock_grads)


@every_family
def test_equals_stock_with_the_loss_fused(family: Tiny) -> None:
    model, stock = twins(family)
    report = ds_fused.apply(model)
    assert counts(report)["fused_linear_cross_entropy"] == 1
    assert_same_state(model, stock)
    assert_same_step(model, stock, tolerance=1e-5)
    assert report.verify_live() == []
    report.restore()
    assert classes(model) == classes(stock)
    assert_same_step(model, stock, tolerance=1e-7)


# 16-bit: judged by the stock model itself, whose distance from fp32 the fused one may exceed by half at most
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_family
def test_is_as_accurate_as_stock_in_16_bits(family: Tiny, dtype: torch.dtype) -> None:
    assert counts(assert_as_accurate(family, dtype, "cpu")) == family.counts


# the proof, too, is of the kernels there
@pytest.mark.gpu
@every_family
def test_is_as_accurate_as_stock_on_a_gpu(family: Tiny) -> None:
    assert counts(assert_as_accurate(family, torch.bfloat16, "cuda")) == family.counts


# the only one of the ten that turns a part of its columns; attention in eager mode, so that weights come back as well
def test_partial_rotary_and_recorded_outputs() -> None:
    model, stock = twins(PHI3, partial_rotary_factor=0.5, attn_implementation="eager")
    assert model.model.rotary_emb.inv_freq.numel() == 2  # half of half of a head's 8 columns
    assert counts(ds_fused.apply(model, LAYER_KEYS)) == PHI3.counts
    assert_same_step(model, stock, tolerance=1e-5)
    ids = torch.arange(3, 10)[None]
    mine, theirs = (m(ids, output_attentions=True, output_hidden_states=True) for m in (model, stock))
    for a, b in zip(mine.attentions + mine.hidden_states, theirs.attentions + theirs.hidden_states, strict=True):
        torch.testing.assert_close(a, b)
    assert len(mine.attentions) == 2


@pytest.mark.parametrize(
    "name", ["Llama", "Olmo2", "Cohere", "Nemotron", "GPTNeoX", "DeepseekV3", "GptOss", "Qwen3Next"]
)
def test_autocast(name: str) -> None:
    model, stock = twins(NAMED[name])
    ds_fused.apply(model, LAYER_KEYS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = step(model), step(stock)
    torch.testing.assert_close(mine[0], theirs[0], rtol=1e-3, atol=0)
    assert {n: g.dtype for n, g in mine[1].items()} == {n: g.dtype for n, g in theirs[1].items()}


def test_generates_the_same_tokens() -> None:
    model, stock = twins(LLAMA)
    ds_fused.apply(model)
    ids = torch.arange(3, 10)[None]
    mine, theirs = (m.eval().generate(ids, max_new_tokens=8, do_sample=False) for m in (model, stock))
    assert mine.tolist() == theirs.tolist()
