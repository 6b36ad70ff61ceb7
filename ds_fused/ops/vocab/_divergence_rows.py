"""A student's rows of logits beside a teacher's, which are made as they are asked for: what a head's divergence walks.

Sizes: M tokens, T of a chunk, H hidden (each model its own), V vocabulary, n of its words.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ds_fused.ops.common._tiles import logits_of, of_chunk, tile_elements
from ds_fused.ops.common._triton import runs_kernels
from ds_fused.ops.vocab._cosine import CosineOptions
from ds_fused.ops.vocab._teacher_divergence import DivergenceOptions

# the two kinds of row passes
Options = DivergenceOptions | CosineOptions


@dataclass(frozen=True)
class Logits:
    """x [M, H] and the weight and bias that make its logits, or n words of them."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    def slab(self, words: slice) -> Logits:
        """Some words of the vocabulary, in x's dtype: under autocast the weight has its own."""
        dtype = self.x.dtype
        bias = None if self.bias is None else self.bias[words].to(dtype)
        return Logits(self.x, self.weight[words].to(dtype), bias)

    def rows(self, room: Tensor, tokens: slice) -> Tensor:
        return logits_of(room, self.x[tokens], self.weight, self.bias)

    def room(self, n_tokens: int, n_words: int) -> Tensor:
        return self.x.new_empty(tile_elements(n_tokens, n_words))


@dataclass(frozen=True)
class DivergenceRows:
    """The divergence from a teacher as a RowLoss (one_pass.py)."""

    teacher: Logits  # of all words
    room: Tensor  # for its logits of a chunk
    labels: Tensor | None  # [M]
    options: Options

    def __call__(self, z: Tensor, chunk: slice, loss: Tensor, upstream: Tensor | None) -> None:
        self.walk(z, chunk, loss, loss.new_empty(self.options.n_stats, loss.shape[0]), upstream)

    def walk(self, z: Tensor, chunk: slice, loss: Tensor, stats: Tensor, upstream: Tensor | None) -> None:
        """And to stats [n_stats, T], fp32, written: what a backward must know of the rows."""
        divergence, gradient = self.options.passes(runs_kernels(z))
        t, labels = self.teacher.rows(self.room, chunk), of_chunk(self.labels, chunk)
        divergence(z, t, labels, loss, stats, self.options)
        if upstream is not None:
            # in place: nobody else has these logits
            gradient(upstream, z, t, labels, stats, z, self.options)
