"""Losses and log-probabilities of a vocabulary, from logits and from hidden states."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from benchmarks.cases.case import SIZE, Case, Inputs, randn, random_labels
from benchmarks.rivals import heads as rivals

# logits of standard deviation 3: with 1 the gradient would be the label's -1 and little else, and a wrong softmax
# would pass the check
LOGITS_SCALE = 3.0
QUARTER = 0.25


def loss_inputs(generator: torch.Generator, n: int, n_vocab: int) -> Inputs:
    logits = randn(generator, n, n_vocab, scale=LOGITS_SCALE)
    return Inputs({"logits": logits.requires_grad_(), "labels": random_labels(generator, n, n_vocab)})


def quarter_loss_inputs(generator: torch.Generator, n: int, n_vocab: int) -> Inputs:
    # as under four steps of gradient accumulation
    dloss = torch.tensor(QUARTER, device=generator.device)
    return Inputs(loss_inputs(generator, n, n_vocab).tensors | {"dloss": dloss}, ("dloss",))


def linear_loss_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int) -> Inputs:
    x = randn(generator, m, h).requires_grad_()
    weight = nn.Parameter(randn(generator, n_vocab, h, scale=LOGITS_SCALE * h**-0.5))
    return Inputs({"x": x, "weight": weight, "labels": random_labels(generator, m, n_vocab)})


def frozen_loss_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int) -> Inputs:
    tensors = linear_loss_inputs(generator, m, h, n_vocab).tensors
    return Inputs(tensors | {"weight": tensors["weight"].detach()})


def log_probs_inputs(generator: torch.Generator, m: int, h: int, n_vocab: int, outputs: int = 1) -> Inputs:
    tensors = linear_loss_inputs(generator, m, h, n_vocab).tensors
    # a gradient of each token, as a policy's advantages give it
    upstream = {
        name: torch.randn(m, generator=generator, device=generator.device)
        for name in ("dlog_probs", "dentropy")[:outputs]
    }
    return Inputs(tensors | upstream, tuple(upstream))


def _loss_bytes(n: int, n_vocab: int) -> tuple[int, int]:
    # logits once, dlogits once; labels and losses are nothing beside them
    return SIZE * n * n_vocab, SIZE * 2 * n * n_vocab


def linear_loss_flops(m: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits; logits, dx and dweight
    return 2 * m * h * n_vocab, 6 * m * h * n_vocab


def _frozen_loss_flops(m: int, h: int, n_vocab: int) -> tuple[int, int]:
    # logits; logits and dx
    return 2 * m * h * n_vocab, 4 * m * h * n_vocab


# plain PyTorch in fp32, against which all are judged, needs about 30 GiB for them
DISTILLED = ((4096, 4096, 128256), (4096, 2048, 151936))

CASES = (
    Case(
        "cross_entropy", "", loss_inputs, rivals.loss_providers(1.0),
        sweep=((8192, 128256), (8192, 32000)), launch_bound=(16, 1024), tiny=(140, 96), bytes=_loss_bytes,
    ),
    Case(
        "cross_entropy", "upstream 1/4", quarter_loss_inputs, rivals.loss_providers(QUARTER),
        sweep=((8192, 128256),), launch_bound=(16, 1024), tiny=(140, 96), bytes=_loss_bytes,
    ),
    Case(
        "linear_cross_entropy", "", linear_loss_inputs, rivals.LINEAR_CROSS_ENTROPY,
        sweep=((8192, 4096, 128256), (16384, 2048, 151936), (4096, 4096, 128256)),
        launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=linear_loss_flops,
    ),
    # LoRA
    Case(
        "linear_cross_entropy", "frozen", frozen_loss_inputs, rivals.LINEAR_CROSS_ENTROPY,
        sweep=((8192, 4096, 128256),), launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=_frozen_loss_flops,
    ),
    Case(
        "linear_log_probs", "", log_probs_inputs, rivals.log_probs_providers(entropy=False),
        sweep=((8192, 4096, 128256), (16384, 2048, 151936)),
        launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=linear_loss_flops,
    ),
    Case(
        "linear_log_probs", "entropy", partial(log_probs_inputs, outputs=2), rivals.log_probs_providers(entropy=True),
        sweep=(DISTILLED[0],), launch_bound=(128, 256, 1024), tiny=(140, 16, 96), flops=linear_loss_flops,
    ),
)  # fmt: skip
