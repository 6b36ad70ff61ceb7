"""linear_cross_entropy whose gradients are made in the forward: each logit is computed once, and none is kept.

For each chunk of T tokens

    z [T, V] = x @ weight.T
    dz         over z, by one softmax pass, which also leaves the loss
    dx [T, H]  = dz @ weight     complete
    dw [V, H] += dz.T @ x        over chunks, see below

A loss that is a mean or a sum has one number as its upstream gradient, by which the backward multiplies what is there:
exact for any such number. Losses that stay apart ("none") need the backward of two_pass.py, and so does
fp16: what its loss scale would keep above the least number is rounded away before the scale is known.

dw is added up in its own dtype where that costs no more than twice the error of one product, else in fp32; or as
``accumulate`` says (see ``cut``).

Saved for backward: dx, dw and dbias. Work: 6 MHV FLOPs, 4 under a weight that is not trained. Traffic of the softmax
passes: 1 read and 1 write of z, and what they look at again comes from L2 (_lent_logits.py).

Sizes: M tokens, T of them in a chunk, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops._cross_entropy_kernels import softmax_passes
from ds_fused.ops._lent_logits import lent_logits
from ds_fused.ops._loss import LossOptions, cross_entropy_bwd_torch, cross_entropy_fwd_torch
from ds_fused.ops._once import once_differentiable
from ds_fused.ops._scale import scaled
from ds_fused.ops._tiles import MOST_ROUNDINGS, logits_of, part, product, side, sum_dtype, tile_elements, wide
from ds_fused.ops._triton import cdiv, runs_kernels

# not yet measured. each chunk reads and writes dw, so fewer tokens than these are not worth their memory
LEAST_TOKENS = 1024


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


def _lent_logits_torch(
    z: Tensor, labels: Tensor, loss: Tensor, lse: Tensor, dloss: Tensor, options: LossOptions
) -> None:
    """`lent_logits` where no kernel runs."""
    cross_entropy_fwd_torch(z, labels, loss, lse, options, n_vocab=z.shape[1])
    cross_entropy_bwd_torch(dloss, z, labels, lse, z, options, n_vocab=z.shape[1])


def _loss_alone(z: Tensor, labels: Tensor, loss: Tensor, lse: Tensor, dloss: Tensor, options: LossOptions) -> None:
    """`lent_logits` where nobody wants the gradient."""
    softmax, _ = softmax_passes(z)
    softmax(z, labels, loss, lse, options, n_vocab=z.shape[1])


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def one_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: Tensor,  # of the labels that count
    options: LossOptions,
    reduction: str,
    tokens: int,  # T
    native: bool,  # dw is added up in its own dtype
    wants: Sequence[bool],  # dx, dw, dbias
) -> tuple[Tensor, Gradients]:
    """The mean or the sum of the losses, fp32 [], and the gradients for an upstream gradient of 1."""
    n_tokens, n_vocab = x.shape[0], weight.shape[0]
    if any(wants):
        softmax = lent_logits if runs_kernels(x) else _lent_logits_torch
    else:
        softmax = _loss_alone
    # under autocast the weight has its own dtype: a copy that lives as long as this forward
    rows, offsets = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    wants_dx, wants_dw, wants_dbias = wants
    n_chunks = cdiv(n_tokens, tokens)

    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants_dx else None
    sums = sum_dtype(weight.dtype, x, n_chunks, native=native)
    dw = torch.empty_like(weight, dtype=sums, memory_format=torch.contiguous_format) if wants_dw else None
    dbias = torch.zeros_like(bias, dtype=wide(x)) if wants_dbias else None
    loss, lse = (x.new_empty(size, dtype=wide(x)) for size in (n_tokens, (2, n_tokens)))
    one = torch.ones((), dtype=wide(x), device=x.device)
    upstream = (one / count if reduction == "mean" else one).expand(n_tokens)
    room = x.new_empty(tile_elements(min(tokens, n_tokens), n_vocab))
    for start in range(0, n_tokens, tokens):
        chunk = slice(start, start + tokens)
        part, label = x[chunk], labels[chunk]
        z = logits_of(room, part, rows, offsets)
        softmax(z, label, loss[chunk], lse[:, chunk], upstream[chunk], options)
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
    """x [M, H], weight [V, H], bias [V] or None and labels [M] to the mean or the sum of the losses, fp32 []."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        count: Tensor,
        options: LossOptions,
        reduction: str,
        tokens: int,
        native: bool,
    ) -> Tensor:
        wants = ctx.needs_input_grad[:3]
        loss, grads = one_pass(x, weight, bias, labels, count, options, reduction, tokens, native, wants)
        ctx.save_for_backward(*grads)
        ctx.spent = False
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "linear_cross_entropy: a second backward, but the first handed out the gradients that the forward had "
                "made; pass grad_in_forward=False to compute them each time"
            )
        ctx.spent = True
        made = (None if t is None else scaled(t, dloss) for t in ctx.saved_tensors)
        return *made, None, None, None, None, None, None
