"""How q, k and their angles lie in memory: as callers have them, and as the kernels of rotary ops read them.

Kernels see q [B, Hq, T, D], k [B, Hk, T, D], cos and sin [(3,) B, T, R], in any strides but one: the columns of a head,
and of an angle, lie side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops._rope import RopeForm


def as_kernels_read(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, unsqueeze_dim: int, form: RopeForm
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, cos and sin as above, from arguments that ``check_rope`` has let pass; views but in rare cases."""
    if q.ndim == 3:
        q, k = q[None], k[None]
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos, sin = (None if x is None else neighbours(_whole(x, q.shape[0], form)) for x in (cos, sin))
    if sin is not None and cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    return neighbours(q), neighbours(k), cos, sin


def as_called(ys: tuple[Tensor, Tensor], n_dims: int, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    """Results [B, heads, T, D] in the layout of a caller's q and k, which have so many dimensions."""
    yq, yk = ys
    if unsqueeze_dim == 2:
        yq, yk = yq.transpose(1, 2), yk.transpose(1, 2)
    return (yq[0], yk[0]) if n_dims == 3 else (yq, yk)


def _whole(angles: Tensor, batch: int, form: RopeForm) -> Tensor:
    """[(3,) B, T, R], whether the batch dimension was there, 1 or missing."""
    if angles.ndim == (2 if form.sections is None else 3):
        angles = angles.unsqueeze(-3)
    return angles.expand(*angles.shape[:-3], batch, -1, -1)


def neighbours(x: Tensor) -> Tensor:
    """x with the columns of a head side by side: itself in nearly every case."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(x: Tensor, shape: torch.Size) -> tuple[int, ...]:
    """Of x [B, heads, T, D] those of batch, head and token; from the shape where dynamo can't say them (row_stride).

    The shape is that of an input: dynamo 2.11 can't hold the sizes of what was made of one.
    """
    if torch.compiler.is_compiling():
        _, heads, n_tokens, d = shape
        if x.is_contiguous():
            return heads * n_tokens * d, n_tokens * d, d
        if x.transpose(1, 2).is_contiguous():
            return heads * n_tokens * d, d, heads * d
    return x.stride()[:3]


def angle_strides(cos: Tensor) -> tuple[int, ...]:
    """Of cos [B, T, R] or [3, B, T, R] those of axis, batch and token."""
    if torch.compiler.is_compiling() and cos.is_contiguous():
        batch, n_tokens, r = cos.shape[-3:]
        return batch * n_tokens * r, n_tokens * r, r
    axis = cos.stride(0) if cos.ndim == 4 else 0
    return axis, cos.stride(-3), cos.stride(-2)


def by_token(x: Tensor) -> bool:
    """Whether x [B, heads, T, D] lies in memory as [B, T, heads, D]; a flag, since dynamo can't keep all strides."""
    return x.transpose(1, 2).is_contiguous()


def room(like: Tensor, by_token: bool, dtype: torch.dtype) -> Tensor:
    """For a gradient of that shape, in the layout that its q or k had: the projections want it."""
    batch, heads, n_tokens, d = like.shape
    if by_token:
        return like.new_empty(batch, n_tokens, heads, d, dtype=dtype).transpose(1, 2)
    return like.new_empty(batch, heads, n_tokens, d, dtype=dtype)
