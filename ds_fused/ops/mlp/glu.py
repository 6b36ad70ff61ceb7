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

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import Kept, Ready, launch_ready, lie_alike, ready
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._rows import place, walk
from ds_fused.ops.common._triton import check_dtypes, lie_apart, like, rows_of, runs_kernels
from ds_fused.ops.mlp._gates import GLUForm, check_form, glu_back, glu_of, load_gate_and_up, store_gate_and_up

# elements per program and warps: one 16-byte load per thread and tensor in bf16. 0.9 % from best forward and 0.5 %
# backward at 8192 x 14336 on H100 (benchmarks/results/h100/tune.csv); interleaved columns are not measured yet
BLOCK = 2048
NUM_WARPS = 8

_launches: Kept[Ready] = Kept()


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
    gate, up = load_gate_and_up(gate_ptr, up_ptr, first, n_cols, INTERLEAVED, BLOCK)
    y = glu_of(gate, up, ACT, ALPHA, LIMIT, OFFSET)
    cols = first + tl.arange(0, BLOCK)
    tl.store(y_ptr + row * n_cols + cols, y, mask=cols < n_cols)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr,  # [N, D]; OVERWRITES_DY: becomes y
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
    HALVES: tl.constexpr, WANTS_DGATE: tl.constexpr, WANTS_DUP: tl.constexpr, OVERWRITES_DY: tl.constexpr,
    FLAT: tl.constexpr, BLOCK: tl.constexpr,
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
    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=cols < n_cols, other=0.0).to(tl.float32)
    gate, up = load_gate_and_up(gate_ptr, up_ptr, first, n_cols, INTERLEAVED, BLOCK)
    dgate, dup, y = glu_back(dy, gate, up, ACT, ALPHA, LIMIT, OFFSET)
    if OVERWRITES_DY:
        tl.store(dy_ptr + row * dy_stride + cols, y, mask=cols < n_cols)
    store_gate_and_up(dgate_ptr, dup_ptr, dgate, dup, first, n_cols, WANTS_DGATE, WANTS_DUP, INTERLEAVED, BLOCK)


def glu_fwd(gate: Tensor, up: Tensor | None, form: GLUForm, interleaved: bool = False) -> Tensor:
    """[..., D] x 2 -> [..., D]; without up, gate is [..., 2D] and holds both, as halves or in alternate columns."""
    if up is None:
        *sizes, width = gate.shape
        y = torch.empty(*sizes, width // 2, dtype=gate.dtype, device=gate.device)
        tensors, which, halves = (gate,), (0, 0), not interleaved
    else:
        y = like(gate, None if up.dtype == gate.dtype else torch.promote_types(gate.dtype, up.dtype))
        tensors, which, halves = (gate, up), (0, 1), False
    key = _key(tensors, form, interleaved, up is None)
    it = _launches.get(key)
    if it is None:
        way = walk(y.shape, BLOCK, *tensors, by_row=halves)
        if not way.programs:
            return y
        it = ready(
            _glu_fwd_kernel, (way.programs,),
            *[way.strides[i] for i in which], way.n_cols,
            ACT=form.act, ALPHA=form.alpha, LIMIT=form.limit, OFFSET=form.offset, INTERLEAVED=interleaved,
            HALVES=halves, FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        tensors = _walked(tensors, way.tensors, key, it)
    launch_ready(it, *[tensors[i] for i in which], y)
    return y


def glu_bwd(
    dy: Tensor,
    gate: Tensor,
    up: Tensor | None,
    dgate: Tensor | None,
    dup: Tensor | None,
    form: GLUForm,
    interleaved: bool = False,
    overwrite_dy: bool = False,
) -> None:
    """dy [..., D]; writes dgate and dup, as gate and up. None: not wanted, or of up that gate holds both.

    ``overwrite_dy``: y is written over dy. What is written over lies as rows of its own.
    """
    if up is None:
        wants_dgate = wants_dup = True
        tensors, which, halves = (dy, gate, dgate), (0, 1, 1, 2, 2), not interleaved
    else:
        wants_dgate, wants_dup = dgate is not None, dup is not None
        # what is not wanted is not written, and lends a pointer only. New tensors are rows in place
        tensors = dy, gate, up, dgate if wants_dgate else dup, dup if wants_dup else dgate
        which, halves = (0, 1, 2, 3, 4), False
    key = _key(tensors, form, interleaved, up is None, wants_dgate, wants_dup, overwrite_dy)
    it = _launches.get(key)
    if it is None:
        way = walk(dy.shape, BLOCK, *tensors, by_row=halves)
        if not way.programs:
            return
        it = ready(
            _glu_bwd_kernel, (way.programs,),
            *[way.strides[i] for i in which], way.n_cols,
            ACT=form.act, ALPHA=form.alpha, LIMIT=form.limit, OFFSET=form.offset, INTERLEAVED=interleaved,
            HALVES=halves, WANTS_DGATE=wants_dgate, WANTS_DUP=wants_dup, OVERWRITES_DY=overwrite_dy,
            FLAT=way.flat, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        tensors = _walked(tensors, way.tensors, key, it)
    launch_ready(it, *[tensors[i] for i in which])


def glu_again(dy: Tensor, gate_up: Tensor, form: GLUForm, interleaved: bool = False) -> None:
    """For a layer that is computed again in its backward: y is written over dy, and its gradient over gate_up.

    dy [N, D] and gate_up [N, 2D] are contiguous, and nobody's but the caller's. One pass: 3 reads and 3 writes for each
    element of y, where forward and backward are 5 reads and 3 writes.
    """
    assert dy.is_contiguous() and gate_up.is_contiguous()
    if runs_kernels(dy, gate_up):
        glu_bwd(dy, gate_up, None, gate_up, None, form, interleaved, overwrite_dy=True)
        return
    act, *rest = form
    options = dict(zip(("alpha", "limit", "offset"), rest, strict=True))
    with torch.enable_grad():
        leaf = gate_up.detach().requires_grad_()
        y = glu_reference(leaf, None, act, interleaved=interleaved, **options)
    (dgate_up,) = torch.autograd.grad(y, leaf, dy)
    gate_up.copy_(dgate_up)
    dy.copy_(y.detach())


def _key(tensors: tuple[Tensor, ...], *facts: object) -> tuple[object, ...] | None:
    """What a launch over these tensors follows from."""
    if torch.compiler.is_compiling():
        return None
    return tensors[0].shape, *[x.stride() for x in tensors], *facts, BLOCK, NUM_WARPS


def _walked(
    tensors: tuple[Tensor, ...], rows: tuple[Tensor, ...], key: tuple[object, ...] | None, it: Ready
) -> tuple[Tensor, ...]:
    """What the launch takes. It is kept where rows lie where the tensors do, which then are as good."""
    if lie_alike(tensors, rows):
        _launches.keep(key, it)
    return rows


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
        overwrite = _overwrites(ctx) and gate.data_ptr() != up.data_ptr()
        wants = zip((gate, up), ctx.needs_input_grad[:2], strict=True)
        dgate, dup = (_room(x, overwrite) if wanted else None for x, wanted in wants)
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
        overwrite = _overwrites(ctx)
        dgate_up = _room(gate_up, overwrite)
        glu_bwd(dy, gate_up, None, dgate_up, None, ctx.form, ctx.interleaved)
        if overwrite:
            torch.autograd.graph.increment_version(gate_up)
        return dgate_up, None, None, None


def _overwrites(ctx) -> bool:
    """Not in a backward that keeps its graph (retain_graph), for another one that reads the same again."""
    return ctx.overwrite and not torch._C._autograd._get_current_graph_task_keep_graph()


def _room(x: Tensor, overwrite: bool) -> Tensor:
    """Where the gradient of x goes: over x itself, if that is allowed and x is memory of its own, seen as rows."""
    if overwrite:
        rows = rows_of(x)
        if rows.data_ptr() == x.data_ptr() and lie_apart(rows):
            return x.detach()
    return like(x)


def _check(gate: Tensor, up: Tensor | None, form: GLUForm, interleaved: bool) -> None:
    check_form("glu", form)
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
    afterwards, as the outputs of two projections (a leaf, such as a parameter, would be lost). A backward with
    ``retain_graph`` does not, nor does a compiled graph, which sees to its own memory.
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
