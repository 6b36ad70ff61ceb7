"""linear_cross_entropy over ranks that each hold some rows of the weight: the tokens travel, the weight stays.

Each rank multiplies the tokens of all ranks with its own vocabulary rows, block of tokens after block:

    x [W * T, H]    from all ranks                           (all-gather)
    z [W * T, n]  = x @ rows.T, its softmax pass over n columns
    lse, loss       from the W parts of each token           (all-gather of 3 numbers a token; merged by every rank;
                                                              4 where the argmax or the entropy is asked for)
    dz              over z, in place
    dx            = sum over ranks of dz @ rows              (reduce-scatter, in fp32)
    dw           += dz.T @ x                                 fp32, of these rows alone: nothing to reduce

In which order, and what travels beside what, is in _stationary_walk.py.

Logits exist for one block, and each is computed once (6 MHV FLOPs), if gradients are made in the forward. They are
linear in the upstream gradient, but dw only in one that all tokens share, up to what the forward knows (1 / count for
a mean). That is so for any loss that is a mean or a sum, and the backward asks all ranks whether it was. Where not
(weights of tokens or of ranks), it makes the gradients again with the right ones, 12 MHV, and from then on in the
backward alone, 8 MHV; the result is the same. With class weights or entropies the forward makes none.

A rank computes with its own options, so all ranks give the same ones. Of class weights each may have its own, where all
have some; with smoothing they travel (an all-gather of V numbers and one of 2 a token), and a softmax pass takes the
tokens of one rank at a time.

Saved for backward: x, labels and lse of all tokens (16 bytes each), dx, and dw in fp32 [n, H]. With entropies 4 bytes a
token more; with class weights that the softmax passes see 8, and [W, n] of them.

Sizes: M tokens of this rank, W ranks, T tokens of a rank in a block, H hidden, V vocabulary, n rows of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._tiles import rows_of_waves, side, wide
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab._exchange import ClassWeights, Found, Labels
from ds_fused.ops.vocab._stationary_walk import Gradients, Rows, Walk
from ds_fused.ops.vocab.vocab_shard import VocabShard, padded

# ratios of fp32 numbers that stand for the same one
SAME = 1e-6


def block_bytes(n_vocab: int, hidden: int, ranks: int, itemsize: int, carried: bool = False) -> int:
    """What a token of each rank takes of a block: its logits, two of its x, its dx in fp32.

    With a carrier: its logits, its x, and of each half dx where it is sent from and where it arrives.
    """
    return n_vocab * itemsize + ranks * hidden * (itemsize + 4 if carried else 2 * itemsize + 4)


def block_tokens(
    most: int, n_vocab: int, hidden: int, ranks: int, itemsize: int, chunk_bytes: int, carried: bool = False
) -> int:
    """T: so many that a block takes about `chunk_bytes`, and the product for dx whole waves, if it can be."""
    fits = chunk_bytes // block_bytes(n_vocab, hidden, ranks, itemsize, carried)
    most = max(most, 1)
    in_waves = rows_of_waves(fits, hidden, ranks)
    return min(most, in_waves) if in_waves else side(most, fits, ranks)


class StationaryFunction(torch.autograd.Function):
    """x [M, H], this rank's rows of a weight and labels [M] to one loss a token [M], fp32.

    `anchor` is empty and requires grad if the weight does. `class_weight` [V] and `token_weights` [2, M] are given
    where there is smoothing too. `guess`: the reduction on top, "mean" or "sum", with which gradients are made in the
    forward; None makes none there. `more`: lse [2, M] and right [M] as well; `entropy`: the entropy [M] of each token's
    softmax as well. Either costs a fourth number a token; not both.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        anchor: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        shard: VocabShard,
        options: LossOptions,
        chunk_bytes: int,
        class_weight: Tensor | None,
        token_weights: Tensor | None,
        guess: str | None,
        more: bool,
        entropy: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        most = shard.most(x.shape[0])
        carried = shard.carrier is not None
        block = block_tokens(most, *shard.shape, shard.ranks, x.element_size(), chunk_bytes, carried)
        walk = Walk(shard, x, most, block)
        everyones = Labels(shard, labels, most, options, guess, x.dtype)
        classes = ClassWeights()
        if class_weight is not None:
            classes = ClassWeights.exchanged(shard, class_weight, token_weights, most)
        loss = x.new_empty(x.shape[0], dtype=wide(x))
        lse = loss.new_empty(2, shard.ranks, most)
        found = Found(
            lse, torch.empty_like(lse[0]) if entropy else None, loss, torch.empty_like(loss) if more else None
        )
        rows = Rows(shard, x, bias)
        made = None
        if guess is not None:
            made = Gradients(shard, rows, x, bias, ctx.needs_input_grad[:3], everyones.upstream)
        walk(rows, options, lambda: everyones.all, classes, found, made)
        ctx.save_for_backward(
            x, bias, everyones.all, everyones.counts, everyones.weights, lse, found.entropy, classes.of_columns,
            classes.of_tokens,
        )  # fmt: skip
        ctx.shard, ctx.options, ctx.block, ctx.made = shard, options, block, made
        # copies: whoever keeps them should not keep those of all ranks
        if entropy:
            return loss, found.entropy[shard.rank, : x.shape[0]].clone()
        if not more:
            return loss
        mine = lse[:, shard.rank, : x.shape[0]].clone()
        ctx.mark_non_differentiable(mine, found.right)
        return loss, mine, found.right

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, *more: Tensor) -> tuple[Tensor | None, ...]:
        x, bias, labels, counts, weights, lse, entropy, *classes = ctx.saved_tensors
        shard, (made, ctx.made) = ctx.shard, (ctx.made, None)
        factor = None if made is None else _common_factor(shard, dloss, weights, counts)
        if factor is None:
            # the next loss is weighted like this one
            shard.guesses = made is None and shard.guesses
            made = None  # frees its memory
            rows = Rows(shard, x, bias)
            mine = torch.stack([dloss] if entropy is None else [dloss, more[0]], 1)
            upstream = shard.gather(padded(mine, labels.shape[1], 0.0)).land().permute(2, 0, 1)
            made = Gradients(shard, rows, x, bias, ctx.needs_input_grad[:3], lambda: upstream)
            factor = 1.0
            walk = Walk(shard, x, labels.shape[1], ctx.block)
            walk(rows, ctx.options, lambda: labels, ClassWeights(*classes), Found(lse, entropy), made)
        if made.dw is not None:
            made.dw.give(factor)
        return (
            None if made.dx is None else made.dx.mul_(factor),
            None,
            None if made.dbias is None else made.dbias.mul_(factor).to(bias.dtype),
            None, None, None, None, None, None, None, None, None,
        )  # fmt: skip


def _common_factor(shard: VocabShard, dloss: Tensor, weights: Tensor, counts: Tensor) -> float | None:
    """The number that upstream gradients are of the weights the forward took, the same for all tokens of all ranks.

    None, on every rank, if there is none. The host waits for the GPU here, once.
    """
    # a sum's backward expands one number: other strides mean numbers that may differ
    if dloss.numel() == 0:
        ratio = dloss.new_zeros(())
    elif dloss.stride(0) == 0 or dloss.numel() == 1:
        ratio = dloss[0] / weights[shard.rank]
    else:
        ratio = dloss.new_full((), float("nan"))
    told = torch.stack([ratio, (counts[shard.rank] > 0).to(ratio.dtype)])
    # ranks all of whose tokens are ignored have zeros, whatever their number is
    ratios = [ratio for ratio, counts in shard.gather(told).land().tolist() if counts]
    if not ratios:
        return 0.0
    first = ratios[0]
    same = all(ratio == first or abs(ratio - first) <= SAME * abs(first) for ratio in ratios)
    return first if same else None
