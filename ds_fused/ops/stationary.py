"""linear_cross_entropy over ranks that each hold some rows of the weight: the tokens travel, the weight stays.

Each rank multiplies the tokens of all ranks with its own vocabulary rows, block of tokens after block:

    x [W * T, H]    from all ranks                           (all-gather)
    z [W * T, n]  = x @ rows.T, its softmax pass over n columns
    lse, loss       from the W parts of each token           (all-gather of 3 numbers a token; merged by every rank;
                                                              4 where the argmax or the entropy is asked for)
    dz              over z, in place
    dx            = sum over ranks of dz @ rows              (reduce-scatter, in fp32)
    dw           += dz.T @ x                                 fp32, of these rows alone: nothing to reduce

A product takes all multiprocessors of a GPU; a collective that is under way when it starts delays it by all its time,
and one that is ready meanwhile waits for its end. The softmax passes leave room. So that is where collectives run: dx
of the block before beside the first pass, x of the next block beside the second. Both passes take a block in halves:
while the numbers of one half travel, the other's pass runs. Where copy engines move x and dx (`VocabShard.is_beside`),
they go beside products: x of the next block when dw no longer needs this one's, dx when it is made.

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

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops._cross_entropy_kernels import softmax_passes
from ds_fused.ops._exchange import ClassWeights, Found, Labels, Tokens, of_block
from ds_fused.ops._loss import LossOptions
from ds_fused.ops._merge import merge, merge_torch
from ds_fused.ops._once import once_differentiable
from ds_fused.ops._tiles import of_chunk, product, rows_of_waves, side, tile, tile_elements, wide
from ds_fused.ops._triton import runs_kernels
from ds_fused.ops.vocab_shard import Flight, VocabShard, padded

# ratios of fp32 numbers that stand for the same one
SAME = 1e-6


def block_bytes(n_vocab: int, hidden: int, ranks: int, itemsize: int, is_beside: bool = False) -> int:
    """What a token of each rank takes of a block: its logits, two of its x, its dx in fp32.

    Where these travel beside products: one of its x, and its dx where it is sent from and where it arrives.
    """
    return n_vocab * itemsize + ranks * hidden * (itemsize + 8 if is_beside else 2 * itemsize + 4)


def block_tokens(
    most: int, n_vocab: int, hidden: int, ranks: int, itemsize: int, chunk_bytes: int, is_beside: bool = False
) -> int:
    """T: so many that a block takes about `chunk_bytes`, and the product for dx whole waves, if it can be."""
    fits = chunk_bytes // block_bytes(n_vocab, hidden, ranks, itemsize, is_beside)
    most = max(most, 1)
    in_waves = rows_of_waves(fits, hidden, ranks)
    return min(most, in_waves) if in_waves else side(most, fits, ranks)


class _Rows:
    """This rank's rows as the products want them, and its part of the bias."""

    def __init__(self, shard: VocabShard, x: Tensor, bias: Tensor | None) -> None:
        ends = 0
        self.pieces: list[tuple[slice, Tensor]] = []
        for piece in shard.rows():
            # under autocast the weight has its own dtype
            self.pieces.append((slice(ends, ends + piece.shape[0]), piece.to(x.dtype)))
            ends += piece.shape[0]
        self.ids = slice(shard.first_id, shard.first_id + ends)
        self.bias = None if bias is None else bias[self.ids].to(x.dtype)

    def logits(self, z: Tensor, x: Tensor) -> None:
        for columns, rows in self.pieces:
            if self.bias is None:
                torch.mm(x, rows.t(), out=z[:, columns])
            else:
                torch.addmm(self.bias[columns], x, rows.t(), out=z[:, columns])

    def back(self, dx: Tensor, dz: Tensor) -> None:
        for columns, rows in self.pieces:
            product(dx, dz[:, columns], rows, add=columns.start > 0)


class _Gradients:
    """What the blocks add up to: dx of this rank's tokens; dw and dbias of its rows.

    ``upstream``: [1, W, most] of the losses, [2, W, most] where entropies have one too. Asked for when the first logits
    are under way, which don't need it.
    """

    def __init__(
        self, shard: VocabShard, rows: _Rows, x: Tensor, bias: Tensor | None, wants: tuple[bool, ...],
        upstream: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        self.shard, self.rows, self.upstream = shard, rows, upstream
        self.dx = torch.empty_like(x, memory_format=torch.contiguous_format) if wants[0] else None
        self.dw = shard.gradient() if wants[1] else None
        # zeros for the rows of other ranks: the mean over ranks, as of any parameter, puts the parts together
        self.dbias = torch.zeros_like(bias, dtype=wide(x)) if wants[2] else None
        self._ready: tuple[slice, Tensor] | None = None
        self._leaving: Flight | None = None
        self._begun = False

    def add_dw(self, dz: Tensor, x: Tensor) -> None:
        if self.dw is not None:
            product(self.dw.rows, dz.t(), x, add=self._begun)
        if self.dbias is not None:
            self.dbias[self.rows.ids] += dz.sum(0, dtype=self.dbias.dtype)
        self._begun = True

    def add_dx(self, place: slice, dz: Tensor, x: Tensor) -> None:
        self.land()
        if self.dx is not None:
            parts = self.shard.room_of_parts(x)
            self.rows.back(parts, dz)
            self._ready = place, parts.view(self.shard.ranks, -1, x.shape[1])

    def send(self) -> None:
        """Send home the dx of the block that was added last."""
        if self._ready is not None:
            (place, parts), self._ready = self._ready, None
            self._leaving = self.shard.send_home(parts, self.dx[place])

    def land(self) -> None:
        """What was sent is there."""
        if self._leaving is not None:
            leaving, self._leaving = self._leaving, None
            leaving.land()

    def finish(self) -> None:
        self.send()
        self.land()
        if self.dw is not None and not self._begun:
            self.dw.rows.zero_()


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
        block = block_tokens(most, *shard.shape, shard.ranks, x.element_size(), chunk_bytes, shard.is_beside)
        tokens = Tokens(shard, x, most, block)
        everyones = Labels(shard, labels, most, options, guess, x.dtype)
        classes = ClassWeights()
        if class_weight is not None:
            classes = ClassWeights.exchanged(shard, class_weight, token_weights, most)
        loss = x.new_empty(x.shape[0], dtype=wide(x))
        lse = loss.new_empty(2, shard.ranks, most)
        found = Found(
            lse, torch.empty_like(lse[0]) if entropy else None, loss, torch.empty_like(loss) if more else None
        )
        rows = _Rows(shard, x, bias)
        made = None
        if guess is not None:
            made = _Gradients(shard, rows, x, bias, ctx.needs_input_grad[:3], everyones.upstream)
        _Walk(tokens, rows, options, lambda: everyones.all, classes, found, made)()
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
            rows = _Rows(shard, x, bias)
            mine = torch.stack([dloss] if entropy is None else [dloss, more[0]], 1)
            upstream = shard.gather(padded(mine, labels.shape[1], 0.0)).land().permute(2, 0, 1)
            made = _Gradients(shard, rows, x, bias, ctx.needs_input_grad[:3], lambda: upstream)
            factor = 1.0
            tokens = Tokens(shard, x, labels.shape[1], ctx.block)
            _Walk(tokens, rows, ctx.options, lambda: labels, ClassWeights(*classes), Found(lse, entropy), made)()
        if made.dw is not None:
            made.dw.give(factor)
        return (
            None if made.dx is None else made.dx.mul_(factor),
            None,
            None if made.dbias is None else made.dbias.mul_(factor).to(bias.dtype),
            None, None, None, None, None, None, None, None, None,
        )  # fmt: skip


class _Half(NamedTuple):
    """Of a block, the tokens of some ranks, N together."""

    ranks: slice
    place: slice  # of each one's tokens
    z: Tensor  # [N, n]
    labels: Tensor  # [N]


class _Walk:
    """One pass over the tokens of all ranks."""

    def __init__(
        self,
        tokens: Tokens,
        rows: _Rows,
        options: LossOptions,
        labels: Callable[[], Tensor],  # [W, most]; asked for when the first logits are under way
        classes: ClassWeights,
        found: Found,  # written where it has a loss, else read
        gradients: _Gradients | None,  # where they are wanted
    ) -> None:
        self.tokens, self.rows, self.options, self.labels = tokens, rows, options, labels
        self.classes, self.found, self.gradients = classes, found, gradients
        self.shard = tokens.shard
        self.forward_pass, self.backward_pass = softmax_passes(tokens.x)
        self.merge = merge if runs_kernels(tokens.x) else merge_torch
        self.columns = {"n_vocab": self.shard.shape[0], "first_id": self.shard.first_id}

    def __call__(self) -> None:
        tokens, gradients, forwards = self.tokens, self.gradients, self.found.loss is not None
        most = self.shard.ranks * min(tokens.block, tokens.most)
        room = tokens.x.new_empty(tile_elements(most, self.shard.n_rows))
        goes_beside = self.shard.is_beside and gradients is not None
        for i, place in enumerate(tokens.places):
            x = tokens.land()
            z = tile(room, x.shape[0], self.shard.n_rows)
            self.rows.logits(z, x)
            if gradients is not None:
                # what goes beside products has been sent
                gradients.send()
            halves = [self._half(ranks, place, z) for ranks in self._ranks_of_halves()]
            coming = [self.shard.gather(self._numbers(half)) for half in halves] if forwards else []
            for k, half in enumerate(halves):
                if forwards:
                    self._merge(coming[k].land(), half)
                if k == 0 and not goes_beside:
                    if gradients is not None:
                        # it has come: what was waited for was sent later
                        gradients.land()
                    tokens.start(i + 1)
                if gradients is not None:
                    # dz in place: nobody else has the logits
                    self._softmax_bwd(half)
            if gradients is not None:
                self._add(i, z, x)
        if gradients is not None:
            gradients.finish()

    def _add(self, i: int, dz: Tensor, x: Tensor) -> None:
        """Both products of block i, in an order in which a product follows whatever sets out and hides it."""
        gradients, place, is_beside = self.gradients, self.tokens.places[i], self.shard.is_beside
        if i + 1 == len(self.tokens.places):
            gradients.add_dx(place, dz, x)
            gradients.send()
            gradients.add_dw(dz, x)
            return
        gradients.add_dw(dz, x)
        if is_beside:
            self.tokens.start(i + 1)
        gradients.add_dx(place, dz, x)
        if is_beside:
            gradients.send()

    def _ranks_of_halves(self) -> list[slice]:
        middle = self.shard.ranks // 2
        return [slice(a, b) for a, b in ((0, middle), (middle, self.shard.ranks)) if a < b]

    def _half(self, ranks: slice, place: slice, z: Tensor) -> _Half:
        n_tokens = place.stop - place.start
        rows = z[ranks.start * n_tokens : ranks.stop * n_tokens]
        return _Half(ranks, place, rows, of_block(self.labels()[ranks], place))

    def _numbers(self, half: _Half) -> Tensor:
        """[3 to 5, N]: what this rank's columns say of each token."""
        found, z = self.found, half.z
        part = found.lse.new_empty(3 + (found.right is not None) + (found.entropy is not None), z.shape[0])
        right = None if found.right is None else part[3]
        entropy = None if found.entropy is None else part[-1]
        for rows, weights in self.classes.passes(half.ranks, half.place):
            self.forward_pass(
                z[rows], half.labels[rows], part[0, rows], part[1:3, rows], self.options, **self.columns, is_last=False,
                right=of_chunk(right, rows), entropy=of_chunk(entropy, rows), **weights,
            )  # fmt: skip
        return part

    def _merge(self, parts: Tensor, half: _Half) -> None:
        found, ranks, place = self.found, half.ranks, half.place
        loss = found.lse.new_empty(half.labels.shape)
        lse = found.lse.new_empty(2, *loss.shape)
        right = None if found.right is None else torch.empty_like(loss)
        entropy = None if found.entropy is None else torch.empty_like(loss)
        self.merge(
            parts, half.labels, loss, lse, self.options,
            right=right, entropy=entropy, token_weights=self.classes.of_tokens_in(ranks, place),
        )  # fmt: skip
        if ranks.start <= self.shard.rank < ranks.stop:
            for whole, some in ((found.loss, loss), (found.right, right)):
                if whole is not None:
                    mine = whole[place]
                    mine.copy_(some.view(ranks.stop - ranks.start, -1)[self.shard.rank - ranks.start, : mine.shape[0]])
        found.lse[:, ranks, place] = lse.view_as(found.lse[:, ranks, place])
        if entropy is not None:
            found.entropy[ranks, place] = entropy.view_as(found.entropy[ranks, place])

    def _softmax_bwd(self, half: _Half) -> None:
        found, ranks, place, z = self.found, half.ranks, half.place, half.z
        upstream, lse = of_block(self.gradients.upstream()[:, ranks], place), of_block(found.lse[:, ranks], place)
        entropy = dentropy = None
        if found.entropy is not None:
            entropy, dentropy = of_block(found.entropy[ranks], place), upstream[1]
        for rows, weights in self.classes.passes(ranks, place):
            self.backward_pass(
                upstream[0, rows], z[rows], half.labels[rows], lse[:, rows], z[rows], self.options, **self.columns,
                entropy=of_chunk(entropy, rows), dentropy=of_chunk(dentropy, rows), **weights,
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
