"""gated_rms_norm's kernels for groups too wide for registers, and the steps that they share with those of whole groups.

A wide group is walked in blocks, twice (the second walk hits L2). Backward, a program adds its part of dweight up in
memory, row by row.

Sizes: N rows, G groups of C columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ds_fused.ops.common._sigmoid import sigmoid_and_slope
from ds_fused.ops.common._sums import add_to


@triton.jit
def act_and_slope(gate, ACT: tl.constexpr):
    """act(gate) and act'(gate), both in fp32."""
    s, ds = sigmoid_and_slope(gate)
    if ACT == "silu":
        return gate * s, s + gate * ds
    return s, ds


@triton.jit
def y_of(
    hat, act, weight_ptr, cols, mask, DTYPE: tl.constexpr,
    GATE_FIRST: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr,
):  # fmt: skip
    """y in fp32, rounded on the way where PyTorch rounds. DTYPE: that of x."""
    y = hat
    if CAST_BEFORE:
        y = y.to(DTYPE).to(tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
        y *= weight.to(tl.float32)
        # two dtypes promote to fp32, whichever they are
        if CAST_BEFORE and not GATE_FIRST and weight.dtype == DTYPE:
            y = y.to(DTYPE).to(tl.float32)
    if not GATE_FIRST:
        y *= act
    return y


@triton.jit
def _gated_rms_norm_fwd_walk_kernel(
    x_ptr,  # [N, G, C]
    gate_ptr,  # [N, G, C]
    weight_ptr,  # [G, C]
    y_ptr,  # [N, G, C]
    rstd_ptr,  # [N, G]
    x_stride,
    gate_stride,
    n_groups,
    n_cols,
    eps,
    GATE_FIRST: tl.constexpr, CAST_BEFORE: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """One group that is too wide for registers."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    row, group = pid // n_groups, pid % n_groups
    squares = tl.zeros((BLOCK_COLS,), tl.float32)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + tl.arange(0, BLOCK_COLS) < n_cols
        cols = group * n_cols + start + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if GATE_FIRST:
            gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
            act, _ = act_and_slope(gate, ACT)
            x *= act
        squares += x * x
    rstd = tl.rsqrt(tl.sum(squares) / n_cols + eps)
    tl.store(rstd_ptr + pid, rstd)
    for start in range(0, n_cols, BLOCK_COLS):
        mask = start + tl.arange(0, BLOCK_COLS) < n_cols
        cols = group * n_cols + start + tl.arange(0, BLOCK_COLS)
        x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
        act, _ = act_and_slope(gate, ACT)
        if GATE_FIRST:
            x *= act
        y = y_of(x * rstd, act, weight_ptr, cols, mask, x_ptr.dtype.element_ty, GATE_FIRST, CAST_BEFORE, HAS_WEIGHT)
        tl.store(y_ptr + row * (n_groups * n_cols) + cols, y, mask=mask)


@triton.jit
def weight_or_one(weight_ptr, cols, mask, HAS_WEIGHT: tl.constexpr):
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    else:
        weight = tl.full(cols.shape, 1.0, tl.float32)
    return weight


@triton.jit
def load_bwd(dy_ptr, x_ptr, gate_ptr, dy_at, x_at, gate_at, mask):
    """dy, x and the gate, as they are."""
    dy = tl.load(dy_ptr + dy_at, mask=mask, other=0.0)
    x = tl.load(x_ptr + x_at, mask=mask, other=0.0)
    gate = tl.load(gate_ptr + gate_at, mask=mask, other=0.0)
    return dy, x, gate


@triton.jit
def dweight_bwd(dy, x, gate, rstd, GATE_FIRST: tl.constexpr, ACT: tl.constexpr, AGAIN: tl.constexpr):
    """What dweight gets, in fp32: weight times that, summed over a group, is the gradient along what was normalised.

    AGAIN: by other steps than store_bwd's, or the compiler would keep act(gate) and its slope for that in registers.
    """
    gate = gate.to(tl.float32)
    if AGAIN:
        act = 1.0 / (1.0 + tl.exp(-gate))
        if ACT == "silu":
            act *= gate
    else:
        act, _ = act_and_slope(gate, ACT)
    dy, x = dy.to(tl.float32), x.to(tl.float32)
    if GATE_FIRST:
        return dy * (x * act * rstd)
    return dy * act * (x * rstd)


@triton.jit
def store_bwd(
    dx_ptr, dgate_ptr, at, mask, dy, x, gate, weight, rstd, mean,
    GATE_FIRST: tl.constexpr, ACT: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_DGATE: tl.constexpr,
):  # fmt: skip
    """dx and dgate, those wanted. mean: that of weight * dweight_bwd over the group."""
    dy, x = dy.to(tl.float32), x.to(tl.float32)
    act, slope = act_and_slope(gate.to(tl.float32), ACT)
    if GATE_FIRST:
        dseen = rstd * (dy * weight - x * act * rstd * mean)
        dx = dseen * act
        dgate = dseen * x * slope
    else:
        hat = x * rstd
        dx = rstd * (dy * act * weight - hat * mean)
        dgate = dy * weight * hat * slope
    if WANTS_DX:
        tl.store(dx_ptr + at, dx, mask=mask)
    if WANTS_DGATE:
        tl.store(dgate_ptr + at, dgate, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _gated_rms_norm_bwd_walk_kernel(
    dy_ptr,  # [N, G, C]
    x_ptr,  # [N, G, C]
    gate_ptr,  # [N, G, C]
    weight_ptr,  # [G, C]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, G, C]
    dgate_ptr,  # [N, G, C]
    dweights_ptr,  # [programs of a group, G, C] fp32: this program's part of dweight, added to row by row
    dy_stride,
    x_stride,
    gate_stride,
    n_rows,
    n_groups,
    n_cols,
    GATE_FIRST: tl.constexpr, HAS_WEIGHT: tl.constexpr, ACT: tl.constexpr,
    WANTS_DX: tl.constexpr, WANTS_DGATE: tl.constexpr, WANTS_DWEIGHT: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    """Groups that are too wide for registers, one row after the other."""
    pid = tl.program_id(0).to(tl.int64)
    program, group = pid // n_groups, pid % n_groups
    width = n_groups * n_cols
    for row in range(program, n_rows, tl.num_programs(0).to(tl.int64) // n_groups):
        rstd = tl.load(rstd_ptr + row * n_groups + group)
        products = tl.zeros((BLOCK_COLS,), tl.float32)
        if WANTS_DX or (GATE_FIRST and WANTS_DGATE):
            for start in range(0, n_cols, BLOCK_COLS):
                mask = start + tl.arange(0, BLOCK_COLS) < n_cols
                cols = group * n_cols + start + tl.arange(0, BLOCK_COLS)
                weight = weight_or_one(weight_ptr, cols, mask, HAS_WEIGHT)
                dy, x, gate = load_bwd(
                    dy_ptr, x_ptr, gate_ptr,
                    row * dy_stride + cols, row * x_stride + cols, row * gate_stride + cols, mask,
                )  # fmt: skip
                products += weight * dweight_bwd(dy, x, gate, rstd, GATE_FIRST, ACT, False)
        mean = tl.sum(products) / n_cols

        for start in range(0, n_cols, BLOCK_COLS):
            mask = start + tl.arange(0, BLOCK_COLS) < n_cols
            cols = group * n_cols + start + tl.arange(0, BLOCK_COLS)
            weight = weight_or_one(weight_ptr, cols, mask, HAS_WEIGHT)
            dy, x, gate = load_bwd(
                dy_ptr, x_ptr, gate_ptr,
                row * dy_stride + cols, row * x_stride + cols, row * gate_stride + cols, mask,
            )  # fmt: skip
            if WANTS_DWEIGHT:
                dweight = dweight_bwd(dy, x, gate, rstd, GATE_FIRST, ACT, False)
                add_to(dweights_ptr + program * width + cols, dweight, mask, row == program)
            store_bwd(
                dx_ptr, dgate_ptr, row * width + cols, mask, dy, x, gate, weight, rstd, mean,
                GATE_FIRST, ACT, WANTS_DX, WANTS_DGATE,
            )  # fmt: skip
        # the next row's threads must see these sums
        tl.debug_barrier()
