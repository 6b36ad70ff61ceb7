"""Loss, log-sum-exp and entropy of tokens from what each rank's columns of their logits gave.

With class weights the loss is that of cross_entropy.py, whose weights of tokens come here too.

Sizes: N tokens, W ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv
from ds_fused.ops.losses._loss import LossOptions

MERGE_BLOCK = 256


@triton.jit
def _merge_kernel(
    # [W, 3 to 5, N]: picked, peak, rest of each rank's columns; whether the label is their argmax; the sum of their
    # exponentials times the distance from the peak
    parts_ptr,
    labels_ptr, loss_ptr, right_ptr, entropy_ptr,  # [N]
    lse_ptr,  # [2, N]
    token_weights_ptr,  # [2, N]: of the label; of all that a token wants
    lse_stride, token_weights_stride, n_tokens, n_parts, ignore_index, z_loss,
    HAS_WEIGHT: tl.constexpr, HAS_ACCURACY: tl.constexpr, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < n_tokens
    ignored = tl.load(labels_ptr + token, mask=mask, other=0) == ignore_index
    picked = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    peak = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    right = tl.zeros([BLOCK], tl.float32)
    below = tl.zeros([BLOCK], tl.float32)
    n_numbers = 3 + HAS_ACCURACY + HAS_ENTROPY
    part_ptr = parts_ptr + token
    for _ in range(n_parts):
        picked += tl.load(part_ptr, mask=mask, other=0.0)
        part_peak = tl.load(part_ptr + n_tokens, mask=mask, other=0.0)
        part_rest = tl.load(part_ptr + 2 * n_tokens, mask=mask, other=0.0)
        if HAS_ACCURACY:
            part_right = tl.load(part_ptr + 3 * n_tokens, mask=mask, other=0.0)
            right = tl.where(part_peak > peak, part_right, right)  # of equal peaks the first
        most = tl.maximum(peak, part_peak)
        part_total = tl.exp(part_rest)
        if HAS_ENTROPY:
            part_below = tl.load(part_ptr + (n_numbers - 1) * n_tokens, mask=mask, other=0.0)
            below = (below + total * (most - peak)) * tl.exp(peak - most)
            below += (part_below + part_total * (most - part_peak)) * tl.exp(part_peak - most)
        total = total * tl.exp(peak - most) + part_total * tl.exp(part_peak - most)
        peak = most
        part_ptr += n_numbers * n_tokens
    rest = tl.log(total)
    lse = peak + rest
    if HAS_WEIGHT:
        of_label = tl.load(token_weights_ptr + token, mask=mask, other=0.0)
        of_all = tl.load(token_weights_ptr + token_weights_stride + token, mask=mask, other=0.0)
        loss = (of_all * peak - picked) + of_all * rest + z_loss * of_label * lse * lse
    else:
        loss = (peak - picked) + rest + z_loss * lse * lse
    tl.store(loss_ptr + token, tl.where(ignored, 0.0, loss), mask=mask)
    if HAS_ACCURACY:
        tl.store(right_ptr + token, tl.where(ignored, 0.0, right), mask=mask)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + token, tl.where(ignored, 0.0, rest + below / total), mask=mask)
    tl.store(lse_ptr + token, tl.where(ignored, 0.0, peak), mask=mask)
    tl.store(lse_ptr + lse_stride + token, tl.where(ignored, 0.0, rest), mask=mask)


def merge(
    parts: Tensor,  # [W, 3, N], contiguous; one number more with `right`, and one with `entropy`
    labels: Tensor,
    loss: Tensor,  # [N], written
    lse: Tensor,  # [2, N], written
    options: LossOptions,
    *,
    right: Tensor | None = None,  # [N], written
    entropy: Tensor | None = None,  # [N], written
    token_weights: Tensor | None = None,  # [2, N], see weights_of_tokens
) -> None:
    """Loss, lse, whether the label is the argmax, and the entropy, from what the ranks' columns gave."""
    n_parts, _, n_tokens = parts.shape
    launch(
        _merge_kernel, (cdiv(n_tokens, MERGE_BLOCK),),
        # a tensor that stands for one that is not there is never touched
        parts, labels, loss, loss if right is None else right, loss if entropy is None else entropy, lse,
        lse if token_weights is None else token_weights,
        lse.stride(0), 0 if token_weights is None else token_weights.stride(0),
        n_tokens, n_parts, options.ignore_index, float(options.z_loss),
        HAS_WEIGHT=token_weights is not None, HAS_ACCURACY=right is not None, HAS_ENTROPY=entropy is not None,
        BLOCK=MERGE_BLOCK,
    )  # fmt: skip


def merge_torch(
    parts: Tensor,
    labels: Tensor,
    loss: Tensor,
    lse: Tensor,
    options: LossOptions,
    *,
    right: Tensor | None = None,
    entropy: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> None:
    """merge without a kernel."""
    picked, peaks, rests = parts[:, :3].unbind(1)
    peak = peaks.amax(0)
    totals, shrunk = rests.exp(), (peaks - peak).exp()
    total = (totals * shrunk).sum(0)
    rest = total.log()
    whole, ignored = peak + rest, labels == options.ignore_index
    of_label, of_all = (1.0, 1.0) if token_weights is None else token_weights
    found = (of_all * peak - picked.sum(0)) + of_all * rest + options.z_loss * of_label * whole * whole
    loss.copy_(found.masked_fill(ignored, 0.0))
    lse[0].copy_(peak.masked_fill(ignored, 0.0))
    lse[1].copy_(rest.masked_fill(ignored, 0.0))
    if right is not None:
        first = (peaks == peak).int().argmax(0)
        right.copy_(parts[:, 3].gather(0, first[None])[0].masked_fill(ignored, 0.0))
    if entropy is not None:
        below = ((parts[:, -1] + totals * (peak - peaks)) * shrunk).sum(0)
        entropy.copy_((rest + below / total).masked_fill(ignored, 0.0))
