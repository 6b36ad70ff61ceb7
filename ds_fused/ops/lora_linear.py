"""A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685) as one node of autograd.

    y = x W^T + bias + scaling * (z A^T) B^T          z: x, or x after a dropout
    t = scaling * dy B                                [M, r]
    dx = dy W + t A,  dA = t^T z,  dB = dy^T (scaling * z A^T)

Every step is a product of cuBLAS, and what is added is added by the product that makes it. Written as layers it is a
product of the adapter's own size, a pass that scales it and one that adds it, and the like for dx. Traffic less than
that: forward 4 M N of 6 M N beside the first product's own; backward 2 M N of dy and 2 M K of dx.

Saved for backward: x (and z, where it is another tensor), which others hold anyway, and M r numbers.

Sizes: M rows (every leading dimension, flattened), K columns in, N out, rank r.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops._once import once_differentiable
from ds_fused.ops._tiles import product
from ds_fused.ops._triton import autocast_dtype, check_dtypes, rows_of, runs_kernels


def lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    lora_x: Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    z = x if lora_x is None else lora_x
    return F.linear(x, weight, bias) + F.linear(F.linear(z, lora_a), lora_b) * scaling


class LoRALinearFunction(torch.autograd.Function):
    """Autograd around the products. ``make``: where the result comes from, if not from them."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        lora_x: Tensor | None,
        scaling: float,
        make: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        h = _within(x if lora_x is None else lora_x, lora_a, scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, lora_x, h)
        ctx.scaling = scaling
        return _outer(x, weight, lora_b, bias, h) if make is None else make()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, lora_x, h = ctx.saved_tensors
        wants_x, wants_weight, wants_a, wants_b, wants_bias, wants_lora_x, *_ = ctx.needs_input_grad
        rows = rows_of(dy)
        dx = dweight = da = db = dbias = dlora_x = t = None
        if wants_a or wants_lora_x or (wants_x and lora_x is None):
            t = rows.new_empty(rows.shape[0], lora_a.shape[0])
            product(t, rows, lora_b, scale=ctx.scaling)
        if wants_x:
            dx = torch.mm(rows, weight)
            if lora_x is None:
                dx.addmm_(t, lora_a)
            dx = dx.view(x.shape)
        if wants_weight:
            dweight = torch.mm(rows.t(), rows_of(x))
        if wants_a:
            da = torch.mm(t.t(), rows_of(x if lora_x is None else lora_x))
        if wants_b:
            db = torch.mm(rows.t(), h)
        if wants_bias:
            dbias = rows.sum(0)
        if wants_lora_x:
            dlora_x = torch.mm(t, lora_a).view(x.shape)
        return dx, dweight, da, db, dbias, dlora_x, None, None


def _within(z: Tensor, lora_a: Tensor, scaling: float) -> Tensor:
    """[..., K] -> [M, r], scaled."""
    rows = rows_of(z)
    h = rows.new_empty(rows.shape[0], lora_a.shape[0])
    product(h, rows, lora_a.t(), scale=scaling)
    return h


def _outer(x: Tensor, weight: Tensor, lora_b: Tensor, bias: Tensor | None, h: Tensor) -> Tensor:
    rows = rows_of(x)
    y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return y.addmm_(h, lora_b.t()).view(*x.shape[:-1], weight.shape[0])


def fill_lora_linear(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    lora_x: Tensor | None,
    scaling: float,
) -> None:
    """Writes the result into y, past autograd."""
    with torch.no_grad():
        h = _within(x if lora_x is None else lora_x, lora_a, scaling)
        y.data.copy_(_outer(x, weight, lora_b, bias, h))


def fits(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the products take these tensors as they are: of one dtype, on one device, without autocast."""
    alike = all(t is None or (t.dtype == x.dtype and t.device == x.device) for t in others)
    return alike and autocast_dtype(x) is None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    lora_x: Tensor | None = None,
    *,
    scaling: float = 1.0,
) -> Tensor:
    """``F.linear(x, weight, bias) + scaling * F.linear(F.linear(lora_x, lora_a), lora_b)`` for x [..., K] -> [..., N].

    ``weight`` [N, K] and ``bias`` [N] may be frozen; ``lora_a`` [r, K], ``lora_b`` [N, r]. ``lora_x`` [..., K] is what
    the adapter is given, such as a dropout of x; x where it is missing. Under autocast, and for tensors of several
    dtypes, it is the layers one by one, in PyTorch. A ValueError names a shape that does not fit.
    """
    _check_shapes(x, weight, lora_a, lora_b, bias, lora_x)
    others = (weight, lora_a, lora_b, bias, lora_x)
    if not runs_kernels(x, *others) or not fits(x, *others):
        return lora_linear_reference(x, weight, lora_a, lora_b, bias, lora_x, scaling=scaling)
    check_dtypes("lora_linear", x=x)
    return LoRALinearFunction.apply(x, weight, lora_a, lora_b, bias, lora_x, scaling)


def _check_shapes(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None, lora_x: Tensor | None
) -> None:
    matrices = {"weight": weight, "lora_a": lora_a, "lora_b": lora_b}
    flat = next((name for name, t in matrices.items() if t.ndim != 2), None)
    if flat is not None or x.ndim < 1:
        name, t, least = ("x", x, "at least 1") if flat is None else (flat, matrices[flat], 2)
        raise ValueError(f"lora_linear: {name} has {t.ndim} dimensions, {tuple(t.shape)}; it must have {least}")
    (n_out, n_in), rank = weight.shape, lora_a.shape[0]
    wanted = {
        "x": (x, (*x.shape[:-1], n_in)),
        "lora_a": (lora_a, (rank, n_in)),
        "lora_b": (lora_b, (n_out, rank)),
        "bias": (bias, (n_out,)),
        "lora_x": (lora_x, tuple(x.shape)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"lora_linear: {name} is {tuple(tensor.shape)}; with weight {(n_out, n_in)} and rank {rank} it must be "
                f"{shape}"
            )
