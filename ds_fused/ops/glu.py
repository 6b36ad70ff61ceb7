"""Gated linear unit: ``y = act(gate) * up``, one pass forward and one pass back.

``act`` is ``"silu"`` (SwiGLU), ``"gelu_tanh"`` or ``"gelu"`` (GeGLU; the exact one, by erf), ``"relu"`` (ReGLU) or
``"relu2"`` (a squared ReLU as the gate; Shazeer 2020, arXiv 2002.05202, has the first three).

Gate and up may come as two tensors or as one that holds both, [..., 2D]: its halves (Phi3, GLM4), or with
``interleaved`` every other column (GPT-OSS). The gradient of one tensor is one tensor, written once.

With ``alpha``, ``limit`` and ``offset`` it is, rounding aside,

    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = gate * sigmoid(alpha * gate) * (up + offset)

GPT-OSS's form has alpha 1.702, limit 7 and offset 1; DeepSeek-V4 clamps only.

Saved for backward: ``gate`` and ``up``, which the projections before them hold anyway; act(gate) is computed again.
Traffic per element of y: forward 2 reads + 1 write, backward 3 reads + 2 writes (1 where gate or up is frozen).

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._once import once_differentiable
from ds_fused.ops._rows import place, walk
from ds_fused.ops._sigmoid import sigmoid_and_slope
from ds_fused.ops._triton import check_dtypes, lie_apart, like, rows_of, runs_kernels

ACTS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")

# elements per program and warps: one 16-byte load per thread and tensor in bf16. 0.9 % from best forward and 0.5 %
# backward at 8192 x 14336 on H100 (benchmarks/results/h100/tune.csv); interleaved columns are not measured yet
BLOCK = 2048
NUM_WARPS = 8


class GLUForm(NamedTuple):
    """What is computed, beside where gate and up lie."""

    act: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0


def glu_reference(
    gate: Tensor,
    up: Tensor | None = None,
    act: str = "silu",
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
    overwrite_inputs: bool = False,  # a permission that plain PyTorch makes no use of
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    if up is None:
        gate, up = (gate[..., 0::2], gate[..., 1::2]) if interleaved else gate.chunk(2, -1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if offset != 0.0:
        up = up + offset
    if act == "silu":
        return (F.silu(gate) if alpha == 1.0 else gate * torch.sigmoid(gate * alpha)) * up
    if act in ("relu", "relu2"):
        gate = F.relu(gate)
        return (gate if act == "relu" else gate.square()) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


@triton.jit
def _act_and_slope(x, ACT: tl.constexpr, ALPHA: tl.constexpr):
    """act(x) and act'(x), both in fp32."""
    if ACT == "silu":
        s, ds = sigmoid_and_slope(ALPHA * x)
        return x * s, s + ALPHA * x * ds
    if ACT == "gelu_tanh":
        # gelu_tanh(x) = x * sigmoid(2u) with u = sqrt(2/pi) * (x + 0.044715 x^3)
        s, ds = sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d2u = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * s, s + x * ds * d2u
    if ACT == "gelu":
        # gelu(x) = x * cdf(x) of the normal distribution
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return x * cdf, cdf + x * pdf
    # relu, relu2. A comparison that is false for NaN, which therefore stays
    relu = tl.where(x <= 0.0, 0.0, x)
    if ACT == "relu2":
        return relu * relu, 2.0 * relu
    return relu, tl.where(x <= 0.0, 0.0, 1.0)


@triton.jit
def _load_gate_and_up(gate_ptr, up_ptr, first, n_cols, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row, in fp32. INTERLEAVED: both lie at gate_ptr, and up_ptr is not read."""
    if INTERLEAVED:
        # one load in memory order, taken apart in registers
        cols = tl.arange(0, 2 * BLOCK)
        both = tl.load(gate_ptr + 2 * first + cols, mask=cols < 2 * (n_cols - first), other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (BLOCK, 2)))
    else:
        cols = first + tl.arange(0, BLOCK)
        mask = cols < n_cols
        gate = tl.load(gate_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(up_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return gate, up


@triton.jit
def _glu_fwd_kernel(
    gate_ptr,  # [N, D]; INTERLEAVED, HALVES: [N, 2D]
    up_ptr,  # [N, D]; not read where gate holds both
    y_ptr,  # [N, D]
    gate_stride,  # elements from one row to the next; y has no gaps
    up_stride,
    n_cols,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALVES: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = place(n_cols, FLAT, BLOCK)
    gate_ptr += row * gate_stride
    if HALVES:
        up_ptr = gate_ptr + n_cols
    else:
        up_ptr += row * up_stride
    gate, up = _load_gate_and_up(gate_ptr, up_ptr, first, n_cols, INTERLEAVED, BLOCK)
    if LIMIT is not None:
        # not tl.minimum, which may lose NaN
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    act, _ = _act_and_slope(gate, ACT, ALPHA)
    if OFFSET != 0.0:
        up += OFFSET
    cols = first + tl.arange(0, BLOCK)
    tl.store(y_ptr + row * n_cols + cols, act * up, mask=cols < n_cols)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr,  # [N, D]
    gate_ptr,  # [N, D]; INTERLEAVED, HALVES: [N, 2D]
    up_ptr,  # [N, D]; not read where gate holds both
    dgate_ptr,  # as gate
    dup_ptr,  # as up; not written where dgate holds both: a graph gives memory of its own to each name that is written
    dy_stride,  # elements from one row to the next
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    n_cols,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    HALVES: tl.constexpr, WANTS_DGATE: tl.constexpr, WANTS_DUP: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = place(n_cols, FLAT, BLOCK)
    gate_ptr += row * gate_stride
    dgate_ptr += row * dgate_stride
    if HALVES:
        up_ptr = gate_ptr + n_cols
        dup_ptr = dgate_ptr + n_cols
    else:
        up_ptr += row * up_stride
        dup_ptr += row * dup_stride
    cols = first + tl.arange(0, BLOCK)
    mask = cols < n_cols

    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    raw_gate, raw_up = _load_gate_and_up(gate_ptr, up_ptr, first, n_cols, INTERLEAVED, BLOCK)
    gate, up = raw_gate, raw_up
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    act, slope = _act_and_slope(gate, ACT, ALPHA)
    if OFFSET != 0.0:
        up += OFFSET
    dgate = dy * up * slope
    dup = dy * act
    if LIMIT is not None:
        # the limits themselves still pass a gradient, as torch.clamp's do; NaN passes none
        dgate = tl.where(raw_gate <= LIMIT, dgate, 0.0)
        dup = tl.where((raw_up <= LIMIT) & (raw_up >= -LIMIT), dup, 0.0)

    if INTERLEAVED:
        both_cols = tl.arange(0, 2 * BLOCK)
        both = tl.reshape(tl.join(dgate, dup), (2 * BLOCK,))
        tl.store(dgate_ptr + 2 * first + both_cols, both, mask=both_cols < 2 * (n_cols - first))
    else:
        if WANTS_DGATE:
            tl.store(dgate_ptr + cols, dgate, mask=mask)
        if WANTS_DUP:
            tl.store(dup_ptr + cols, dup, mask=mask)


def glu_fwd(gate: Tensor, up: Tensor | None, form: GLUForm, interleaved: bool = False) -> Tensor:
    """[..., D] x 2 -> [..., D]; without up, gate is [..., 2D] and holds both, as halves or in alternate columns."""
    if up is None:
        *sizes, width = gate.shape
        y = torch.empty(*sizes, width // 2, dtype=gate.dtype, device=gate.device)
        halves = not interleaved
        way = walk(y.shape, BLOCK, gate, by_row=halves)
    else:
        halves = False
        y = like(gate, None if up.dtype == gate.dtype else torch.promote_types(gate.dtype, up.dtype))
        way = walk(y.shape, BLOCK, gate, up)
    if way.programs:
        launch(
            _glu_fwd_kernel, (way.programs,),
            way.tensors[0], way.tensors[-1], y, way.strides[0], way.strides[-1], way.n_cols,
            ACT=form.act, ALPHA=form.alpha, LIMIT=form.limit, OFFSET=form.offset, INTERLEAVED=interleaved,
            HALVES=halves, FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
    return y


def glu_bwd(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    dgate: Tensor | None,
    dup: Tensor | None,
    form: GLUForm,
    interleaved: bool = False,
) -> None:
    """dy [..., D]; writes dgate and dup, as gate and up. None: not wanted, or of up that gate holds both."""
    if up is None:
        halves = not interleaved
        wants_dgate = wants_dup = True
        way = walk(dy.shape, BLOCK, dy, gate, dgate, by_row=halves)
        which = (0, 1, 1, 2, 2)
    else:
        halves = False
        wants_dgate, wants_dup = dgate is not None, dup is not None
        # what is not wanted is not written, and lends a pointer only. New tensors are rows in place
        way = walk(dy.shape, BLOCK, dy, gate, up, dup if dgate is None else dgate, dgate if dup is None else dup)
        which = (0, 1, 2, 3, 4)
    if way.programs:
        launch(
            _glu_bwd_kernel, (way.programs,),
            *[way.tensors[i] for i in which], *[way.strides[i] for i in which], way.n_cols,
            ACT=form.act, ALPHA=form.alpha, LIMIT=form.limit, OFFSET=form.offset, INTERLEAVED=interleaved,
            HALVES=halves, WANTS_DGATE=wants_dgate, WANTS_DUP=wants_dup, FLAT=way.flat, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip


class GLUFunction(torch.autograd.Function):
    """Gate and up apart; the launchers flatten, where autograd does not see it (see RMSNormFunction)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, form: GLUForm, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.form, ctx.overwrite = form, overwrite
        return glu_fwd(gate, up, form)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        gate, up = ctx.saved_tensors
        overwrite = ctx.overwrite and gate.data_ptr() != up.data_ptr()
        dgate, dup = (
            _room(x, overwrite) if wanted else None for x, wanted in zip((gate, up), ctx.needs_input_grad, strict=False)
        )
        glu_bwd(dy, gate, up, dgate, dup, ctx.form)
        if overwrite:
            torch.autograd.graph.increment_version((gate, up))
        return dgate, dup, None, None


class PackedGLUFunction(torch.autograd.Function):
    """Gate and up in one tensor [..., 2D], which has one gradient."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, form: GLUForm, interleaved: bool, overwrite: bool) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.form, ctx.interleaved, ctx.overwrite = form, interleaved, overwrite
        return glu_fwd(gate_up, None, form, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (gate_up,) = ctx.saved_tensors
        dgate_up = _room(gate_up, ctx.overwrite)
        glu_bwd(dy, gate_up, None, dgate_up, None, ctx.form, ctx.interleaved)
        if ctx.overwrite:
            torch.autograd.graph.increment_version(gate_up)
        return dgate_up, None, None, None


def _room(x: Tensor, overwrite: bool) -> Tensor:
    """Where the gradient of x goes: over x itself, if that is allowed and x is memory of its own, seen as rows."""
    if overwrite:
        rows = rows_of(x)
        if rows.data_ptr() == x.data_ptr() and lie_apart(rows):
            return x.detach()
    return like(x)


def _check(gate: Tensor, up: Tensor | None, form: GLUForm, interleaved: bool) -> None:
    if form.act not in ACTS:
        raise ValueError(f"glu: act is {form.act!r}; known are {', '.join(ACTS)}")
    if form.alpha != 1.0 and form.act != "silu":
        raise ValueError(f"glu: alpha is {form.alpha} and act {form.act!r}; only silu has an alpha, others need 1.0")
    if form.limit is not None and not form.limit > 0.0:
        raise ValueError(f"glu: limit is {form.limit}; it must be above 0, or None for no clamp")
    if up is None:
        if gate.ndim == 0 or gate.shape[-1] % 2:
            raise ValueError(
                f"glu: without up, gate must hold both, an even number of columns [..., 2D]; got {tuple(gate.shape)}"
            )
    elif interleaved:
        raise ValueError("glu: interleaved is for gate and up in one tensor, and up came as another; pass up=None")
    elif gate.shape != up.shape:
        raise ValueError(f"glu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")


def glu(
    gate: Tensor,  # [..., D], or without up [..., 2D]
    up: Tensor | None = None,  # [..., D]
    act: str = "silu",
    *,
    interleaved: bool = False,
    alpha: float = 1.0,
    limit: float | None = None,
    offset: float = 0.0,
    overwrite_inputs: bool = False,
) -> Tensor:
    """``act(gate) * up``, [..., D]; halves of a ``chunk`` are read in place.

    Without ``up``, ``gate`` holds both: gate in its first half and up in its second, or with ``interleaved`` gate in
    columns 0, 2, ... and up in 1, 3, ... It then gets one gradient, which nothing has to put together.
    ``alpha``: silu becomes ``x * sigmoid(alpha * x)``. ``limit``: gate is clamped from above, up from both sides, with
    the gradients of ``torch.clamp``. ``offset`` is added to up, after the clamp.
    ``overwrite_inputs``: the backward may write the gradients over gate and up. Only for tensors that nobody reads
    afterwards, as the outputs of two projections; a second backward is then autograd's error. A compiled graph, which
    sees to its own memory, makes no use of it.
    """
    form = GLUForm(act, alpha, limit, offset)
    _check(gate, up, form, interleaved)
    if not runs_kernels(gate, up):
        return glu_reference(gate, up, act, interleaved=interleaved, alpha=alpha, limit=limit, offset=offset)
    check_dtypes("glu", gate=gate, up=up)
    overwrite = overwrite_inputs and not torch.compiler.is_compiling()
    if up is None:
        return PackedGLUFunction.apply(gate, form, interleaved, overwrite)
    return GLUFunction.apply(gate, up, form, overwrite)
