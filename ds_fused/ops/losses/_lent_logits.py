"""cross_entropy whose gradient is made in the forward, over the logits that the caller lent.

Long rows without options are shared by programs that meet (_lent_logits_parts.py). Here one program has a row. It walks
it once for the loss (see cross_entropy.py) and once more, backwards, for the gradient. The end of the row it holds in
registers meanwhile, and what it saw last of the rest it sees first again: with one row a multiprocessor, all rows that
are under way fit a GPU's L2 (132 of 128256 in bf16, less what is held: 30 MB), so that memory gives each logit once and
takes it once. Longer rows, as the same in fp32, are partly read twice.

A mean or a sum has one number as its upstream gradient. The forward takes one for granted, ``upstream``; where the
backward is given another, it scales what is there (_scale.py), which is a read and a write more.

Saved for backward: the logits, which are the gradient. Traffic per logit: 1 read + 1 write, and 1 read of L2 of what is
not held. Logits that fit HELD_BYTES are read once.

Sizes: N tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._triton import cdiv, power_of_2, row_stride, warps_for
from ds_fused.ops.losses._lent_logits_parts import can_share, lent_logits_in_parts
from ds_fused.ops.losses._loss import LossOptions, dloss_of_tokens, reduced, weighted
from ds_fused.ops.losses._scale import scaled
from ds_fused.ops.losses._softmax_parts import capped, online

# not yet measured: how much of a row is held; how much is walked at a time, no more than that, STAGES of which are in
# flight. With PER_THREAD elements a long row has 1024 threads of 64 registers: no second row fits the multiprocessor.
# Options take registers too, so with any of them all three are halved
HELD_BYTES = 32768
WALK_BYTES, STAGES = 16384, 4
PER_THREAD = 16


@triton.jit
def _dlogits(x, wanted, peak, rest, on_lse, of_all, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Raw logits to their gradient, for an upstream gradient of 1 and wanted probabilities times weights."""
    z, slope = capped(x, logit_scale, softcap, HAS_SOFTCAP)
    # in base 2 (times log2(e)), so that the rest is taken off where the factor is multiplied
    p = tl.exp2((z - peak) * 1.4426950408889634 - rest * 1.4426950408889634)
    # the difference first: what is left of it may be small
    return ((p * of_all - wanted) + p * on_lse) * slope


@triton.jit
def _lent_logits_kernel(
    logits_ptr,  # [N, V]: read, then overwritten by their gradient
    labels_ptr, loss_ptr, dloss_ptr,  # [N]
    lse_ptr,  # [2, N]: peak and rest
    right_ptr,  # [N]
    weight_ptr, token_weights_ptr,  # [V], [2, N]: see _cross_entropy_kernels.py
    logits_stride, dloss_stride, lse_stride, token_weights_stride,
    n_cols, n_walked,  # whole blocks; the columns after them are held
    ignore_index,
    logit_scale, softcap, z_loss, on_label, on_each, wanted_label, wanted_other,
    HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr,
    HAS_ACCURACY: tl.constexpr, HELD: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    cols = tl.arange(0, BLOCK)
    held_cols = n_walked + tl.arange(0, HELD)
    mask = held_cols < n_cols
    label = tl.load(labels_ptr + row)
    if not HAS_SCALE:
        logit_scale = 1.0  # no instruction for it
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(lse_ptr + lse_stride + row, 0.0)
        if HAS_ACCURACY:
            tl.store(right_ptr + row, 0.0)
        for start in range(0, n_walked, BLOCK):
            tl.store(row_ptr + start + cols, tl.zeros([BLOCK], tl.float32))
        tl.store(row_ptr + held_cols, tl.zeros([HELD], tl.float32), mask=mask)
    else:
        # asked for first, so that they come while the rest is walked
        held = tl.load(row_ptr + held_cols, mask=mask, other=0.0)
        x_label = tl.load(row_ptr + label.to(tl.int64)).to(tl.float32)
        dloss = tl.load(dloss_ptr + row * dloss_stride)
        of_label, of_all = 1.0, 1.0
        if HAS_WEIGHT:
            of_label, of_all = tl.load(token_weights_ptr + row), tl.load(token_weights_ptr + token_weights_stride + row)

        # finite, since -inf - -inf is not a number; no logit lies below it
        top = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        each = tl.zeros([BLOCK], tl.float32)
        first = tl.zeros([BLOCK], tl.int32)  # the block in which a lane saw its top first
        for start in tl.range(0, n_walked, BLOCK, num_stages=STAGES):
            x = tl.load(row_ptr + start + cols).to(tl.float32)
            z, _ = capped(x, logit_scale, softcap, HAS_SOFTCAP)
            if HAS_ACCURACY:
                first = tl.where(z > top, start, first)
            top, total = online(top, total, z)
            if HAS_WEIGHT:
                each += z * tl.load(weight_ptr + start + cols)
            elif HAS_SMOOTHING:
                each += z
        # all threads have the label's logit before any of them overwrites it
        tl.debug_barrier()
        z_label, _ = capped(x_label, logit_scale, softcap, HAS_SOFTCAP)
        picked = on_label * of_label * z_label

        x_held = held.to(tl.float32)
        z_held, _ = capped(x_held, logit_scale, softcap, HAS_SOFTCAP)
        w_held = x_held  # of no meaning where there are no weights
        if HAS_WEIGHT:
            w_held = tl.load(weight_ptr + held_cols, mask=mask, other=0.0)
            picked += on_each * (tl.sum(each, 0) + tl.sum(tl.where(mask, z_held * w_held, 0.0), 0))
        elif HAS_SMOOTHING:
            picked += on_each * (tl.sum(each, 0) + tl.sum(tl.where(mask, z_held, 0.0), 0))
        # after the cap, which would make a small finite number of -inf
        z_held = tl.where(mask, z_held, float("-inf"))
        peak = tl.maximum(tl.max(top, 0), tl.max(z_held, 0))
        if HAS_ACCURACY:
            best = tl.min(tl.where(top == peak, first + cols, n_cols), 0)
            best = tl.minimum(best, tl.min(tl.where(z_held == peak, held_cols, n_cols), 0))
            tl.store(right_ptr + row, (best == label).to(tl.float32))
        rest = tl.log(tl.sum(total * tl.exp(top - peak), 0) + tl.sum(tl.exp(z_held - peak), 0))
        lse = peak + rest
        tl.store(lse_ptr + row, peak)
        tl.store(lse_ptr + lse_stride + row, rest)
        # this order keeps the bits of a small loss under large logits
        tl.store(loss_ptr + row, (of_all * peak - picked) + of_all * rest + z_loss * of_label * lse * lse)

        on_lse = 2.0 * z_loss * of_label * lse
        wanted_held = wanted_other
        if HAS_WEIGHT:
            wanted_held = w_held * wanted_other
            wanted_label *= tl.load(weight_ptr + label.to(tl.int64))
        dx_held = _dlogits(x_held, wanted_held, peak, rest, on_lse, of_all, logit_scale, softcap, HAS_SOFTCAP)
        # what is written leaves L2 first: its room is for rows that have yet to be read again
        tl.store(row_ptr + held_cols, dloss * dx_held, mask=mask, eviction_policy="evict_first")
        for back in tl.range(BLOCK, n_walked + BLOCK, BLOCK, num_stages=STAGES):
            places = n_walked - back + cols
            x = tl.load(row_ptr + places).to(tl.float32)
            wanted = wanted_other
            if HAS_WEIGHT:
                wanted = wanted_other * tl.load(weight_ptr + places)
            dx = _dlogits(x, wanted, peak, rest, on_lse, of_all, logit_scale, softcap, HAS_SOFTCAP)
            tl.store(row_ptr + places, dloss * dx, eviction_policy="evict_first")
        # the label by itself, over what was written as of any other column: no thread asks of each which it is
        dx_label = _dlogits(x_label, wanted_label, peak, rest, on_lse, of_all, logit_scale, softcap, HAS_SOFTCAP)
        tl.debug_barrier()
        tl.store(row_ptr + label.to(tl.int64), dloss * dx_label)


def lent_logits(
    logits: Tensor,  # [N, V], overwritten by the gradient
    labels: Tensor,  # [N]
    loss: Tensor,  # [N] fp32, written
    lse: Tensor,  # [2, N] fp32, written
    dloss: Tensor,  # [N] fp32, any stride: an expanded scalar is not copied
    options: LossOptions,
    *,
    right: Tensor | None = None,  # [N] fp32, written
    weight: Tensor | None = None,  # [V] fp32
    token_weights: Tensor | None = None,  # [2, N] fp32, see weights_of_tokens
) -> None:
    n, n_vocab = logits.shape
    if n == 0:
        return
    smoothing = options.label_smoothing
    is_plain = options.softcap is None and not smoothing and weight is None and right is None
    # by another sign -inf, which stands for what no row has, would be inf
    shares = is_plain and options.logit_scale > 0.0 and n_vocab * logits.element_size() > HELD_BYTES
    if shares and can_share(logits):
        lent_logits_in_parts(logits, labels, loss, lse, dloss, options)
        return
    share = 1 if is_plain else 2
    size = share * logits.element_size()
    block = WALK_BYTES // size
    n_walked = max(0, cdiv(n_vocab - HELD_BYTES // size, block) * block)
    held = power_of_2(n_vocab - n_walked)
    block = block if n_walked else held
    warps = warps_for(max(held, block), PER_THREAD // share)
    launch(
        _lent_logits_kernel, (n,),
        logits, labels, loss, dloss, lse,
        # a tensor that stands for one that is not there is never touched
        loss if right is None else right, loss if weight is None else weight,
        lse if token_weights is None else token_weights,
        row_stride(logits), dloss.stride(0), row_stride(lse),
        row_stride(lse if token_weights is None else token_weights),
        n_vocab, n_walked, options.ignore_index,
        float(options.logit_scale), float(options.softcap or 1.0), float(options.z_loss),
        1.0 - smoothing, smoothing / n_vocab,
        1.0 - smoothing + smoothing / n_vocab, smoothing / n_vocab,
        HAS_SCALE=options.logit_scale != 1.0, HAS_SOFTCAP=options.softcap is not None, HAS_SMOOTHING=smoothing > 0.0,
        HAS_WEIGHT=weight is not None, HAS_ACCURACY=right is not None,
        HELD=held, BLOCK=block, STAGES=STAGES, num_warps=warps,
    )  # fmt: skip


class LentLogitsFunction(torch.autograd.Function):
    """Logits [N, V] and labels [N] to the mean or the sum of the losses, fp32 []; logits are their gradient then.

    ``upstream``: what the gradient is made for. ``of_token`` [N], ``in_kernel``: see weights_of_tokens. ``total``: what
    a mean divides by. ``more``: lse [2, N] and right [N] as well.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        labels: Tensor,
        options: LossOptions,
        reduction: str,
        upstream: float,
        total: Tensor,
        of_token: Tensor | None,
        in_kernel: tuple[Tensor | None, Tensor | None],
        more: bool,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        n = logits.shape[0]
        loss = torch.empty(n, dtype=torch.float32, device=logits.device)
        lse = torch.empty(2, n, dtype=torch.float32, device=logits.device)
        right = torch.empty_like(loss) if more else None
        dloss = dloss_of_tokens(loss.new_full((), upstream), n, total, of_token, in_kernel, reduction)
        lent_logits(
            logits, labels, loss, lse, dloss, options, right=right, weight=in_kernel[0], token_weights=in_kernel[1]
        )
        # whoever else saved these logits gets autograd's error instead of a wrong gradient
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits)
        ctx.upstream, ctx.spent = upstream, False
        result = reduced(weighted(loss, of_token, in_kernel), loss.shape, total, reduction)
        if not more:
            return result
        ctx.mark_non_differentiable(lse, right)
        return result, lse, right

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "cross_entropy: a second backward, but the first handed out the gradient that the forward had written "
                "over the logits; pass grad_in_forward=False and overwrite_logits=False to keep them"
            )
        ctx.spent = True
        (logits,) = ctx.saved_tensors
        return scaled(logits.detach(), dloss, ctx.upstream), None, None, None, None, None, None, None, None
