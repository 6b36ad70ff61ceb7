"""What the tests of a head with its loss share: autocast, and a weight that moves as ZeRO-3 moves it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accuracy import as_accurate
from torch import Tensor, nn


def as_accurate_under_autocast(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], inputs: Sequence[Tensor], **options: object
) -> None:
    """Judged in fp32, products in bf16 but for the judge's own."""

    def autocasted(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *others: Tensor, **options: object) -> Tensor:
            with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=x.dtype != torch.float64):
                return f(x, *others, **options)

        return run

    # rounded, so that fp64 sees what bf16 sees
    inputs = [t.bfloat16().double() if t.is_floating_point() else t for t in inputs]
    as_accurate(autocasted(ours), autocasted(theirs), inputs, torch.float32, **options)


def gathered_anew(weight: nn.Parameter) -> None:
    """Released, and gathered into other memory."""
    full = weight.data.clone()
    weight.data.fill_(float("nan"))
    weight.data = torch.empty(0)
    weight.data = full
