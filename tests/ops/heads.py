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


# tokens, vocabulary: more than 2^31 logits
MANY = (16800, 128256)


def over_two_to_the_31_logits(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    theirs: Callable[..., Tensor | tuple[Tensor, ...]],
    device: torch.device,
) -> None:
    """What ours(x, weight, tokens) makes of all tokens, at both ends against fp64. Of a sum, its gradient."""
    x, weight = (torch.randn(n, 8, device=device, dtype=torch.bfloat16).requires_grad_() for n in MANY)
    outputs = ours(x, weight, slice(None))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    dx, dweight = torch.autograd.grad([y.sum() for y in outputs], (x, weight))
    assert dweight.isfinite().all() and dweight.abs().sum() > 0
    wide = weight.detach().double()
    for tokens in (slice(0, 4), slice(-4, None)):
        part = x.detach()[tokens].double().requires_grad_()
        exact = theirs(part, wide, tokens)
        exact = exact if isinstance(exact, tuple) else (exact,)
        (dexact,) = torch.autograd.grad([y.sum() for y in exact], part)
        pairs = [(y[tokens], y_exact) for y, y_exact in zip(outputs, exact, strict=True) if y.ndim]
        for got, wanted in [*pairs, (dx[tokens], dexact)]:
            assert (got - wanted).norm() < 3e-2 * wanted.norm()


def gathered_anew(weight: nn.Parameter) -> None:
    """Released, and gathered into other memory."""
    full = weight.data.clone()
    weight.data.fill_(float("nan"))
    # of the same device and dtype: else autograd begins anew with the parameter
    weight.data = full.new_empty(0)
    weight.data = full
