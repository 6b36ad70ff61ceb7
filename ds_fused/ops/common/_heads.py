"""How q, k and their angles lie in memory: as callers have them, and as the kernels of rotary ops read them.

Kernels see q [B, Hq, T, D], k [B, Hk, T, D], cos and sin [(3,) (B or 1,) T, R], in any strides but one: the columns of
a head, and of an angle, lie side by side.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common._triton import can_take


def as_kernels_read(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, unsqueeze_dim: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, k, cos and sin as above, from arguments that ``check_rope`` has let pass; views but in rare cases."""
    if q.ndim == 3:
        q, k = q[None], k[None]
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    cos = neighbours(cos)
    if sin is not None:
        sin = neighbours(sin)
        if cos.stride() != sin.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
    return _apart(neighbours(q)), _apart(neighbours(k)), cos, sin


def as_called(ys: tuple[Tensor, Tensor], n_dims: int, unsqueeze_dim: int) -> tuple[Tensor, Tensor]:
    """Results [B, heads, T, D] in the layout of a caller's q and k, which have so many dimensions."""
    yq, yk = ys
    if unsqueeze_dim == 2:
        yq, yk = yq.transpose(1, 2), yk.transpose(1, 2)
    return (yq[0], yk[0]) if n_dims == 3 else (yq, yk)


def as_pairs(freqs: Tensor) -> Tensor:
    """Complex [..., R/2] -> real [..., R], a number after the other."""
    if torch.compiler.is_compiling() or freqs.is_conj() or freqs.stride(-1) != 1:
        return torch.view_as_real(freqs.resolve_conj()).flatten(-2)
    # a third of the host time
    return freqs.view(freqs.dtype.to_real())


def neighbours(x: Tensor) -> Tensor:
    """x with the columns of a head side by side: itself in nearly every case."""
    return x if x.stride(-1) == 1 else x.contiguous()


def keeps_columns(x: Tensor) -> bool:
    """Whether a tensor that is made like x, whose columns lie side by side, has them so: where another dimension has
    their stride, too, as windows that overlap have it, PyTorch may turn the two round."""
    return x.stride().count(1) == 1


def _apart(x: Tensor) -> Tensor:
    """x with neighbouring columns, or a copy like which a result can be made."""
    # a graph is asked for no strides, and lays its tensors out itself
    return x if torch.compiler.is_compiling() or keeps_columns(x) else x.contiguous()


def strides(x: Tensor, shape: torch.Size, heads_dim: int = 1) -> tuple[int, ...]:
    """Of x [B, heads, T, D] (heads_dim 2: [B, T, heads, D]) those of batch, head and token.

    From the shape where dynamo can't say them (row_stride), for which heads_dim is 1. The shape is that of an input:
    dynamo 2.11 can't hold the sizes of what was made of one.
    """
    if torch.compiler.is_compiling():
        _, heads, n_tokens, d = shape
        if x.is_contiguous():
            return heads * n_tokens * d, n_tokens * d, d
        if x.transpose(1, 2).is_contiguous():
            return heads * n_tokens * d, d, heads * d
    batch, head, token, _ = x.stride()
    return (batch, head, token) if heads_dim == 1 else (batch, token, head)


def angle_strides(cos: Tensor, by_axis: bool) -> tuple[int, int, int]:
    """Of cos [(B or 1,) T, R], or so three times ``by_axis``, those of axis, batch and token; 0 where there is one."""
    *sizes, n_tokens, r = cos.shape
    if torch.compiler.is_compiling() and cos.is_contiguous():
        # as in strides
        token, batch = r, n_tokens * r
        axis = batch * math.prod(sizes[1:])
    else:
        of_all = cos.stride()
        axis, batch, token = of_all[0], of_all[-3] if sizes else 0, of_all[-2]
    is_batched = len(sizes) > by_axis and sizes[-1] != 1
    return axis if by_axis else 0, batch if is_batched else 0, token


def is_swapped(x: Tensor) -> bool:
    """Whether x [B, heads, T, D] lies in memory as [B, T, heads, D], or the other way round.

    A flag, since dynamo can't keep all strides.
    """
    if torch.compiler.is_compiling():
        return x.transpose(1, 2).is_contiguous()
    _, second, third, _ = x.stride()
    return second < third


def room(like: Tensor, swapped: bool, dtype: torch.dtype) -> Tensor:
    """For a gradient of that shape, in the layout that its q or k had: the projections want it."""
    batch, second, third, d = like.shape
    if torch.compiler.is_compiling():
        if swapped:
            return like.new_empty(batch, third, second, d, dtype=dtype).transpose(1, 2)
        return like.new_empty(batch, second, third, d, dtype=dtype)
    order = (d, second * d) if swapped else (third * d, d)
    # half of the host time of new_empty and a view
    return torch.empty_strided(like.shape, (second * third * d, *order, 1), dtype=dtype, device=like.device)


class Gradient(NamedTuple):
    """How the gradient of q (k) is to lie: as q (k) did, without gaps. The projections want it."""

    swapped: bool  # is_swapped
    dtype: torch.dtype
    # its strides, where it has the dtype of what comes from above; None where they are not known before
    strides: tuple[int, ...] | None = None


def with_room(dy: Tensor, gradient: Gradient, overwrite: bool) -> tuple[Tensor, Tensor]:
    """A result's gradient as kernels read it, and memory for that of q (k): itself, where ``overwrite`` lets it."""
    if gradient.strides is not None and dy.stride() == gradient.strides:
        # the usual case: half of the host time of what stands below
        return dy, dy if overwrite and not dy.requires_grad else torch.empty_like(dy)
    # whatever attention handed back
    dy = neighbours(dy)
    if overwrite and can_take(dy, gradient.dtype, gradient.swapped):
        return dy, dy
    return dy, room(dy, gradient.swapped, gradient.dtype)


def gradient_of(x: Tensor, dtype: torch.dtype, inplace: bool) -> Gradient:
    """Of q (k), whose result has that dtype."""
    # results lie as what is written over, or as empty_like makes them
    y = torch.empty_like(x, device="meta")
    swapped = is_swapped(x if inplace else y)
    return Gradient(swapped, x.dtype, room(y, swapped, dtype).stride() if dtype == x.dtype else None)
