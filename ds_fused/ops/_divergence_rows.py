"""A student's rows of logits beside a teacher's, which are made as they are asked for: what a head's divergence walks.

Sizes: M tokens, T of a chunk, H hidden (each model its own), V vocabulary, n of its words.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ds_fused.ops._divergence_kernels import N_STATS
from ds_fused.ops._teacher_divergence import (
    DivergenceOptions,
    divergence_bwd,
    divergence_bwd_torch,
    divergence_fwd,
    divergence_fwd_torch,
)
from ds_fused.ops._tiles import logits_of, of_chunk, tile_elements
from ds_fused.ops._triton import runs_kernels


@dataclass(frozen=True)
class Head:
    """x [M, H] and the weight and bias that make its logits, or n words of them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def slab(self, words: slice) -> Head:
        """Some words of the vocabulary, in x's dtype: under autocast the weight has its own."""
        dtype = self.x.dtype
        bias = None if self.bias is None else self.bias[words].to(dtype)
        return Head(self.x, self.weight[words].to(dtype), bias)

    def logits(self, room: Tensor, tokens: slice) -> Tensor:
        return logits_of(room, self.x[tokens], self.weight, self.bias)

    def room(self, n_tokens: int, n_words: int) -> Tensor:
        return self.x.new_empty(tile_elements(n_tokens, n_words))


@dataclass(frozen=True)
class DivergenceRows:
    """The divergence from a teacher as a RowLoss (one_pass.py)."""

    teacher: Head  # of all words
    room: Tensor  # for its logits of a chunk
    labels: Tensor | None  # [M]
    options: DivergenceOptions

    def __call__(self, z: Tensor, chunk: slice, loss: Tensor, upstream: Tensor | None) -> None:
        self.walk(z, chunk, loss, loss.new_empty(N_STATS, loss.shape[0]), upstream)

    def walk(self, z: Tensor, chunk: slice, loss: Tensor, stats: Tensor, upstream: Tensor | None) -> None:
        """And to stats [N_STATS, T], fp32, written: what a backward must know of the rows."""
        divergence, gradient = passes(z)
        t, labels = self.teacher.logits(self.room, chunk), of_chunk(self.labels, chunk)
        divergence(z, t, labels, loss, stats, self.options)
        if upstream is not None:
            # in place: nobody else has these logits
            gradient(upstream, z, t, labels, stats, z, self.options)


def passes(x: Tensor):
    """The two row passes where x lies: to the losses and statistics, and to the gradient."""
    if runs_kernels(x):
        return divergence_fwd, divergence_bwd
    return divergence_fwd_torch, divergence_bwd_torch
