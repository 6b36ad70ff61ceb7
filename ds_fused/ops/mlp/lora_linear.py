"""A linear layer with a low-rank adapter (LoRA, arXiv 2106.09685) as one node of autograd.

    y = x W^T + bias + scaling * (z A^T) B^T          z: x, or x after a dropout
    t = scaling * dy B                                [M, r]
    dx = dy W + t A,  dA = t^T z,  dB = scaling * dy^T (z A^T)

Every step is a product, and what is added is added by the product that makes it. Written as layers it is a
product of the adapter's own size, a pass that scales it and one that adds it, and the like for dx. Traffic less than
that: forward 4 M N of 6 M N beside the first product's own; backward 2 M N of dy and 2 M K of dx.

An adapter in fp32 over a layer in bf16, as PEFT makes it, keeps its bits: what is multiplied are three pieces in bf16
of each of its numbers, summed in fp32 (``_pieces.py``). As layers all of x, y and dx would be there in fp32. A dropout
of x in fp32 (z, then) is multiplied in fp32, and pieces are what comes of it.

Saved for backward: x (and z, where it is another tensor), which others hold anyway, and M r numbers, or 6 M r.

Sizes: M rows (every leading dimension, flattened), K columns in, N out, rank r.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._tiles import product
from ds_fused.ops.common._triton import autocast_dtype, check_dtypes, rows_of, runs_kernels
from ds_fused.ops.mlp._pieces import LEFT, RIGHT, added, narrow_times, pieces, pieces_of_rows, times_narrow


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
    z = (x if lora_x is None else lora_x).to(lora_a.dtype)
    y = F.linear(x, weight, bias)
    return (y + F.linear(F.linear(z, lora_a), lora_b) * scaling).to(y.dtype)


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
        h = _within(x, lora_a, lora_x, scaling)
        ctx.save_for_backward(x, weight, lora_a, lora_b, lora_x, h)
        ctx.scaling = scaling
        return _outer(x, weight, lora_b, bias, h, scaling) if make is None else make()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_a, lora_b, lora_x, h = ctx.saved_tensors
        wants_x, wants_weight, wants_a, wants_b, wants_bias, wants_lora_x, *_ = ctx.needs_input_grad
        rows = rows_of(dy)
        dx = dweight = da = db = dbias = dlora_x = t = None
        if wants_a or wants_lora_x or (wants_x and lora_x is None):
            t = _times(rows, lora_b, ctx.scaling)
        if wants_x:
            dx = torch.mm(rows, weight)
            if lora_x is None:
                dx.addmm_(t, lora_a if lora_a.dtype == x.dtype else pieces_of_rows(lora_a, RIGHT))
            dx = dx.view(x.shape)
        if wants_weight:
            dweight = torch.mm(rows.t(), rows_of(x))
        if wants_b:
            db = _times(rows.t(), h, ctx.scaling) if lora_b.dtype == x.dtype else narrow_times(h, rows, turned=True)
        if wants_bias:
            dbias = rows.sum(0)
        z = rows_of(x if lora_x is None else lora_x)
        if t is not None and z.dtype != x.dtype:
            t = added(t)
        if wants_a:
            da = torch.mm(t.t(), z) if lora_a.dtype == z.dtype else narrow_times(t, z)
        if wants_lora_x:
            dlora_x = torch.mm(t, lora_a).view(x.shape)
        return dx, dweight, da, db, dbias, dlora_x, None, None


def _times(rows: Tensor, narrow: Tensor, scale: float) -> Tensor:
    """``scale * rows @ narrow``, of r columns, or what is to be multiplied again by pieces: 6 r."""
    if narrow.dtype != rows.dtype:
        return times_narrow(rows, narrow, scale)
    out = rows.new_empty(rows.shape[0], narrow.shape[1])
    product(out, rows, narrow, scale=scale)
    return out


def _within(x: Tensor, lora_a: Tensor, lora_x: Tensor | None, scaling: float) -> Tensor:
    """[..., K] -> [M, r]; or of an adapter in fp32, scaled, its pieces [M, 6 r].

    What is not in pieces is scaled by the product that it goes into: fp16 may not hold ``scaling`` times as much.
    """
    scale = 1.0 if lora_a.dtype == x.dtype else scaling
    h = _times(rows_of(x if lora_x is None else lora_x), lora_a.t(), scale)
    return h if h.dtype == x.dtype else pieces(h, LEFT)


def _outer(x: Tensor, weight: Tensor, lora_b: Tensor, bias: Tensor | None, h: Tensor, scaling: float) -> Tensor:
    rows = rows_of(x)
    y = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    if lora_b.dtype == x.dtype:
        y.addmm_(h, lora_b.t(), alpha=scaling)
    else:
        y.addmm_(h, pieces(lora_b, RIGHT).t())
    # no view to autograd, which lets nobody write in one that a Function returns, as `y += residual` does
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], weight.shape[0]))


def fits(x: Tensor, weight: Tensor, bias: Tensor | None, *adapter: Tensor) -> bool:
    """Whether the products take these tensors: of one dtype and device; or the adapter in fp32, all else in bf16.

    ``adapter``: A, B, and what A is given if it is not x. Not under autocast.
    """
    if any(t is not None and (t.dtype != x.dtype or t.device != x.device) for t in (weight, bias)):
        return False
    dtypes = {t.dtype for t in adapter}
    are_alike = dtypes == {x.dtype} or (
        x.dtype == torch.bfloat16 and dtypes == {torch.float32} and runs_kernels(x, *adapter)
    )
    return are_alike and all(t.device == x.device for t in adapter) and autocast_dtype(x) is None


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
    the adapter is given, such as a dropout of x; x where it is missing. The result is of x's dtype; ``lora_a``,
    ``lora_b`` and ``lora_x`` may be in fp32 where all else is in bf16, and lose no bit; of an infinity NaN may come
    there where fp32 has infinity. Under autocast, and for other mixtures of dtypes, it is the layers one by one, in
    PyTorch. A ValueError names a shape that does not fit.
    """
    _check_shapes(x, weight, lora_a, lora_b, bias, lora_x)
    check_numbers("lora_linear", scaling=scaling)
    adapter = (lora_a, lora_b) if lora_x is None else (lora_a, lora_b, lora_x)
    if not runs_kernels(x, weight, bias, *adapter) or not fits(x, weight, bias, *adapter):
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
