"""linear_cross_entropy under a weight that is not trained: the gradient of x is made in the forward, slab by slab.

Of a slab, a tile of its logits z, and of what the softmax passes know of all columns so far:

    p [T, n]    = exp(z - lse so far), and 0 where the label is      over z
    dx [T, H]   = exp(lse before - lse so far) * dx + (dz/dlogit * p) @ rows

which is the online softmax of FlashAttention (Dao et al. 2022), with the weight in the place of keys and values. After
the last slab dx is the softmax's part of the gradient but for the label's column, whose row of the weight was kept:

    dx = (1 + 2 * z_loss * lse) * dx + (p[y] * (1 + 2 * z_loss * lse) - (1 - label_smoothing)) * dz/dlogit * weight[y]
         - label_smoothing * logit_scale * mean(weight)

so a small difference of p[y] to 1 is taken in fp32. Each slab is looked at once, each logit is computed once and none
is kept. The upstream gradient of each token, whatever it is, multiplies its row of dx in the backward.

Saved for backward: dx, in x's dtype (fp16: fp32, for the loss scale comes later), and which tokens are ignored.
Work: 4 MHV FLOPs, all in the forward. Traffic: of the softmax passes 2 reads and 1 write of z; of dx 2 reads and 2
writes in fp32 for each slab.

Sizes: M tokens, T of them in a chunk, H hidden, V vocabulary, n rows of a slab.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._tiles import Tiling, logits_of, of_chunk, product, wide
from ds_fused.ops.losses._cross_entropy_kernels import softmax_passes
from ds_fused.ops.losses._loss import LossOptions, capped_torch, columns
from ds_fused.ops.vocab._slab import Slab, room_of
from ds_fused.ops.vocab.slabs import WeightSlabs


def takes(options: LossOptions) -> bool:
    """Whether the gradient is a sum as above: under a softcap each row has its own part of the smoothing."""
    return not (options.label_smoothing and options.softcap is not None)


class FrozenHeadFunction(torch.autograd.Function):
    """x [M, H] and labels [M] to one loss a token [M], fp32; with `more` lse [2, M] and right [M] as well."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        source: WeightSlabs,
        bias: Tensor | None,
        labels: Tensor,
        tiles: Tiling,
        options: LossOptions,
        more: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        n_tokens = x.shape[0]
        softmax_fwd, softmax_bwd = softmax_passes(x)
        loss, lse = (x.new_empty(size, dtype=wide(x)) for size in (n_tokens, (2, n_tokens)))
        right = torch.empty_like(loss) if more else None
        parts = _Parts(x, source, options)
        room = room_of(x, tiles)
        # p alone: no label, nothing but the softmax
        bare = LossOptions(options.ignore_index, softcap=options.softcap, logit_scale=options.logit_scale)
        ones = torch.ones_like(loss)
        # labels that lie in no slab, but ignored ones, which stay
        ignored = labels == options.ignore_index
        nowhere = torch.where(ignored, labels, -1 if options.ignore_index != -1 else -2)
        for k in range(len(source)):
            rows = source.gather(k)
            if k + 1 < len(source):
                source.prefetch(k + 1)
            slab = Slab(source, k, rows, x, bias, None)
            parts.open(slab)
            for start in range(0, n_tokens, tiles.tokens):
                chunk = slice(start, start + tiles.tokens)
                z = logits_of(room, x[chunk], slab.rows, slab.bias)
                before = lse[:, chunk].clone() if k > 0 else None
                softmax_fwd(
                    z, labels[chunk], loss[chunk], lse[:, chunk], options, **slab.place,
                    is_first=k == 0, is_last=k == len(source) - 1, right=of_chunk(right, chunk),
                )  # fmt: skip
                column, here = parts.label(z, labels[chunk], chunk, slab)
                softmax_bwd(ones[chunk], z, nowhere[chunk], lse[:, chunk], z, bare, **slab.place)
                z.scatter_(1, column, z.gather(1, column).masked_fill_(here, 0.0))
                parts.add(z, chunk, before, lse[:, chunk], slab)
        ctx.save_for_backward(parts.whole(lse, ignored), ignored)
        ctx.dtype = x.dtype
        if not more:
            return loss
        ctx.mark_non_differentiable(lse, right)
        return loss, lse, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        dx, ignored = ctx.saved_tensors
        # with all tokens ignored the mean's upstream gradient is infinite
        dloss = dloss.masked_fill(ignored, 0.0)
        return (dx * dloss[:, None]).to(ctx.dtype), None, None, None, None, None, None


class _Parts:
    """What dx is made of, slab after slab."""

    def __init__(self, x: Tensor, source: WeightSlabs, options: LossOptions) -> None:
        self.x, self.options, self.source = x, options, source
        self.dx = torch.empty_like(x, dtype=wide(x), memory_format=torch.contiguous_format)
        self.label_rows = torch.zeros_like(x, memory_format=torch.contiguous_format)
        self.label_z = self.dx.new_zeros(x.shape[0])
        self.sum = self.dx.new_zeros(x.shape[1]) if options.label_smoothing else None

    def open(self, slab: Slab) -> None:
        if self.sum is not None:
            self.sum += slab.rows.sum(0, dtype=self.sum.dtype)

    def label(self, z: Tensor, labels: Tensor, chunk: slice, slab: Slab) -> tuple[Tensor, Tensor]:
        """Keeps the labels' logits and rows. Their columns [T, 1], some column where a label isn't here [T, 1]."""
        column, here = (t[:, None] for t in columns(labels, slab.place["first_id"], z.shape[1]))
        # to count those that are here would make the host wait
        torch.where(here[:, 0], z.gather(1, column)[:, 0], self.label_z[chunk], out=self.label_z[chunk])
        rows = self.label_rows[chunk]
        rows.copy_(torch.where(here, slab.rows[column[:, 0]], rows))
        return column, here

    def add(self, p: Tensor, chunk: slice, before: Tensor | None, lse: Tensor, slab: Slab) -> None:
        dx = self.dx[chunk]
        if before is not None:
            # a column of -inf alone has no part yet: -inf - -inf
            shrunk = (before - lse).sum(0).exp_().nan_to_num_(0.0)
            dx.mul_(shrunk[:, None])
        product(dx, p, slab.rows, add=before is not None)

    def whole(self, lse: Tensor, ignored: Tensor) -> Tensor:
        options, dx = self.options, self.dx
        peak, rest = lse
        z, slope = capped_torch(self.label_z, options)
        of_softmax = 1.0 + 2.0 * options.z_loss * (peak + rest) if options.z_loss else 1.0
        of_label = ((z - peak - rest).exp() * of_softmax - (1.0 - options.label_smoothing)) * slope
        if options.z_loss:
            dx.mul_(of_softmax[:, None])
        dx.addcmul_(self.label_rows.to(dx.dtype), of_label.masked_fill(ignored, 0.0)[:, None])
        if self.sum is not None:
            each = self.sum * (options.label_smoothing * options.logit_scale / self.source.shape[0])
            dx.sub_(torch.where(ignored[:, None], 0.0, each))
        return dx if self.x.dtype == torch.float16 else dx.to(self.x.dtype)
