"""Examples of cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import ds_fused.ops as ops
from ds_fused.ops.losses._lent_logits_parts import lent_logits_in_parts
from ds_fused.ops.losses._loss import LossOptions
from examples.parts import Case, ids_of, leaf


def compiled() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype in (torch.bfloat16, torch.float32):
        ops.cross_entropy(leaf(2, 128256, dtype=dtype), labels).backward()
    options = {"label_smoothing": 0.1, "z_loss": 1e-4, "softcap": 30.0}
    for in_forward in (False, True):
        ops.cross_entropy(leaf(2, 50257), labels, grad_in_forward=in_forward, **options).backward()
        for dtype in (torch.bfloat16, torch.float32):
            logits, more = leaf(2, 128256, dtype=dtype), {"label_smoothing": 0.1, "return_accuracy": True}
            more |= {"weight": leaf(128256).detach(), "grad_in_forward": in_forward}
            ops.cross_entropy(logits, labels, **more)[0].backward()
    # a walked row, and one that is held whole
    for n_vocab, dtype in ((128256, torch.bfloat16), (128256, torch.float32), (8192, torch.bfloat16)):
        ops.cross_entropy(leaf(2, n_vocab, dtype=dtype), labels, grad_in_forward=True).backward()
    # where programs can't meet, a program has a row
    for n_vocab, dtype in ((128256, torch.bfloat16), (50257, torch.float16), (128256, torch.float32)):
        loss, lse = torch.empty(2), torch.empty(2, 2)
        lent_logits_in_parts(torch.empty(2, n_vocab, dtype=dtype), labels, loss, lse, loss, LossOptions())


def traced() -> Iterator[Case]:
    yield ops.cross_entropy, [(leaf(5, n_vocab), ids_of(5)) for n_vocab in (1024, 32000)]
    yield ops.cross_entropy, [(leaf(n, 1024), ids_of(n)) for n in (3, 4, 5)]
    overwriting = partial(ops.cross_entropy, overwrite_logits=True, label_smoothing=0.1, softcap=30.0)
    yield lambda x, labels: overwriting(x * 2, labels), [(leaf(5, 1024), ids_of(5))]
    in_forward = partial(ops.cross_entropy, grad_in_forward=True, upstream=0.25)
    yield lambda x, labels: in_forward(x * 2, labels), [(leaf(n, 1024), ids_of(n)) for n in (3, 4)]
    for smoothing in (0.0, 0.1):
        more = partial(ops.cross_entropy, label_smoothing=smoothing, return_z_loss=True, return_accuracy=True)
        yield (
            lambda x, labels, weight, more=more: more(x, labels, weight=weight)[0],
            [(leaf(n, 1024), ids_of(n), torch.ones(1024)) for n in (3, 4, 5)],
        )
