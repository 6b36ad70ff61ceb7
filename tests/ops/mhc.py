"""Streams and parameters of hyper-connections, for the tests of their ops."""

from __future__ import annotations

import torch
from accuracy import randn
from torch import Tensor


def streams(*leading: int, n: int, c: int, device: torch.device | str, seed: int = 0) -> list[Tensor]:
    """x [..., N, C], a weight that gives logits of about one, bias and scale, in fp64."""
    m, k = n * (n + 2), n * c
    weight = randn(m, k, device=device, seed=1) * max(1, k) ** -0.5
    return [randn(*leading, n, c, device=device, seed=seed), weight, *(randn(s, device=device, seed=2) for s in (m, 3))]
