"""linear_cross_entropy whose gradients are made in the backward, tile by tile.

The logits exist as tiles: a *chunk* of tokens times a *slab* of vocabulary rows. Per tile the forward runs one matrix
product and one softmax pass (_cross_entropy_kernels.py), which leaves loss and lse of each token; the backward makes
the tile again, or takes it from those that were kept, turns it into dlogits in place and multiplies it into dx and
dweight.

What is summed over tiles is summed in fp32, and only then rounded: dx over slabs [M, H], dweight over chunks [n, H],
unless ``accumulate="native"``. So a whole weight is cut along its vocabulary while M < V, which needs no fp32 copy of
dweight, and along the tokens else.

Saved for backward: x and weight themselves, of a weight in slabs the last few, lse (8 bytes a token), and the tiles
that fit `keep_mb`.
Work: 6 MHV FLOPs for kept tiles, 8 for the others. Traffic of the softmax pass: as cross_entropy.

Sizes: M tokens, H hidden, V vocabulary, n rows of a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._once import FOR_TWO_BACKWARDS, once_differentiable
from ds_fused.ops.common._tiles import Tiling, logits_of, of_chunk, product, sum_dtype, tile, tile_elements, wide
from ds_fused.ops.losses._cross_entropy_kernels import softmax_passes
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab._slab import Slab, room_of
from ds_fused.ops.vocab.slabs import WeightSlabs, WholeWeight


def _held(kept_rows: dict[int, Tensor], source: WeightSlabs) -> dict[int, Tensor]:
    """Those that a backward finds one after the other, from the last slab on."""
    held: dict[int, Tensor] = {}
    for k in reversed(range(len(source))):
        if k not in kept_rows or not source.holds(kept_rows[k]):
            break
        held[k] = kept_rows[k]
    return held


class TwoPassFunction(torch.autograd.Function):
    """x [M, H], a weight [V, H] and labels [M] to one loss a token [M], fp32: any reduction or weighting goes on top.

    `weight` is what autograd knows of the head: the weight itself (then `slabs` is None), or, where slabs bring their
    gradient home themselves, an empty anchor that requires grad if they do. Labels are places of rows, and bias [V] and
    `class_weight` [V] in their order. The latter and `token_weights` [2, M] are given where there is smoothing too.
    `more`: lse [2, M] and right [M] as well; `entropy`: the entropy [M] of each token's softmax as well; not both. `op`
    is who speaks in an error. `native`: dweight is added up in its own dtype.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        slabs: WeightSlabs | None,
        tiles: Tiling,
        options: LossOptions,
        class_weight: Tensor | None,
        token_weights: Tensor | None,
        more: bool,
        op: str,
        entropy: bool,
        native: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        n_tokens = x.shape[0]
        softmax_fwd, _ = softmax_passes(x)
        source = WholeWeight(weight, tiles.rows) if slabs is None else slabs
        loss, lse = (x.new_empty(size, dtype=wide(x)) for size in (n_tokens, (2, n_tokens)))
        right = torch.empty_like(loss) if more else None
        entropies = torch.empty_like(loss) if entropy else None
        kept: list[Tensor] = []
        n_chunks = -(-n_tokens // tiles.tokens)
        first_kept = len(source) * n_chunks - tiles.kept
        kept_rows: dict[int, Tensor] = {}
        room = None
        for k in range(len(source)):
            rows = source.gather(k)
            if k >= len(source) - tiles.kept_slabs:
                kept_rows[k] = rows
            if k + 1 < len(source):
                source.prefetch(k + 1)
            slab = Slab(source, k, rows, x, bias, class_weight)
            for i, start in enumerate(range(0, n_tokens, tiles.tokens)):
                chunk = slice(start, start + tiles.tokens)
                if k * n_chunks + i >= first_kept:
                    kept.append(x.new_empty(tile_elements(x[chunk].shape[0], slab.rows.shape[0])))
                    room = kept[-1]
                elif room is None:
                    room = room_of(x, tiles)
                z = logits_of(room, x[chunk], slab.rows, slab.bias)
                softmax_fwd(
                    z, labels[chunk], loss[chunk], lse[:, chunk], options,
                    **slab.place, is_first=k == 0, is_last=k == len(source) - 1, right=of_chunk(right, chunk),
                    weight=slab.class_weight, token_weights=of_chunk(token_weights, chunk),
                    entropy=of_chunk(entropies, chunk),
                )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, labels, lse, class_weight, token_weights, entropies, *kept)
        ctx.slabs, ctx.tiles, ctx.options, ctx.op, ctx.overwritten = slabs, tiles, options, op, False
        ctx.native = native
        # the backward begins with them
        ctx.kept_rows = kept_rows
        if entropy:
            return loss, entropies
        if not more:
            return loss
        ctx.mark_non_differentiable(lse, right)
        return loss, lse, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, *more: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                f"{ctx.op}: a second backward, but the first wrote the gradient over the logits it had kept; pass "
                f"{FOR_TWO_BACKWARDS[ctx.op]} to compute them again each time"
            )
        x, weight, bias, labels, lse, class_weight, token_weights, entropies, *kept = ctx.saved_tensors
        dentropy = None if entropies is None else more[0]
        # a trace writes nothing, and dynamo may need two
        ctx.overwritten = len(kept) > 0 and not torch.compiler.is_compiling()
        tiles, n_tokens = ctx.tiles, x.shape[0]
        _, softmax_bwd = softmax_passes(x)
        source = WholeWeight(weight, tiles.rows) if ctx.slabs is None else ctx.slabs
        kept_rows, ctx.kept_rows = _held(ctx.kept_rows, source), {}
        if not kept_rows:
            source.prefetch(len(source) - 1)
        wants_dx, wants_dweight, wants_dbias = ctx.needs_input_grad[:3]

        # dlogits @ weight is summed over slabs, dlogits.T @ x over chunks: fp32 where there is more than one
        dx = torch.empty_like(x, dtype=wide(x) if len(source) > 1 else None) if wants_dx else None
        dbias = torch.zeros_like(bias, dtype=wide(x)) if wants_dbias else None
        room = None
        n_chunks = -(-n_tokens // tiles.tokens)
        first_kept = len(source) * n_chunks - len(kept)
        for k in reversed(range(len(source))):
            is_first = k == len(source) - 1
            rows = kept_rows.pop(k) if k in kept_rows else source.gather(k)
            if k > 0 and k - 1 not in kept_rows:
                source.prefetch(k - 1)
            slab = Slab(source, k, rows, x, bias, class_weight)
            dw = dw_sum = source.gradient(k) if wants_dweight else None
            if wants_dweight:
                dtype = sum_dtype(dw.dtype, x, n_chunks, native=ctx.native)
                dw_sum = dw if dw.dtype == dtype else torch.empty_like(dw, dtype=dtype)
            for i, start in enumerate(range(0, n_tokens, tiles.tokens)):
                chunk = slice(start, start + tiles.tokens)
                if k * n_chunks + i >= first_kept:
                    z = tile(kept[k * n_chunks + i - first_kept], x[chunk].shape[0], slab.rows.shape[0])
                else:
                    if room is None:
                        room = room_of(x, tiles)
                    z = logits_of(room, x[chunk], slab.rows, slab.bias)
                dz = z  # in place: nobody else has the tile
                softmax_bwd(
                    dloss[chunk], z, labels[chunk], lse[:, chunk], dz, ctx.options, **slab.place,
                    weight=slab.class_weight, token_weights=of_chunk(token_weights, chunk),
                    entropy=of_chunk(entropies, chunk), dentropy=of_chunk(dentropy, chunk),
                )  # fmt: skip
                if wants_dx:
                    product(dx[chunk], dz, slab.rows, add=not is_first)
                if wants_dweight:
                    product(dw_sum, dz.t(), x[chunk], add=start > 0, scale=source.share)
                if wants_dbias:
                    dbias[slab.span] += dz.sum(0, dtype=dbias.dtype)
            if wants_dweight:
                if n_tokens == 0:
                    dw.zero_()
                elif dw_sum is not dw:
                    dw.copy_(dw_sum)
                source.scatter(k, dw)
        if wants_dweight:
            source.finish()
        return (
            None if dx is None else dx.to(x.dtype),
            source.grad if wants_dweight and ctx.slabs is None else None,
            None if dbias is None else dbias.to(bias.dtype),
            None, None, None, None, None, None, None, None, None, None,
        )  # fmt: skip
