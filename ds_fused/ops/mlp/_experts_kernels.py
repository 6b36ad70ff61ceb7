"""Kernels of the experts of a mixture beside their products: the sums over a token's choices, and the gates' backward.

Sizes: T tokens, k choices each, N = T k pairs, E experts, H hidden, I intermediate; places and routes: _routes.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, like, power_of_2, warps_for
from ds_fused.ops.mlp._gates import GLUForm, glu_back, load_gate_and_up, store_gate_and_up
from ds_fused.ops.mlp._routes import Routes

# columns of a program, and of a thread: of the sums over choices, and of the backward's pass. 2.9 and 2.8 TB/s of rows
# of 2048 and of 768 on one H100; others are not measured yet
SUM_BLOCK, SUM_PER_THREAD = 1024, 8
GATE_BLOCK, GATE_PER_THREAD = 1024, 8


@triton.jit
def _sum_of_choices_kernel(
    z_ptr,  # [N, H] by places
    weights_ptr,  # [N] by pairs; HAS_WEIGHTS: read
    places_ptr,  # [N] by pairs
    y_ptr,  # [T, H]
    n_cols,
    N_CHOICES: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n_cols
    y = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(N_CHOICES):
        pair = token * N_CHOICES + choice
        place = tl.load(places_ptr + pair).to(tl.int64)
        z = tl.load(z_ptr + place * n_cols + cols, mask=mask & (place >= 0), other=0.0).to(tl.float32)
        if HAS_WEIGHTS:
            z *= tl.load(weights_ptr + pair).to(tl.float32)
        y += z
    tl.store(y_ptr + token * n_cols + cols, y, mask=mask)


@triton.jit(do_not_specialize=["n_ends"])
def _experts_gate_bwd_kernel(
    da_ptr,  # [N, I]; WANTS_A: becomes weights * a
    h_ptr,  # [N, 2I]
    dh_ptr,  # [N, 2I]
    weights_ptr,  # [N] by pairs
    dweights_ptr,  # [N] by pairs
    pairs_ptr,  # [N]
    ends_ptr,  # [E, chunks]
    n_ends,
    n_cols,
    ACT: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    WANTS_DH: tl.constexpr, WANTS_A: tl.constexpr, WANTS_DWEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    # behind the last place is nothing
    if row < tl.load(ends_ptr + n_ends - 1):
        pair = tl.load(pairs_ptr + row)
        weight = tl.load(weights_ptr + pair).to(tl.float32)
        da_ptr += row * n_cols
        h_ptr += row * 2 * n_cols
        dh_ptr += row * 2 * n_cols
        total = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, n_cols, BLOCK):
            cols = first + tl.arange(0, BLOCK)
            mask = cols < n_cols
            da = tl.load(da_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            gate, up = load_gate_and_up(h_ptr, h_ptr + n_cols, first, n_cols, INTERLEAVED, BLOCK)
            dgate, dup, a = glu_back(weight * da, gate, up, ACT, ALPHA, LIMIT, OFFSET)
            if WANTS_DH:
                store_gate_and_up(dh_ptr, dh_ptr + n_cols, dgate, dup, first, n_cols, True, True, INTERLEAVED, BLOCK)
            if WANTS_A:
                tl.store(da_ptr + cols, weight * a, mask=mask)
            # beyond the row da is 0, and a, with an offset, need not be
            total += tl.where(mask, da * a, 0.0)
        if WANTS_DWEIGHTS:
            tl.store(dweights_ptr + pair, tl.sum(total, axis=0))


def sum_of_choices(z: Tensor, routes: Routes, weights: Tensor | None, n_tokens: int, dtype: torch.dtype) -> Tensor:
    """z [N, H] by places, weights [N] by pairs (None: ones) -> [T, H] of that dtype."""
    n, h = z.shape
    y = torch.empty((n_tokens, h), dtype=dtype, device=z.device)
    block = min(SUM_BLOCK, power_of_2(h))
    launch(
        _sum_of_choices_kernel, (n_tokens, cdiv(h, block)),
        z, z if weights is None else weights, routes.places, y, h,
        N_CHOICES=n // n_tokens, HAS_WEIGHTS=weights is not None, BLOCK=block,
        num_warps=warps_for(block, SUM_PER_THREAD),
    )  # fmt: skip
    return y


def gate_bwd(
    da: Tensor,  # [N, I]; with wants_a it becomes weights * a
    h: Tensor,  # [N, 2I]
    weights: Tensor,  # [N] by pairs
    routes: Routes,
    form: GLUForm,
    interleaved: bool,
    *,
    wants_dh: bool,
    wants_a: bool,
    wants_dweights: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """dh [N, 2I] and dweights [N], those that are wanted."""
    n, i = da.shape
    dh = like(h) if wants_dh else None
    # zeros, for pairs without a place
    dweights = torch.zeros_like(weights) if wants_dweights else None
    block = min(GATE_BLOCK, power_of_2(i))
    launch(
        _experts_gate_bwd_kernel, (n,),
        da, h, h if dh is None else dh, weights, weights if dweights is None else dweights, routes.pairs,
        routes.ends, routes.ends.numel(), i,
        ACT=form.act, ALPHA=form.alpha, LIMIT=form.limit, OFFSET=form.offset, INTERLEAVED=interleaved,
        WANTS_DH=wants_dh, WANTS_A=wants_a, WANTS_DWEIGHTS=wants_dweights, BLOCK=block,
        num_warps=warps_for(block, GATE_PER_THREAD),
    )  # fmt: skip
    return dh, dweights
