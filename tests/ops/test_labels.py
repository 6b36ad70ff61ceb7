"""What the losses ask of their labels: the count, and that an illegal one never goes through."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from accuracy import nan_filled, randn, same_bits

import ds_fused.ops as ops
from ds_fused.ops.losses import _labels
from ds_fused.ops.losses._labels import counting_tokens, label_facts, reduced_losses


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("n", [0, 1, 4, 9])  # none, under, exactly and over two blocks
def test_facts(n, dtype, device, monkeypatch):
    monkeypatch.setattr(_labels, "BLOCK", 4)
    labels = torch.arange(n, device=device, dtype=dtype)
    labels[::3] = -100
    kept = int((labels != -100).sum())
    for n_vocab, are_legal in ((9, True), (8, n < 9), (1, kept == 0)):
        count, fits = label_facts(labels, n_vocab, -100)
        assert (count.dtype, int(count), bool(fits)) == (torch.int64, kept, are_legal)
    if kept:
        labels[-1] = -1  # in the last block
        assert not label_facts(labels, 9, -100)[1]
        assert label_facts(labels, 9, -1)[1] == (not (labels == -100).any())


@pytest.mark.parametrize("n", [0, 1, 4, 9])
def test_losses_are_reduced_beside_them(n, device, monkeypatch):
    monkeypatch.setattr(_labels, "BLOCK", 4)
    labels = torch.arange(n, device=device)
    labels[::3] = -100
    loss = randn(n, device=device).float().masked_fill(labels == -100, 0.0)
    kept = (labels != -100).sum()
    for reduction, wanted in (("sum", loss.sum()), ("mean", loss.sum() / kept)):
        with nan_filled():
            total, count, are_legal = reduced_losses(loss, labels, 8, -100, reduction)
        torch.testing.assert_close(total, wanted, equal_nan=True)
        assert count == kept and bool(are_legal) == (n < 9)


def test_an_illegal_label_is_named_on_a_cpu():
    with pytest.raises(ValueError, match=r"op: label 7 lies outside \[0, 7\) and is not ignore_index -100"):
        counting_tokens("op", torch.tensor([0, -100, 7, 8]), 7, -100)


@pytest.mark.parametrize("at", [(slice(None), 1), (slice(None), slice(1, 2))])  # every third number, as [5] and [5, 1]
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_labels_in_a_column_of_a_table(at, dtype, device):
    table = torch.arange(15, device=device, dtype=dtype).view(5, 3) % 7
    table[2] = -100
    labels = table[at]
    logits = randn(5, 7, device=device).float()
    x, weight = randn(*labels.shape, 4, device=device).float(), randn(7, 4, device=device).float()
    logits, teacher = logits.view(*labels.shape, 7), (logits.roll(1) * 2).view(*labels.shape, 7)
    calls = (
        lambda labels: ops.cross_entropy(logits, labels, reduction="none"),
        lambda labels: ops.linear_cross_entropy(x, weight, labels, reduction="none"),
        lambda labels: ops.linear_log_probs(x, weight, labels),
        lambda labels: ops.jsd(logits, teacher, labels, reduction="none"),
        lambda labels: ops.tvd(logits, teacher, labels, reduction="none"),
        lambda labels: ops.linear_jsd(x, weight, x * 2, weight, labels, reduction="none"),
    )
    assert not labels.is_contiguous()
    for call in calls:
        assert same_bits(call(labels), call(labels.clone(memory_format=torch.contiguous_format)))


@pytest.mark.gpu
@pytest.mark.parametrize("label", [7, -1])
def test_an_illegal_label_stops_the_device(label):
    # in a process of its own: the context is lost with it
    script = f"""
import torch, ds_fused
logits = torch.zeros(2, 7, device="cuda", requires_grad=True)
ds_fused.cross_entropy(logits, torch.tensor([0, {label}], device="cuda")).backward()
torch.cuda.synchronize()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "device-side assert" in done.stderr and "_assert_async" in done.stderr, done.stderr[-2000:]
