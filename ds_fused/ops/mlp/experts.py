"""The experts of a mixture: of each token the weighted sum of what the k experts of its choice make of it,

    y = sum over choices c of weights[c] * down[e] @ (act(gate) * up)      gate, up = gate_up[e] @ x      e = ids[c]

``act`` and the options of the gate are those of glu: silu, gelu ..., halves or ``interleaved``, alpha, limit, offset.

    forward     pairs (token, choice) sorted by expert                                            _routes.py
                h [N, 2I] = x[tokens] @ gate_up[e].T    a [N, I] = glu(h)    z [N, H] = a @ down[e].T
                y [T, H] = sum of weights * z over the places of a token's choices
    backward    da [N, I] = dy[tokens] @ down[e]
                dh = glu's backward of weights * da,   dweights = sum(da * a),   a again          in one pass over da, h
                ddown[e] = dy[tokens].T @ (weights * a)                  dgate_up[e] = dh.T @ x[tokens]
                dx = sum over a token's choices of dh @ gate_up[e]

Rows of x and dy are gathered by the products that read them or, where tiles are copied (_grouped_products_tma.py),
brought into order before, x once more in the backward. Sums are fp32, nothing is added by atomics, and the host waits
for nothing: it launches for as many tiles of rows as there could be.

Two nodes, x to h and h to y, so that a checkpoint may keep the one and leave out the other.
Saved for backward: x, the weights of experts and of choices, h, and 12 N bytes of routes.
Work: 6 NHI FLOPs forward, 12 NHI backward. Traffic beside the products' own: forward 3 NI of glu and NH + TH of the
sum, backward 6 NI and NH + TH; for the order NH + TH forward and twice that backward.

Sizes: T tokens (leading dimensions, flattened), k choices each, N = T k pairs, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.common._ids import flat_ids
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._triton import autocast_dtype, check_dtypes, is_vmapped, rows_of, runs_kernels
from ds_fused.ops.mlp._experts_kernels import gate_bwd, sum_of_choices
from ds_fused.ops.mlp._gates import GLUForm, check_form
from ds_fused.ops.mlp._grouped_products import Way, in_order, product_of_experts, product_of_rows, way_of
from ds_fused.ops.mlp._routes import Routes, routes_of
from ds_fused.ops.mlp.glu import glu_fwd, glu_reference

# of a part: the node around what it computes, or around the result of a function
Make = Callable[["Callable[[], Tensor] | None"], Tensor]


def experts_reference(
    x: Tensor,  # [..., H]
    gate_up: Tensor,  # [E, 2I, H]
    down: Tensor,  # [E, H, I]
    ids: Tensor,  # [..., k]
    weights: Tensor,  # [..., k]
    act: str = "silu",
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    gate = {"act": act, "interleaved": interleaved, "alpha": alpha, "limit": limit, "offset": offset}

    def expert(rows: Tensor, into: Tensor, back: Tensor) -> Tensor:
        return F.linear(glu_reference(F.linear(rows, into), **gate), back)

    if torch.compiler.is_compiling() or is_vmapped():
        # neither knows how many rows an expert has: each sees all
        each = x.new_zeros(*ids.shape, x.shape[-1])
        for e, weights_of_e in enumerate(zip(gate_up, down, strict=True)):
            each = torch.where((ids == e)[..., None], expert(x, *weights_of_e)[..., None, :], each)
    else:
        flat, n_choices = ids.reshape(-1), ids.shape[-1]
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=gate_up.shape[0] + 1).tolist()
        *rows, nobodys = x.reshape(-1, x.shape[-1])[order // n_choices].split(counts)
        done = [expert(*each) for each in zip(rows, gate_up, down, strict=True)]
        each = torch.cat([*done, torch.zeros_like(nobodys, dtype=done[0].dtype)])
        each = each[order.argsort()].view(*ids.shape, x.shape[-1])
    wide = torch.promote_types(each.dtype, torch.float32)
    return (each.to(wide) * weights[..., None]).sum(-2).to(x.dtype)


class ExpertsInFunction(torch.autograd.Function):
    """x [T, H] and gate_up [E, 2I, H] to h [N, 2I] by places: what gates are made of.

    Of x's dtype is dx alone: under autocast it is wider than that of the products, the experts' own. ``make``: where
    the result comes from, if not from the product.
    """

    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, way: Way, routes: Routes, make: Callable[[], Tensor] | None) -> Tensor:
        rows = x.to(gate_up.dtype)
        ctx.save_for_backward(rows, gate_up, *routes)
        ctx.how = x.dtype, way
        if make is not None:
            return make()
        return product_of_rows(in_order(rows, routes, way), gate_up, routes, way, gathers=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate_up, *routes = ctx.saved_tensors
        routes, (dtype, way) = Routes(*routes), ctx.how
        dx = dgate_up = None
        if ctx.needs_input_grad[0]:
            z = product_of_rows(dh, gate_up, routes, way, transposed=True)
            dx = sum_of_choices(z, routes, None, rows.shape[0], dtype)
            del z
        if ctx.needs_input_grad[1]:
            dgate_up = product_of_experts(dh, in_order(rows, routes, way), routes, way, gate_up)
        return dx, dgate_up, None, None, None


class ExpertsOutFunction(torch.autograd.Function):
    """h [N, 2I] by places, down [E, H, I] and weights [N] by pairs to y [T, H], of that dtype. ``make`` as above."""

    @staticmethod
    def forward(
        ctx,
        h: Tensor,
        down: Tensor,
        weights: Tensor,
        n_tokens: int,
        dtype: torch.dtype,
        form: GLUForm,
        interleaved: bool,
        way: Way,
        routes: Routes,
        make: Callable[[], Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(h, down, weights, *routes)
        ctx.how = way, form, interleaved
        if make is not None:
            return make()
        z = product_of_rows(glu_fwd(h, None, form, interleaved), down, routes, way)
        return sum_of_choices(z, routes, weights, n_tokens, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        h, down, weights, *routes = ctx.saved_tensors
        routes, (way, form, interleaved) = Routes(*routes), ctx.how
        wants_dh, wants_ddown, wants_dweights, *_ = ctx.needs_input_grad
        dy = in_order(rows_of(dy.to(down.dtype)), routes, way)
        da = product_of_rows(dy, down, routes, way, gathers=True, transposed=True)
        dh, dweights = gate_bwd(
            da, h, weights, routes, form, interleaved,
            wants_dh=wants_dh, wants_a=wants_ddown, wants_dweights=wants_dweights,
        )  # fmt: skip
        # da holds weights * a by now
        ddown = product_of_experts(da, dy, routes, way, down, swapped=True) if wants_ddown else None
        return dh, ddown, dweights, *[None] * 7


def _check(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, form: GLUForm) -> None:
    op = "experts"
    check_form(op, form)
    if gate_up.ndim != 3 or down.ndim != 3 or gate_up.shape != (down.shape[0], 2 * down.shape[2], down.shape[1]):
        raise ValueError(
            f"{op}: gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} must be [E, 2I, H] and [E, H, I]"
        )
    if 0 in down.shape:
        raise ValueError(f"{op}: down is {tuple(down.shape)}; there must be an expert, and no side may be 0")
    if x.ndim == 0 or x.shape[-1] != down.shape[1]:
        raise ValueError(f"{op}: x {tuple(x.shape)} must be [..., {down.shape[1]}], as wide as the experts")
    if ids.ndim == 0 or ids.shape[:-1] != x.shape[:-1] or ids.shape[-1] == 0:
        raise ValueError(
            f"{op}: ids {tuple(ids.shape)} must be the choices of each token of x, {tuple(x.shape[:-1])} + (k,), k >= 1"
        )
    if weights.shape != ids.shape:
        raise ValueError(f"{op}: weights {tuple(weights.shape)} must be one for each of ids {tuple(ids.shape)}")
    for name, tensor in (("gate_up", gate_up), ("down", down), ("ids", ids), ("weights", weights)):
        if tensor.device != x.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, x on {x.device}; they must share a device")
    if autocast_dtype(x) is None and not x.dtype == gate_up.dtype == down.dtype:
        raise ValueError(
            f"{op}: x is {x.dtype}, gate_up {gate_up.dtype}, down {down.dtype}; outside autocast they must be the same"
        )
    if ids.numel() >= 2**31:
        raise ValueError(f"{op}: {ids.numel()} choices of all tokens; they are counted in int32")


def experts(
    x: Tensor,  # [..., H]
    gate_up: Tensor,  # [E, 2I, H]
    down: Tensor,  # [E, H, I]
    ids: Tensor,  # [..., k] int64 or int32, in [0, E]
    weights: Tensor,  # [..., k]
    act: str = "silu",
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
) -> Tensor:
    """Each token's sum, weighted, of what the experts of its choice make of it: [..., H], of x's dtype.

    Expert e computes ``down[e] @ glu(gate_up[e] @ x, act=act, ...)``; the options are glu's. The gate stands in the
    first I rows of gate_up and up in the others, or with ``interleaved`` in every other one. Weights of experts that
    are stored [E, H, 2I] and [E, I, H] are passed as ``transpose(1, 2)``: nothing is copied. Gradients go to x, both
    weights of the experts and the weights of the choices; those of an expert that nobody chose are 0.

    A choice of E is nobody's and adds nothing, as where experts are spread over ranks. Any other id that is no expert's
    is an error: here on a CPU, on the device else.
    """
    return experts_by(
        at_once, x, gate_up, down, ids, weights, act,
        interleaved=interleaved, alpha=alpha, limit=limit, offset=offset,
    )  # fmt: skip


def at_once(make: Make) -> Tensor:
    """The result of a part of experts, computed."""
    return make(None)


def experts_by(
    call: Callable[[Make], Tensor],
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    act: str,
    *,
    interleaved: bool,
    **numbers: float | None,
) -> Tensor:
    """``experts``, whose two parts are what ``call`` makes of them: all of h, then y.

    A ``make(None)`` computes; ``make(result)`` is the same node around ``result()``.
    """
    form = GLUForm(act, **numbers)
    _check(x, gate_up, down, ids, weights, form)
    flat = flat_ids("experts", ids, gate_up.shape[0] + 1)
    if not runs_kernels(x, gate_up, down, weights):
        return experts_reference(x, gate_up, down, ids, weights, act, interleaved=interleaved, **numbers)
    check_dtypes("experts", x=x, gate_up=gate_up, down=down, weights=weights)
    if flat.shape[0] == 0:
        # nothing to compute, but gradients of zeros: of sums over nothing, for experts are gigabytes to read
        return x + (gate_up[:0].sum() + down[:0].sum() + weights.sum()).to(x.dtype)
    dtype = autocast_dtype(x) or x.dtype
    rows, gate_up, down, weights = rows_of(x), gate_up.to(dtype), down.to(dtype), weights.reshape(-1).contiguous()
    (n_tokens, _), n = rows.shape, flat.shape[0]
    way = way_of(n, down)
    routes = routes_of(flat, n // n_tokens, down.shape[0], way.tile_rows)
    h = call(lambda make: ExpertsInFunction.apply(rows, gate_up, way, routes, make))
    how = n_tokens, x.dtype, form, interleaved, way, routes
    y = call(lambda make: ExpertsOutFunction.apply(h, down, weights, *how, make))
    return y.view(x.shape)
