"""A head and its loss, with gradients made in the forward: each logit is computed once, and none is kept.

For each chunk of T tokens

    z [T, V] = x @ weight.T
    dz         over z, by the loss's passes, which also leave what each token loses
    dx [T, H]  = dz @ weight     complete
    dw [V, H] += dz.T @ x        over chunks, see below

A loss that is a mean or a sum has one number as its upstream gradient, by which the backward multiplies what is there:
exact for any such number. Losses that stay apart ("none") need a backward of their own (two_pass.py,
_linear_divergence.py), and so does fp16: what its loss scale would keep above the least number is rounded away before
the scale is known.

dw is added up in its own dtype where that costs no more than twice the error of one product, else in fp32; or as
``accumulate`` says (see ``cut``).

Saved for backward: dx, dw and dbias. Work: 6 MHV FLOPs, 4 under a weight that is not trained. Traffic of cross
entropy's passes: 1 read and 1 write of z, and what they look at again comes from L2 (_lent_logits.py).

Sizes: M tokens, T of them in a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ds_fused.ops.common._once import FOR_TWO_BACKWARDS, once_differentiable
from ds_fused.ops.common._tiles import (
    MOST_ROUNDINGS,
    logits_of,
    of_chunk,
    part,
    product,
    side,
    sum_dtype,
    tile_elements,
    wide,
)
from ds_fused.ops.common._triton import cdiv, runs_kernels
from ds_fused.ops.losses._cross_entropy_kernels import softmax_passes
from ds_fused.ops.losses._lent_logits import lent_logits
from ds_fused.ops.losses._loss import LossOptions, cross_entropy_bwd_torch, cross_entropy_fwd_torch
from ds_fused.ops.losses._scale import scaled

# not yet measured. each chunk reads and writes dw; with fewer tokens than these that takes an H100 longer than dz.T @ x
LEAST_TOKENS = 256


class Cut(NamedTuple):
    """How the tokens are cut, and whether dw is added up in its own dtype."""

    tokens: int  # T
    native: bool


def cut(
    n_tokens: int, n_vocab: int, n_hidden: int, itemsize: int, chunk_bytes: int, accumulate: str, *, trains: bool
) -> Cut:
    """Whole rows of logits in about ``chunk_bytes``; in more, where that spares an fp32 dw and takes less than it."""
    n_tokens = max(n_tokens, 1)
    tokens = side(n_tokens, chunk_bytes // (n_vocab * itemsize), least=LEAST_TOKENS)
    if accumulate != "auto" or not trains or cdiv(n_tokens, tokens) <= MOST_ROUNDINGS:
        return Cut(tokens, accumulate != "fp32")
    larger = part(n_tokens, MOST_ROUNDINGS)
    spared = (larger - tokens) * n_vocab * itemsize < 4 * n_vocab * n_hidden
    return Cut(larger, True) if spared else Cut(tokens, False)


class RowLoss(Protocol):
    """What tokens lose, each by its row of logits."""

    def __call__(self, z: Tensor, chunk: slice, loss: Tensor, upstream: Tensor | None) -> None:
        """Of these tokens the logits z [T, V] to loss [T], fp32, written.

        Over z comes its gradient, for the upstream gradients [T], any stride; without them z is nobody's.
        """


@dataclass(frozen=True)
class CrossEntropyRows:
    """Cross entropy as a RowLoss."""

    labels: Tensor  # [M]
    options: LossOptions

    def __call__(self, z: Tensor, chunk: slice, loss: Tensor, upstream: Tensor | None) -> None:
        labels, lse, whole = self.labels[chunk], loss.new_empty(2, loss.shape[0]), z.shape[1]
        if upstream is None:
            softmax, _ = softmax_passes(z)
            softmax(z, labels, loss, lse, self.options, n_vocab=whole)
        elif runs_kernels(z):
            lent_logits(z, labels, loss, lse, upstream, self.options)
        else:
            cross_entropy_fwd_torch(z, labels, loss, lse, self.options, n_vocab=whole)
            cross_entropy_bwd_torch(upstream, z, labels, lse, z, self.options, n_vocab=whole)


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def one_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    losses: RowLoss,
    count: Tensor | int,  # of the tokens that count
    reduction: str,
    tokens: int,  # T
    native: bool,  # dw is added up in its own dtype
    wants: Sequence[bool],  # dx, dw, dbias
) -> tuple[Tensor, Gradients]:
    """The mean or the sum of the losses, fp32 [], and the gradients for an upstream gradient of 1."""
    n_tokens, n_vocab = x.shape[0], weight.shape[0]
    # under autocast the weight has its own dtype: a copy that lives as long as this forward
    rows, offsets = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    wants_dx, wants_dw, wants_dbias = wants
    n_chunks = cdiv(n_tokens, tokens)

    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_dx else None
    sums = sum_dtype(weight.dtype, x, n_chunks, native=native)
    dw = torch.empty_like(weight, dtype=sums, memory_format=torch.contiguous_format) if wants_dw else None
    dbias = torch.zeros_like(bias, dtype=wide(x)) if wants_dbias else None
    loss = x.new_empty(n_tokens, dtype=wide(x))
    upstream = None
    if any(wants):
        one = torch.ones((), dtype=wide(x), device=x.device)
        upstream = (one / count if reduction == "mean" else one).expand(n_tokens)
    room = x.new_empty(tile_elements(min(tokens, n_tokens), n_vocab))
    for start in range(0, n_tokens, tokens):
        chunk = slice(start, start + tokens)
        part = x[chunk]
        z = logits_of(room, part, rows, offsets)
        losses(z, chunk, loss[chunk], of_chunk(upstream, chunk))
        if wants_dx:
            product(dx[chunk], z, rows)
        if wants_dw:
            product(dw, z.t(), part, add=start > 0)
        if wants_dbias:
            dbias += z.sum(0, dtype=dbias.dtype)
    if wants_dw and n_tokens == 0:
        dw.zero_()
    total = loss.sum()
    return (
        total / count if reduction == "mean" else total,
        (dx, None if dw is None else dw.to(weight.dtype), None if dbias is None else dbias.to(bias.dtype)),
    )


class OnePassFunction(torch.autograd.Function):
    """x [M, H], weight [V, H] and bias [V] or None to the mean or the sum of the losses, fp32 []."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        losses: RowLoss,
        count: Tensor | int,
        op: str,  # who speaks in an error
        reduction: str,
        tokens: int,
        native: bool,
    ) -> Tensor:
        wants = ctx.needs_input_grad[:3]
        loss, grads = one_pass(x, weight, bias, losses, count, reduction, tokens, native, wants)
        ctx.save_for_backward(*grads)
        ctx.op, ctx.spent = op, False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                f"{ctx.op}: a second backward, but the first handed out the gradients that the forward had made; pass "
                f"{FOR_TWO_BACKWARDS[ctx.op]} to compute them each time"
            )
        ctx.spent = True
        made = (None if t is None else scaled(t, dloss) for t in ctx.saved_tensors)
        return *made, None, None, None, None, None, None
