"""Examples of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from ds_fused.ops.common._parts import sum_parts
from examples.parts import Case, OneOfTwo, ids_of, leaf


def compiled() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    ops.linear_cross_entropy(leaf(2, 8), leaf(32000, 8), labels).backward()
    ops.linear_cross_entropy(leaf(2, 8), leaf(32000, 8), labels, grad_in_forward=True).backward()
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0, "logit_scale": 0.5}
    ops.linear_cross_entropy(leaf(2, 8), leaf(50257, 8), labels, bias=leaf(50257), **options).backward()
    ops.linear_cross_entropy(leaf(2, 8).detach(), OneOfTwo(), labels)
    ops.linear_cross_entropy(leaf(2, 8).detach(), OneOfTwo(), labels, return_accuracy=True)
    weights = {"class_weight": leaf(32000).detach(), "label_smoothing": 0.1}
    ops.linear_cross_entropy(leaf(2, 8).detach(), OneOfTwo(), labels, **weights)
    # slabs that copy engines move
    for dtype, adds in ((torch.bfloat16, False), (torch.float32, True)):
        for beside in (False, True):
            sum_parts(leaf(4, 64).detach(), leaf(64, dtype=dtype).detach(), adds=adds, beside=beside)


def traced() -> Iterator[Case]:
    yield ops.linear_cross_entropy, [(leaf(n, 8), leaf(1024, 8), ids_of(n)) for n in (3, 4, 5)]
    yield ops.linear_cross_entropy, [(leaf(5, d), leaf(1024, d), ids_of(5)) for d in (8, 16)]
    recomputed = partial(ops.linear_cross_entropy, keep_mb=0, reduction="sum", logit_scale=0.5)
    yield recomputed, [(leaf(n, 8), leaf(1024, 8), ids_of(n)) for n in (3, 4)]
    one_pass = partial(ops.linear_cross_entropy, grad_in_forward=True)
    yield one_pass, [(leaf(n, 8), leaf(1024, 8), ids_of(n)) for n in (3, 4)]
    more = partial(ops.linear_cross_entropy, label_smoothing=0.1, return_z_loss=True, return_accuracy=True)
    yield (
        lambda x, weight, labels, of_class: more(x, weight, labels, class_weight=of_class)[0],
        [(leaf(n, 8), leaf(1024, 8), ids_of(n), torch.ones(1024)) for n in (3, 4)],
    )
