"""The judge of every op: as accurate as PyTorch itself, deterministic, and leaving alone what it was lent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Result = tuple[list[Tensor], list[Tensor | None]]  # outputs, gradients of the inputs


def randn(*shape: int, device: torch.device | str, seed: int = 0) -> Tensor:
    """Normal values in fp64, the same on every device; as_accurate converts them to the dtype it judges."""
    generator = torch.Generator().manual_seed(seed + 7919 * sum(shape) + len(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Memory that torch.empty and its like hand out is NaN (integers: the largest), so what is never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that holds for NaN and tells -0.0 from 0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.contiguous().view(-1).view(torch.uint8), b.contiguous().view(-1).view(torch.uint8))


def as_its_last_rows(op: Callable[[Tensor], Tensor], n: int, d: int, device: torch.device) -> None:
    """Of x [n, d] in bf16 the last rows of the result and of the gradient are those of these rows alone."""
    x = torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_()
    y = op(x)
    y.backward(x.detach())
    tail = x.detach()[-3:].clone().requires_grad_()
    y_tail = op(tail)
    y_tail.backward(tail.detach())
    assert same_bits(y[-3:].detach(), y_tail.detach())
    assert same_bits(x.grad[-3:], tail.grad)


def as_accurate(
    op: Callable[..., object],
    reference: Callable[..., object],
    inputs: Sequence[Tensor | None],
    dtype: torch.dtype,
    *,
    frozen: Sequence[int] = (),
    floor: float = 0.0,
    **options: object,
) -> None:
    """Outputs and all gradients against fp64; allowed are 2x PyTorch's own error in that dtype + 4 ulp.

    Inputs in fp64 are converted to `dtype`; any other tensor is used as it is (its own dtype, strides, labels).
    `frozen`: places of floating inputs that need no gradient and must get none. `floor`: an error that is allowed
    besides, where equal terms cancel: what a fused multiply-add leaves of them PyTorch may happen to round away.
    """
    inputs = [x.to(dtype) if x is not None and x.dtype == torch.float64 else x for x in inputs]
    frozen = {*frozen, *(i for i, x in enumerate(inputs) if x is None or not x.is_floating_point())}
    lent = [None if x is None else x.clone() for x in inputs]

    probe = _outputs(op(*inputs, **options))
    dys = [randn(*y.shape, device=y.device, seed=1 + i).to(y.dtype) for i, y in enumerate(probe)]
    lent_dys = [dy.clone() for dy in dys]
    with nan_filled():
        ours = _run(op, inputs, dys, frozen, options)
        again = _run(op, inputs, dys, frozen, options)
    for i, (x, before) in enumerate(zip(inputs, lent, strict=True)):
        assert x is None or same_bits(x, before), f"input {i} was written to"
    for i, (dy, before) in enumerate(zip(dys, lent_dys, strict=True)):
        assert same_bits(dy, before), f"the gradient of output {i} was written to"

    torchs = _run(reference, inputs, dys, frozen, options)
    exact = _run(reference, [_wide(x) for x in inputs], [dy.double() for dy in dys], frozen, options)
    names = [[f"output {i}" for i in range(len(dys))], [f"gradient of input {i}" for i in range(len(inputs))]]
    for part in (0, 1):
        for name, y, y_again, y_torch, y_exact in zip(
            names[part], ours[part], again[part], torchs[part], exact[part], strict=True
        ):
            judge(name, y, y_again, y_torch, y_exact, floor)


def judge(
    name: str, y: Tensor | None, again: Tensor | None, torchs: Tensor | None, exact: Tensor | None, floor: float = 0.0
) -> None:
    """One result, the same from a second run, PyTorch's, and fp64's."""
    if exact is None or y is None:
        assert y is None and exact is None, f"{name}: {'missing' if y is None else 'not asked for'}"
        return
    assert y.dtype == torchs.dtype and y.shape == torchs.shape, (
        f"{name} is {y.dtype} {tuple(y.shape)}, PyTorch's {torchs.dtype} {tuple(torchs.shape)}"
    )
    assert same_bits(y, again), f"{name} differs from run to run"
    if y.numel() == 0:
        return
    assert torch.equal(y.isnan(), exact.isnan()), f"{name}: NaN where fp64 has none, or none where it has"
    error = (y.double() - exact).abs().nan_to_num()
    allowed = floor + 2 * (torchs.double() - exact).abs().nan_to_num().max() + 4 * ulp(exact, y.dtype)
    worst = int((error - allowed).argmax())
    assert bool((error <= allowed).all()), (
        f"{name}: error {float(error.view(-1)[worst]):.3g} at {worst}, allowed {float(allowed.view(-1)[worst]):.3g} "
        f"({int((error > allowed).sum())} of {y.numel()} are above)"
    )


def ulp(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbours in dtype at each exact value."""
    info = torch.finfo(dtype)
    power = torch.frexp(exact.abs().nan_to_num().clamp_min(info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps), power)


def _wide(x: Tensor | None) -> Tensor | None:
    return x.double() if x is not None and x.is_floating_point() else x


def _outputs(result: object) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _run(op: Callable[..., object], inputs: Sequence, dys: Sequence[Tensor], frozen: set[int], options: dict) -> Result:
    leaves = [x if i in frozen else x.detach().requires_grad_() for i, x in enumerate(inputs)]
    outputs = _outputs(op(*leaves, **options))
    torch.autograd.backward(outputs, list(dys))
    return [y.detach() for y in outputs], [None if x is None else x.grad for x in leaves]
