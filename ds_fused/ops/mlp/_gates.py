"""What glu and experts share: the forms of a gated linear unit, and its elements, forward and backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ds_fused.ops.common._options import check_numbers, check_numbers_or_none
from ds_fused.ops.common._sigmoid import sigmoid_and_slope

ACTS = ("silu", "gelu_tanh", "gelu", "relu", "relu2")


class GLUForm(NamedTuple):
    """What is computed, beside where gate and up lie."""

    act: str = "silu"
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0


def check_form(op: str, form: GLUForm) -> None:
    if form.act not in ACTS:
        raise ValueError(f"{op}: act is {form.act!r}; known are {', '.join(ACTS)}")
    check_numbers(op, alpha=form.alpha, offset=form.offset)
    check_numbers_or_none(op, limit=form.limit)
    if form.alpha != 1.0 and form.act != "silu":
        raise ValueError(f"{op}: alpha is {form.alpha} and act {form.act!r}; only silu has an alpha, others need 1.0")
    if form.limit is not None and not form.limit > 0.0:
        raise ValueError(f"{op}: limit is {form.limit}; it must be above 0, or None for no clamp")


@triton.jit
def load_gate_and_up(gate_ptr, up_ptr, first, n_cols, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr):
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
def store_gate_and_up(
    gate_ptr, up_ptr, gate, up, first, n_cols,
    STORES_GATE: tl.constexpr, STORES_UP: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where load_gate_and_up reads. INTERLEAVED: both are stored."""
    if INTERLEAVED:
        cols = tl.arange(0, 2 * BLOCK)
        both = tl.reshape(tl.join(gate, up), (2 * BLOCK,))
        tl.store(gate_ptr + 2 * first + cols, both, mask=cols < 2 * (n_cols - first))
    else:
        cols = first + tl.arange(0, BLOCK)
        if STORES_GATE:
            tl.store(gate_ptr + cols, gate, mask=cols < n_cols)
        if STORES_UP:
            tl.store(up_ptr + cols, up, mask=cols < n_cols)


@triton.jit
def glu_of(gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """act(gate) * up, all in fp32."""
    gate, up = _bounded(gate, up, LIMIT, OFFSET)
    act, _ = _act_and_slope(gate, ACT, ALPHA)
    return act * up


@triton.jit
def glu_back(dy, gate, up, ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    """dgate, dup, and act(gate) * up again."""
    raw_gate, raw_up = gate, up
    gate, up = _bounded(gate, up, LIMIT, OFFSET)
    act, slope = _act_and_slope(gate, ACT, ALPHA)
    dgate = dy * up * slope
    dup = dy * act
    if LIMIT is not None:
        # the limits themselves still pass a gradient, as torch.clamp's do; NaN passes none
        dgate = tl.where(raw_gate <= LIMIT, dgate, 0.0)
        dup = tl.where((raw_up <= LIMIT) & (raw_up >= -LIMIT), dup, 0.0)
    return dgate, dup, act * up


@triton.jit
def _bounded(gate, up, LIMIT: tl.constexpr, OFFSET: tl.constexpr):
    if LIMIT is not None:
        # not tl.minimum, which may lose NaN
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    if OFFSET != 0.0:
        up += OFFSET
    return gate, up


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
