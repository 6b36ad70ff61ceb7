"""Gated linear unit: ``y = act(gate) * up``, one pass forward and one pass back.

``act`` is ``"silu"`` (SwiGLU), ``"gelu_tanh"`` or ``"gelu"`` (GeGLU; the exact one, by erf).

Saved for backward: ``gate`` and ``up``, which the projections before them hold anyway; act(gate) is computed again.
Traffic per element: forward 2 reads + 1 write, backward 3 reads + 2 writes.

Sizes: N rows (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ds_fused.ops._triton import cdiv, check_dtypes, on_device, row_stride, rows_of, runs_kernels

ACTS = ("silu", "gelu_tanh", "gelu")

# elements per program and warps: one 16-byte load per thread and tensor in bf16. 0.9 % from best forward and 0.5 %
# backward at 8192 x 14336 on H100 (benchmarks/results/h100/tune.csv)
BLOCK = 2048
NUM_WARPS = 8


def glu_reference(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    if act == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if act == "gelu_tanh" else "none") * up


@triton.jit
def _sigmoid_and_slope(x):
    # s * (1 - s) would keep few bits of a slope where s is near 1, and gelu_tanh multiplies it by up to 3 x^2
    q = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + q)
    return tl.where(x < 0.0, q * r, r), q * r * r


@triton.jit
def _act_and_slope(x, ACT: tl.constexpr):
    """act(x) and act'(x), both in fp32."""
    if ACT == "silu":
        s, ds = _sigmoid_and_slope(x)
        return x * s, s + x * ds
    if ACT == "gelu_tanh":
        # gelu_tanh(x) = x * sigmoid(2u) with u = sqrt(2/pi) * (x + 0.044715 x^3)
        s, ds = _sigmoid_and_slope(1.5957691216057308 * (x + 0.044715 * x * x * x))
        d2u = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        return x * s, s + x * ds * d2u
    # gelu(x) = x * cdf(x) of the normal distribution
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    pdf = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return x * cdf, cdf + x * pdf


@triton.jit
def _place(n_cols, FLAT: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row and columns. FLAT: everything is one row, whose columns may need int64."""
    pid = tl.program_id(0).to(tl.int64)
    if FLAT:
        row = tl.zeros((), tl.int64)
        cols = pid * BLOCK + tl.arange(0, BLOCK)
    else:
        blocks = tl.cdiv(n_cols, BLOCK)
        row = pid // blocks
        cols = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    return row, cols


@triton.jit
def _glu_fwd_kernel(
    gate_ptr,  # [N, D]
    up_ptr,
    y_ptr,
    gate_stride,  # elements from one row to the next; y has no gaps
    up_stride,
    n_cols,
    ACT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols = _place(n_cols, FLAT, BLOCK)
    mask = cols < n_cols

    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    act, _ = _act_and_slope(gate, ACT)
    tl.store(y_ptr + row * n_cols + cols, act * up, mask=mask)


@triton.jit
def _glu_bwd_kernel(
    dy_ptr,  # [N, D]
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,  # elements from one row to the next; dgate and dup have no gaps
    gate_stride,
    up_stride,
    n_cols,
    ACT: tl.constexpr, FLAT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, cols = _place(n_cols, FLAT, BLOCK)
    mask = cols < n_cols

    dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    act, slope = _act_and_slope(gate, ACT)
    tl.store(dgate_ptr + row * n_cols + cols, dy * up * slope, mask=mask)
    tl.store(dup_ptr + row * n_cols + cols, dy * act, mask=mask)


def _layout(*tensors: Tensor) -> tuple[bool, int, int]:
    """(whether rows have no gaps, so that all of it is one row; columns of a row; programs)."""
    n, d = tensors[0].shape
    if all(tensor.is_contiguous() for tensor in tensors):
        return True, n * d, cdiv(n * d, BLOCK)
    return False, d, n * cdiv(d, BLOCK)


def glu_fwd(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """[N, D], [N, D] -> [N, D]."""
    y = torch.empty(gate.shape, dtype=torch.promote_types(gate.dtype, up.dtype), device=gate.device)
    flat, n_cols, programs = _layout(gate, up)
    if programs:
        with on_device(gate):
            _glu_fwd_kernel[(programs,)](
                gate,
                up,
                y,
                row_stride(gate),
                row_stride(up),
                n_cols,
                ACT=act,
                FLAT=flat,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
    return y


def glu_bwd(dy: Tensor, gate: Tensor, up: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """[N, D] x 3 -> dgate [N, D], dup [N, D]."""
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    flat, n_cols, programs = _layout(dy, gate, up)
    if programs:
        with on_device(gate):
            _glu_bwd_kernel[(programs,)](
                dy,
                gate,
                up,
                dgate,
                dup,
                row_stride(dy),
                row_stride(gate),
                row_stride(up),
                n_cols,
                ACT=act,
                FLAT=flat,
                BLOCK=BLOCK,
                num_warps=NUM_WARPS,
            )
    return dgate, dup


class GLUFunction(torch.autograd.Function):
    """Autograd around the two launchers; sees only [N, D]."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, act: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return glu_fwd(gate, up, act)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = glu_bwd(rows_of(dy), gate, up, ctx.act)
        return dgate, dup, None


def glu(gate: Tensor, up: Tensor, act: str = "silu") -> Tensor:
    """``act(gate) * up`` for tensors of one shape [..., D]; halves of a ``chunk`` are read in place."""
    if gate.shape != up.shape:
        raise ValueError(f"glu: gate {tuple(gate.shape)} and up {tuple(up.shape)} must have one shape")
    if act not in ACTS:
        raise ValueError(f"glu: act is {act!r}; known are {', '.join(ACTS)}")
    if not runs_kernels(gate, up):
        return glu_reference(gate, up, act)
    check_dtypes("glu", gate=gate, up=up)
    y = GLUFunction.apply(rows_of(gate), rows_of(up), act)
    return y.view(gate.shape)
