"""Options that are a number or None: what else comes is an error that says so, from each op and module that has one."""

from __future__ import annotations

import pytest
import torch

import ds_fused
from ds_fused import nn

X, LABELS = torch.zeros(2, 4), torch.tensor([0, 1])
HEADS = torch.zeros(1, 2, 5, 4)


@pytest.mark.parametrize(
    ("op", "name", "call"),
    [
        ("glu", "limit", lambda value: ds_fused.glu(X, X, limit=value)),
        ("cross_entropy", "softcap", lambda value: ds_fused.cross_entropy(X, LABELS, softcap=value)),
        ("linear_log_probs", "softcap", lambda value: ds_fused.linear_log_probs(X, X, LABELS, softcap=value)),
        ("neighborhood_attention", "scale", lambda value: ds_fused.neighborhood_attention(*3 * [HEADS], scale=value)),
        ("NeighborhoodAttention", "scale", lambda value: nn.NeighborhoodAttention(8, 2, scale=value)),
    ],
)
def test_what_is_neither_a_number_nor_none(op, name, call):
    call(None)
    call(2)
    with pytest.raises(ValueError, match=rf"{op}: {name} is '2' \(str\); it must be a number \(float or int\) or None"):
        call("2")
    with pytest.raises(ValueError, match=rf"{op}: {name} is a tensor; it must be a number \(float or int\) or None"):
        call(torch.ones(()))
