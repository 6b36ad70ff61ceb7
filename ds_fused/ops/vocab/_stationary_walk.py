"""One pass over the tokens of all ranks, for `stationary`: what is multiplied, and where what travels goes between.

A product takes all multiprocessors of a GPU; a collective that is under way when it starts delays it by all its time,
and one that is ready meanwhile waits for its end. The softmax passes leave room, so that is where collectives run: dx
of the block before beside the first pass, x of the next block beside the second. Both passes take a block in halves:
while the numbers of one half travel, the other's pass runs.

A carrier moves x and dx beside products: x of the next block when dw no longer needs this one's, dx when it is made.
Halves are of each rank's tokens then, and not of the ranks, so that dx of the first leaves beside dw and there need be
room for one half's alone.

Sizes: W ranks, T tokens of a rank in a block, N tokens of a half, H hidden, n rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common._tiles import new_tile, of_chunk, product, tile_elements, wide
from ds_fused.ops.common._triton import runs_kernels
from ds_fused.ops.losses._cross_entropy_kernels import softmax_passes
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab._exchange import CarriedTokens, ClassWeights, Found, Tokens, of_block
from ds_fused.ops.vocab._merge import merge, merge_torch
from ds_fused.ops.vocab.vocab_shard import Flight, Homeward, VocabShard


class Rows:
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


class Gradients:
    """What the blocks add up to: dx of this rank's tokens; dw and dbias of its rows.

    ``upstream``: [1, W, most] of the losses, [2, W, most] where entropies have one too. Asked for when the first logits
    are under way, which don't need it.
    """

    def __init__(
        self, shard: VocabShard, rows: Rows, x: Tensor, bias: Tensor | None, wants: tuple[bool, ...],
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

    def add_dx(self, place: slice, dz: Tensor) -> None:
        self.land()
        if self.dx is not None:
            carrier, n = self.shard.carrier, dz.shape[0]
            parts = (
                self.dx.new_empty(n, self.dx.shape[1], dtype=wide(dz)) if carrier is None else carrier.parts(n, self.dx)
            )
            self.rows.back(parts, dz)
            self._ready = place, parts.view(self.shard.ranks, -1, parts.shape[1])

    def send(self) -> None:
        """Send home the dx that was added last."""
        if self._ready is not None:
            (place, parts), self._ready = self._ready, None
            carrier, out = self.shard.carrier, self.dx[place]
            if carrier is None:
                self._leaving = Homeward(self.shard.reduce_scatter(parts), out)
            else:
                self._leaving = carrier.send_home(parts, out)

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


class Part(NamedTuple):
    """A half of a block with its logits, N tokens."""

    ranks: slice  # whose tokens they are
    place: slice  # of each one's tokens
    x: Tensor  # [N, H]
    z: Tensor  # [N, n]
    labels: Tensor  # [N]


class Walk:
    """The tokens of the first block are on their way from the start."""

    def __init__(self, shard: VocabShard, x: Tensor, most: int, block: int) -> None:
        """``most``: the largest number of tokens of any rank. ``block``: of each rank's tokens, so many at a time."""
        self.shard = shard
        self.tokens = (Tokens if shard.carrier is None else CarriedTokens)(shard, x, most, block)
        self.forward_pass, self.backward_pass = softmax_passes(x)
        self.merge = merge if runs_kernels(x) else merge_torch
        self.columns = {"n_vocab": shard.shape[0], "first_id": shard.first_id}

    def __call__(
        self,
        rows: Rows,
        options: LossOptions,
        labels: Callable[[], Tensor],  # [W, most]; asked for when the first logits are under way
        classes: ClassWeights,
        found: Found,  # written where it has a loss, else read
        gradients: Gradients | None,  # where they are wanted
    ) -> None:
        self.rows, self.options, self.labels = rows, options, labels
        self.classes, self.found, self.gradients = classes, found, gradients
        tokens, n_rows = self.tokens, self.shard.n_rows
        room = tokens.x.new_empty(tile_elements(self.shard.ranks * min(tokens.block, tokens.most), n_rows))
        # whether x of the next block comes when this one's is no longer needed
        comes_late = self.shard.carrier is not None and gradients is not None
        for i in range(len(tokens.places)):
            x = tokens.land()
            z = new_tile(room, x.shape[0], n_rows)
            self.rows.logits(z, x)
            if gradients is not None:
                gradients.send()
            parts = [
                Part(ranks, place, x[some], z[some], of_block(self.labels()[ranks], place))
                for ranks, place, some in tokens.halves(i)
            ]
            coming = [self.shard.gather(self._numbers(part)) for part in parts] if found.loss is not None else []
            for k, part in enumerate(parts):
                if coming:
                    self._merge(coming[k].land(), part)
                if k == 0 and not comes_late:
                    if gradients is not None:
                        # it has come: what was waited for was sent later
                        gradients.land()
                    tokens.start(i + 1)
                if gradients is not None:
                    self._softmax_bwd(part)
            if gradients is not None:
                (self._add_carried if comes_late else self._add)(i, parts, z, x)
        if gradients is not None:
            gradients.finish()

    def _add(self, i: int, parts: list[Part], dz: Tensor, x: Tensor) -> None:
        """Both products of block i. A product follows whatever sets out, and hides it: the last dx goes beside dw."""
        gradients, place = self.gradients, self.tokens.places[i]
        if i + 1 == len(self.tokens.places):
            gradients.add_dx(place, dz)
            gradients.send()
            gradients.add_dw(dz, x)
        else:
            gradients.add_dw(dz, x)
            gradients.add_dx(place, dz)

    def _add_carried(self, i: int, parts: list[Part], dz: Tensor, x: Tensor) -> None:
        gradients, is_last = self.gradients, i + 1 == len(self.tokens.places)
        for part in parts:
            if part is parts[-1] and not is_last:
                gradients.add_dw(dz, x)
                self.tokens.start(i + 1)
            gradients.add_dx(part.place, part.z)
            gradients.send()
            if is_last:
                gradients.add_dw(part.z, part.x)

    def _numbers(self, part: Part) -> Tensor:
        """[3 to 5, N]: what this rank's columns say of each token."""
        found, z = self.found, part.z
        numbers = found.lse.new_empty(3 + (found.right is not None) + (found.entropy is not None), z.shape[0])
        right = None if found.right is None else numbers[3]
        entropy = None if found.entropy is None else numbers[-1]
        for rows, weights in self.classes.passes(part.ranks, part.place):
            self.forward_pass(
                z[rows], part.labels[rows], numbers[0, rows], numbers[1:3, rows], self.options, **self.columns,
                is_last=False, right=of_chunk(right, rows), entropy=of_chunk(entropy, rows), **weights,
            )  # fmt: skip
        return numbers

    def _merge(self, numbers: Tensor, part: Part) -> None:
        """``numbers``: those of all ranks."""
        found, ranks, place = self.found, part.ranks, part.place
        loss = found.lse.new_empty(part.labels.shape)
        lse = found.lse.new_empty(2, *loss.shape)
        right = None if found.right is None else torch.empty_like(loss)
        entropy = None if found.entropy is None else torch.empty_like(loss)
        self.merge(
            numbers, part.labels, loss, lse, self.options,
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

    def _softmax_bwd(self, part: Part) -> None:
        """dz in place: nobody else has the logits."""
        found, ranks, place, z = self.found, part.ranks, part.place, part.z
        upstream, lse = of_block(self.gradients.upstream()[:, ranks], place), of_block(found.lse[:, ranks], place)
        entropy = dentropy = None
        if found.entropy is not None:
            entropy, dentropy = of_block(found.entropy[ranks], place), upstream[1]
        for rows, weights in self.classes.passes(ranks, place):
            self.backward_pass(
                upstream[0, rows], z[rows], part.labels[rows], lse[:, rows], z[rows], self.options, **self.columns,
                entropy=of_chunk(entropy, rows), dentropy=of_chunk(dentropy, rows), **weights,
            )  # fmt: skip
