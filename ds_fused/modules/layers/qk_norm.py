"""Norms of q and k as one op with the rotation behind them, inside attention layers whose code nobody rewrites.

    query_states = self.q_norm(self.q_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    key_states = self.k_norm(self.k_proj(hidden_states).view(hidden_shape)).transpose(1, 2)
    query_states, key_states = apply_rotary_pos_emb(query_states, key_states, cos, sin)

The layer's own code runs. While it does, a call of one of its norms returns a ``Normed``, which notes transposes. Our
rotary function that is given two of them computes all by ``rms_norm_rope``; whatever else a ``Normed`` is used for
computes the norm by itself. Either way the norms are called as modules: the op runs within the calls of both, one in
the other, where hooks have seen to their weights (ZeRO-3 gathers them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.modules.layers.norm import RMSNorm, takes_more
from ds_fused.modules.layers.postponed import Postponed, computed
from ds_fused.ops import rms_norm_rope
from ds_fused.ops.norms._norms import NotPerColumnError


class Waiting:
    """A call of a norm that waits; once, whatever is made of its result."""

    __slots__ = ("norm", "x", "y")

    def __init__(self, norm: nn.Module, x: Tensor) -> None:
        self.norm, self.x = norm, x
        self.y: Tensor | None = None

    def result(self) -> Tensor:
        if self.y is None:
            self.y = self.norm(self.x, RMSNorm.forward)
        return self.y


class Normed(Postponed):
    """The result of a norm, transposed in dimensions that it does not normalise."""

    __slots__ = ("transposes", "waiting", "x")

    def __init__(self, waiting: Waiting, x: Tensor, transposes: tuple[tuple[int, int], ...] = ()) -> None:
        self.waiting, self.transposes = waiting, transposes
        self.x = x  # what is normalised, transposed as well

    def real(self) -> Tensor:
        y = self.waiting.result()
        for dims in self.transposes:
            y = y.transpose(*dims)
        return y

    def transpose(self, dim0: int, dim1: int) -> Normed | Tensor:
        last = self.x.ndim - 1
        if dim0 in (-1, last) or dim1 in (-1, last):
            return self.real().transpose(dim0, dim1)
        return Normed(self.waiting, self.x.transpose(dim0, dim1), (*self.transposes, (dim0, dim1)))

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def ndim(self) -> int:
        return self.x.ndim


class HeadNorm(RMSNorm):
    """A norm of heads, whose result waits where its layer has it wait."""

    fused_waits: bool

    def __call__(self, *args: Any, **named: Any) -> Any:
        if self.fused_waits and len(args) == 1 and not named and takes_more(self):
            x = computed(args[0])
            return Normed(Waiting(self, x), x)
        return super().__call__(*args, **named)

    def forward(self, *args: Any, **named: Any) -> Any:
        """Of one tensor its norm; or of any what a function, given last, makes of them and this module."""
        if len(args) < 2:
            return super().forward(*args, **named)
        *tensors, within = args
        return within(self, *tensors)


def form_of(norm: nn.Module) -> tuple[float, float, str]:
    """What has to be equal of two norms."""
    return getattr(norm, norm.fused_eps), norm.fused_offset, norm.fused_cast


def turned_together(
    q: Normed, k: Normed, cos: Tensor, sin: Tensor, heads_dim: int, keep_dtype: bool
) -> tuple[Tensor, Tensor] | None:
    """Both normalised and turned in one launch; None where one norm has been computed, or that can't be."""
    norms = q.waiting.norm, k.waiting.norm
    late = q.waiting.y is not None or k.waiting.y is not None
    if late or norms[0] is norms[1] or form_of(norms[0]) != form_of(norms[1]):
        return None
    eps, offset, cast = form_of(norms[0])

    def within_first(first: nn.Module, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        def within_both(second: nn.Module, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            return rms_norm_rope(
                q, k, first.weight, second.weight, cos, sin, eps=eps, offset=offset, cast=cast,
                unsqueeze_dim=heads_dim, keep_dtype=keep_dtype,
            )  # fmt: skip

        return norms[1](*tensors, within_both)

    try:
        return norms[0](q.x, k.x, cos, sin, within_first)
    except NotPerColumnError:
        # each by itself, by whichever forward it then has
        return None


def with_waiting_norms(forward: Callable, stock: Callable, names: Sequence[str]) -> Callable:
    """``forward`` of a layer whose norms of these names wait while it runs; called and described as ``stock``."""

    @functools.wraps(stock)
    def waiting(self: nn.Module, *args: Any, **named: Any) -> Any:
        # somebody may have put another layer in a norm's place
        norms = [norm for norm in map(self._modules.get, names) if isinstance(norm, HeadNorm)]
        for norm in norms:
            norm.fused_waits = True
        try:
            return forward(self, *args, **named)
        finally:
            for norm in norms:
                norm.fused_waits = False

    return waiting
