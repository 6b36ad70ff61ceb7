"""The softmax pass of the cross entropies, forward and backward: kernels and their launchers.

What they compute is said in cross_entropy.py. They see class weights only where there is smoothing too.

On demand the softmax pass also takes the entropy H of softmax(z), for linear_log_probs. With u = max(z) - z no term of
it is negative, so nothing cancels; it costs a third accumulator, hence a switch of the kernel:

    H  = (lse - max(z)) + sum(softmax(z) * u)
    dz = -dH * softmax(z) * (log(softmax(z)) + H)

lse is held as two numbers, the maximum and the rest, since one fp32 would round exp(z - lse) by 1e-5 where the logits
are some hundreds.

Sizes: N tokens, V vocabulary. A *slab* is part of the vocabulary: the pass may see the columns of a row in several
slabs, one after the other; loss and lse carry the running state in between.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common import _triton
from ds_fused.ops.common._launch import Kept, Ready, launch_ready, ready
from ds_fused.ops.common._triton import cdiv, power_of_2, row_stride, runs_kernels, warps_for
from ds_fused.ops.losses._loss import LossOptions, cross_entropy_bwd_torch, cross_entropy_fwd_torch
from ds_fused.ops.losses._softmax_parts import capped, dz_of_entropy, dz_of_loss, online, online_entropy

# forward: one program walks one row, STAGES blocks of it are in flight; backward: one program a block. Small blocks for
# the sake of slabs, whose rows end soon: of 16896 columns on an H200 87 and 144 us, by blocks of 4096 111 and 151. At
# vocabularies of 128256 and 32000 on an H100: forward 1.3 % from best and best, backward 0.1 % from best both times
# (benchmarks/results/h100/tune.csv)
FWD_BLOCK, FWD_STAGES, FWD_PER_THREAD = 2048, 4, 32
BWD_BLOCK, BWD_PER_THREAD = 2048, 16

_forwards: Kept[Ready] = Kept()
_backwards: Kept[Ready] = Kept()


@triton.jit
def _cross_entropy_fwd_kernel(
    logits_ptr,  # [N, n_cols]
    labels_ptr, loss_ptr, entropy_ptr,  # [N]
    lse_ptr,  # [2, N]: peak and rest
    right_ptr,  # [N]: 1 where no column's z is above the label's, nor equal and before it
    weight_ptr,  # [n_cols]: of the classes
    token_weights_ptr,  # [2, N]: of the label; of all that a token wants
    logits_stride, lse_stride, token_weights_stride,
    n_cols, first_id,  # the columns are the vocabulary ids first_id, first_id + 1, ...
    ignore_index,
    logit_scale, softcap, z_loss, on_label, on_each,  # weights of z[label] and of every z
    HAS_SOFTCAP: tl.constexpr, HAS_SMOOTHING: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_ACCURACY: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    IS_FIRST: tl.constexpr, IS_LAST: tl.constexpr,  # slab of the row
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    logit_scale = tl.cast(logit_scale, tl.float32)
    on_each = tl.cast(on_each, tl.float32)
    on_label = tl.cast(on_label, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    z_loss = tl.cast(z_loss, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(lse_ptr + lse_stride + row, 0.0)
        if HAS_ACCURACY:
            tl.store(right_ptr + row, 0.0)
        if HAS_ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
    else:
        row_ptr = logits_ptr + row * logits_stride
        # asked for before the walk, which hides how long they take
        col = label.to(tl.int64) - first_id
        here = (col >= 0) & (col < n_cols)
        x_of_label = tl.load(row_ptr + col, mask=here, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            of_label, of_all = tl.load(token_weights_ptr + row), tl.load(token_weights_ptr + token_weights_stride + row)
        if not IS_FIRST:
            picked_before = tl.load(loss_ptr + row)
            before, rest_before = tl.load(lse_ptr + row), tl.load(lse_ptr + lse_stride + row)
            if HAS_ACCURACY:
                right_before = tl.load(right_ptr + row)
            if HAS_ENTROPY:
                entropy_before = tl.load(entropy_ptr + row)
        cols = tl.arange(0, BLOCK)
        # finite, since -inf - -inf is not a number; no logit lies below it
        top = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        each = tl.zeros([BLOCK], tl.float32)
        first = tl.zeros([BLOCK], tl.int32)  # the block in which a lane saw its top first
        below = tl.zeros([BLOCK], tl.float32)
        # whole blocks carry no mask: one on an odd n_cols would cut every load down to single elements
        n_whole = (n_cols // BLOCK) * BLOCK
        for start in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
            z, _ = capped(tl.load(row_ptr + start + cols).to(tl.float32), logit_scale, softcap, HAS_SOFTCAP)
            if HAS_ACCURACY:
                first = tl.where(z > top, start, first)
            if HAS_ENTROPY:
                top, total, below = online_entropy(top, total, below, z)
            else:
                top, total = online(top, total, z)
            if HAS_WEIGHT:
                each += z * tl.load(weight_ptr + start + cols)
            elif HAS_SMOOTHING:
                each += z
        if n_whole < n_cols:
            mask = n_whole + cols < n_cols
            x = tl.load(row_ptr + n_whole + cols, mask=mask, other=0.0).to(tl.float32)
            z, _ = capped(x, logit_scale, softcap, HAS_SOFTCAP)
            # after the cap, which would make a small finite number of -inf
            if HAS_ACCURACY:
                first = tl.where(mask & (z > top), n_whole, first)
            masked = tl.where(mask, z, float("-inf"))
            if HAS_ENTROPY:
                top, total, below = online_entropy(top, total, below, masked)
            else:
                top, total = online(top, total, masked)
            if HAS_WEIGHT:
                each += tl.where(mask, z, 0.0) * tl.load(weight_ptr + n_whole + cols, mask=mask, other=0.0)
            elif HAS_SMOOTHING:
                each += tl.where(mask, z, 0.0)

        peak = tl.max(top, 0)
        shrunk = tl.exp(top - peak)
        total_sum = tl.sum(total * shrunk, 0)
        if HAS_ENTROPY:
            below_sum = tl.sum((below + total * (peak - top)) * shrunk, 0)
        z, _ = capped(x_of_label, logit_scale, softcap, HAS_SOFTCAP)
        if HAS_WEIGHT:
            on_label *= of_label
        picked = tl.where(here, on_label * z, 0.0)
        if HAS_ACCURACY:
            right = (here & (tl.min(tl.where(top == peak, first + cols, n_cols), 0) == col)).to(tl.float32)
            if not IS_FIRST:
                right = tl.where(peak > before, right, right_before)
            tl.store(right_ptr + row, right)
        if HAS_SMOOTHING:
            picked += on_each * tl.sum(each, 0)

        # between slabs `loss` holds what is picked so far, peak and rest are those of the columns so far; so is the sum
        # in `entropy`
        if not IS_FIRST:
            picked += picked_before
            most = tl.maximum(before, peak)
            total_before = tl.exp(rest_before)
            if HAS_ENTROPY:
                below_before = entropy_before + total_before * (most - before)
                below_sum = (below_sum + total_sum * (most - peak)) * tl.exp(peak - most)
                below_sum += below_before * tl.exp(before - most)
            total_sum = total_sum * tl.exp(peak - most) + total_before * tl.exp(before - most)
            peak = most
        rest = tl.log(total_sum)
        tl.store(lse_ptr + row, peak)
        tl.store(lse_ptr + lse_stride + row, rest)
        if IS_LAST:
            lse = peak + rest
            if HAS_WEIGHT:
                tl.store(loss_ptr + row, (of_all * peak - picked) + of_all * rest + z_loss * of_label * lse * lse)
            else:
                # this order keeps the bits of a small loss under large logits
                tl.store(loss_ptr + row, (peak - picked) + rest + z_loss * lse * lse)
        else:
            tl.store(loss_ptr + row, picked)
        if HAS_ENTROPY:
            if IS_LAST:
                tl.store(entropy_ptr + row, rest + below_sum / total_sum)
            else:
                tl.store(entropy_ptr + row, below_sum)


@triton.jit
def _cross_entropy_bwd_kernel(
    dloss_ptr, labels_ptr, entropy_ptr, dentropy_ptr,  # [N]
    lse_ptr,  # [2, N]: peak and rest
    logits_ptr, dlogits_ptr,  # [N, n_cols], may be one and the same
    weight_ptr, token_weights_ptr,  # [n_cols], [2, N]: see the forward
    count_ptr,  # []: what dloss is to be divided by
    dloss_stride, dentropy_stride, lse_stride, logits_stride, dlogits_stride, token_weights_stride,
    n_cols, n_blocks, first_id,
    ignore_index,
    logit_scale, softcap, z_loss, wanted_label, wanted_other,  # probabilities: without z_loss, dz is p - wanted
    HAS_SOFTCAP: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    wanted_label = tl.cast(wanted_label, tl.float32)
    wanted_other = tl.cast(wanted_other, tl.float32)
    z_loss = tl.cast(z_loss, tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // n_blocks
    start = (pid % n_blocks).to(tl.int32) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    mask = cols < n_cols
    whole = start + BLOCK <= n_cols
    in_ptr = logits_ptr + row * logits_stride
    out_ptr = dlogits_ptr + row * dlogits_stride

    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        # zeros, whatever the upstream gradient is: with all tokens ignored the mean's is infinite
        tl.store(out_ptr + cols, tl.zeros([BLOCK], tl.float32), mask=mask)
    else:
        dloss = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
        if HAS_COUNT:
            dloss = tl.div_rn(dloss, tl.load(count_ptr).to(tl.float32))
        peak, rest = tl.load(lse_ptr + row), tl.load(lse_ptr + lse_stride + row)
        col = (label.to(tl.int64) - first_id).to(tl.int32)  # compared with every column: at half the cost of int64
        on_lse = 2.0 * z_loss * (peak + rest)
        if HAS_ENTROPY:
            entropy = tl.load(entropy_ptr + row)
            dentropy = tl.load(dentropy_ptr + row * dentropy_stride).to(tl.float32)
        if HAS_WEIGHT:
            of_label, of_all = tl.load(token_weights_ptr + row), tl.load(token_weights_ptr + token_weights_stride + row)
            w = tl.load(weight_ptr + cols, mask=mask, other=0.0)
            x = tl.load(in_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            z, slope = capped(x, logit_scale, softcap, HAS_SOFTCAP)
            p = tl.exp((z - peak) - rest)
            wanted = w * tl.where(cols == col, wanted_label, wanted_other)
            dz = (p * of_all - wanted) + p * (on_lse * of_label)
            tl.store(out_ptr + cols, dloss * dz * slope, mask=mask)
        elif whole:  # without a mask: see the forward
            z, slope = capped(tl.load(in_ptr + cols).to(tl.float32), logit_scale, softcap, HAS_SOFTCAP)
            dz = dloss * dz_of_loss(z, peak, rest, cols == col, wanted_label, wanted_other, on_lse)
            if HAS_ENTROPY:
                dz += dentropy * dz_of_entropy(z, peak, rest, entropy)
            tl.store(out_ptr + cols, dz * slope)
        else:
            x = tl.load(in_ptr + cols, mask=mask, other=0.0).to(tl.float32)
            z, slope = capped(x, logit_scale, softcap, HAS_SOFTCAP)
            dz = dloss * dz_of_loss(z, peak, rest, cols == col, wanted_label, wanted_other, on_lse)
            if HAS_ENTROPY:
                dz += dentropy * dz_of_entropy(z, peak, rest, entropy)
            tl.store(out_ptr + cols, dz * slope, mask=mask)


def cross_entropy_fwd(
    logits: Tensor,  # [N, n_cols]: one slab of the vocabulary, or all of it
    labels: Tensor,  # [N]
    loss: Tensor,  # [N] fp32, written; between slabs the state
    lse: Tensor,  # [2, N] fp32, likewise
    options: LossOptions,
    *,
    n_vocab: int,
    first_id: int = 0,
    is_first: bool = True,
    is_last: bool = True,
    right: Tensor | None = None,  # [N] fp32, written; between slabs the state
    weight: Tensor | None = None,  # [n_cols] fp32: the slab's classes
    token_weights: Tensor | None = None,  # [2, N] fp32, see weights_of_tokens
    entropy: Tensor | None = None,  # [N] fp32, written; between slabs the state
) -> None:
    n, n_cols = logits.shape
    if n == 0:
        return
    # a tensor that stands for one that is not there is never touched
    at_labels = lse if token_weights is None else token_weights
    key = None
    if not torch.compiler.is_compiling():
        facts = n_vocab, first_id, is_first, is_last, right is None, weight is None, entropy is None
        constants = FWD_BLOCK, FWD_STAGES, FWD_PER_THREAD, _triton.LANES
        key = logits.shape, logits.stride(0), lse.stride(0), at_labels.stride(0), options, facts, constants
    it = _forwards.get(key)
    if it is None:
        block = min(FWD_BLOCK, power_of_2(n_cols))
        smoothing = options.label_smoothing
        it = _forwards.keep(
            key,
            ready(
                _cross_entropy_fwd_kernel, (n,),
                row_stride(logits), row_stride(lse), row_stride(at_labels), n_cols, first_id, options.ignore_index,
                float(options.logit_scale), float(options.softcap or 1.0), float(options.z_loss),
                1.0 - smoothing, smoothing / n_vocab,
                HAS_SOFTCAP=options.softcap is not None, HAS_SMOOTHING=smoothing > 0.0,
                HAS_WEIGHT=weight is not None, HAS_ACCURACY=right is not None, HAS_ENTROPY=entropy is not None,
                IS_FIRST=is_first, IS_LAST=is_last,
                BLOCK=block, STAGES=FWD_STAGES, num_warps=warps_for(block, FWD_PER_THREAD),
            ),
        )  # fmt: skip
    launch_ready(
        it, logits, labels, loss, entropy, lse, loss if right is None else right, loss if weight is None else weight,
        at_labels,
    )  # fmt: skip


def cross_entropy_bwd(
    dloss: Tensor,  # [N], any stride: an expanded scalar is not copied; [] as well
    logits: Tensor,  # [N, n_cols]
    labels: Tensor,
    lse: Tensor,  # [2, N], over all slabs
    dlogits: Tensor,  # [N, n_cols], written; may be logits itself
    options: LossOptions,
    *,
    n_vocab: int,
    first_id: int = 0,
    weight: Tensor | None = None,  # [n_cols] fp32
    token_weights: Tensor | None = None,  # [2, N] fp32
    entropy: Tensor | None = None,  # [N] fp32, over all slabs
    dentropy: Tensor | None = None,  # [N], any stride
    count: Tensor | None = None,  # [] int64, by which dloss is to be divided
) -> None:
    n, n_cols = logits.shape
    if n == 0:
        return
    at_labels = lse if token_weights is None else token_weights
    key = None
    if not torch.compiler.is_compiling():
        strides = dloss.stride(), lse.stride(0), logits.stride(0), dlogits.stride(0), at_labels.stride(0)
        entropies = None if dentropy is None else dentropy.stride()
        facts = n_vocab, first_id, weight is None, entropies, count is None
        key = logits.shape, strides, options, facts, BWD_BLOCK, BWD_PER_THREAD, _triton.LANES
    it = _backwards.get(key)
    if it is None:
        block = min(BWD_BLOCK, power_of_2(n_cols))
        n_blocks = cdiv(n_cols, block)
        smoothing = options.label_smoothing
        it = _backwards.keep(
            key,
            ready(
                _cross_entropy_bwd_kernel, (n * n_blocks,),
                dloss.stride(0) if dloss.ndim else 0, 0 if dentropy is None else dentropy.stride(0),
                row_stride(lse), row_stride(logits), row_stride(dlogits), row_stride(at_labels),
                n_cols, n_blocks, first_id, options.ignore_index,
                float(options.logit_scale), float(options.softcap or 1.0), float(options.z_loss),
                1.0 - smoothing + smoothing / n_vocab, smoothing / n_vocab,
                HAS_SOFTCAP=options.softcap is not None, HAS_WEIGHT=weight is not None,
                HAS_ENTROPY=dentropy is not None, HAS_COUNT=count is not None,
                BLOCK=block, num_warps=warps_for(block, BWD_PER_THREAD),
            ),
        )  # fmt: skip
    launch_ready(
        it, dloss, labels, entropy, dentropy, lse, logits, dlogits, lse if weight is None else weight, at_labels, count
    )


def softmax_passes(x: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    """The forward's and the backward's for tokens x: kernels, or PyTorch where none can run."""
    if runs_kernels(x):
        return cross_entropy_fwd, cross_entropy_bwd
    return cross_entropy_fwd_torch, cross_entropy_bwd_torch
