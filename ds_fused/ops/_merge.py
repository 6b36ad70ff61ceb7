"""Loss and log-sum-exp of tokens from what each rank's columns of their logits gave.

Sizes: N tokens, W ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._loss import LossOptions
from ds_fused.ops._triton import cdiv

MERGE_BLOCK = 256


@triton.jit
def _merge_kernel(
    parts_ptr,  # [W, 3 or 4, N]: picked, peak, rest of each rank's columns; whether the label is their argmax
    labels_ptr, loss_ptr, right_ptr,  # [N]
    lse_ptr,  # [2, N]
    lse_stride, n_tokens, n_parts, ignore_index, z_loss,
    HAS_ACCURACY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = token < n_tokens
    ignored = tl.load(labels_ptr + token, mask=mask, other=0) == ignore_index
    picked = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    peak = tl.full([BLOCK], -1e38, tl.float32)
    right = tl.zeros([BLOCK], tl.float32)
    n_numbers = 4 if HAS_ACCURACY else 3
    part_ptr = parts_ptr + token
    for _ in range(n_parts):
        picked += tl.load(part_ptr, mask=mask, other=0.0)
        part_peak = tl.load(part_ptr + n_tokens, mask=mask, other=0.0)
        part_rest = tl.load(part_ptr + 2 * n_tokens, mask=mask, other=0.0)
        if HAS_ACCURACY:
            part_right = tl.load(part_ptr + 3 * n_tokens, mask=mask, other=0.0)
            right = tl.where(part_peak > peak, part_right, right)  # of equal peaks the first
        most = tl.maximum(peak, part_peak)
        total = total * tl.exp(peak - most) + tl.exp(part_rest) * tl.exp(part_peak - most)
        peak = most
        part_ptr += n_numbers * n_tokens
    rest = tl.log(total)
    lse = peak + rest
    loss = (peak - picked) + rest + z_loss * lse * lse
    tl.store(loss_ptr + token, tl.where(ignored, 0.0, loss), mask=mask)
    if HAS_ACCURACY:
        tl.store(right_ptr + token, tl.where(ignored, 0.0, right), mask=mask)
    tl.store(lse_ptr + token, tl.where(ignored, 0.0, peak), mask=mask)
    tl.store(lse_ptr + lse_stride + token, tl.where(ignored, 0.0, rest), mask=mask)


def merge(
    parts: Tensor,  # [W, 3, N], contiguous; [W, 4, N] with `right`
    labels: Tensor,
    loss: Tensor,  # [N], written
    lse: Tensor,  # [2, N], written
    options: LossOptions,
    right: Tensor | None = None,  # [N], written
) -> None:
    """Loss, lse and whether the label is the argmax, from what the ranks' columns gave."""
    n_parts, _, n_tokens = parts.shape
    launch(
        _merge_kernel, (cdiv(n_tokens, MERGE_BLOCK),),
        parts, labels, loss, loss if right is None else right, lse,
        lse.stride(0), n_tokens, n_parts, options.ignore_index, float(options.z_loss),
        HAS_ACCURACY=right is not None, BLOCK=MERGE_BLOCK,
    )  # fmt: skip


def merge_torch(
    parts: Tensor, labels: Tensor, loss: Tensor, lse: Tensor, options: LossOptions, right: Tensor | None = None
) -> None:
    """merge without a kernel."""
    picked, peaks, rests, *rights = parts.unbind(1)
    peak = peaks.amax(0)
    rest = (rests.exp() * (peaks - peak).exp()).sum(0).log()
    whole, ignored = peak + rest, labels == options.ignore_index
    loss.copy_(((peak - picked.sum(0)) + rest + options.z_loss * whole * whole).masked_fill(ignored, 0.0))
    lse[0].copy_(peak.masked_fill(ignored, 0.0))
    lse[1].copy_(rest.masked_fill(ignored, 0.0))
    if right is not None:
        first = (peaks == peak).int().argmax(0)
        right.copy_(rights[0].gather(0, first[None])[0].masked_fill(ignored, 0.0))
