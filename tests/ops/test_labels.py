"""What the losses ask of their labels: the count, and that an illegal one never goes through."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ds_fused.ops import _labels
from ds_fused.ops._labels import counting_tokens, label_facts


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


def test_an_illegal_label_is_named_on_a_cpu():
    with pytest.raises(ValueError, match=r"op: label 7 lies outside \[0, 7\) and is not ignore_index -100"):
        counting_tokens("op", torch.tensor([0, -100, 7, 8]), 7, -100)


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
