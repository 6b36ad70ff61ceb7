"""_lent_logits.py for long rows without options: the programs of a row meet (_meet.py), and each logit is read once.

A program holds a part of a row as exponentials below the part's own maximum. Once all parts have met, one factor makes
gradients of them, but for the label's.

Traffic per logit: 1 read + 1 write.

Sizes: N tokens, V vocabulary, P parts of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._along_rows import peak_and_total, reciprocal
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._meet import arrivals, can_meet, limited, meet, passes, team_and_member
from ds_fused.ops.common._triton import cdiv, power_of_2, row_stride, warps_for
from ds_fused.ops.losses._loss import LossOptions

# Elements of a part, and of a thread; in 16 bits a thread's registers, at most: 12 programs share a multiprocessor. On
# an H200, us of 8192x128256 in bf16 and 4096x128256 in fp32, which take 988 to copy: 1282, and 1090 without a limit
# (1099 with it); with parts of 8192 1377 and 1105, of 2048 1378 and 1113; 16 bits without a limit 1374, with 72
# registers 1373; by one program a row 1433 and 1499
PART, PER_THREAD = 4096, 64
REGISTERS = 80


@triton.jit
def _lent_logits_part_kernel(
    logits_ptr,  # [N, V]: read, then overwritten by their gradient
    labels_ptr, loss_ptr, dloss_ptr,  # [N]
    lse_ptr,  # [2, N]: peak and rest
    measures_ptr,  # [2, N, P] fp32: the maximum of each part, and its sum of exponentials below that
    arrivals_ptr,  # of N teams
    logits_stride, dloss_stride, lse_stride,
    n_cols, n_parts, ignore_index,
    logit_scale, z_loss,
    HAS_SCALE: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    logit_scale = tl.cast(logit_scale, tl.float32)
    z_loss = tl.cast(z_loss, tl.float32)
    row, part = team_and_member(arrivals_ptr, n_parts, MEASURES, WRITES)
    row_ptr = logits_ptr + row * logits_stride + part * BLOCK
    cols = tl.arange(0, BLOCK)
    mask = cols < n_cols - part * BLOCK
    label = tl.load(labels_ptr + row)
    if not HAS_SCALE:
        logit_scale = 1.0  # no instruction for it
    if label == ignore_index:
        # all programs of the row see that, and none waits
        if WRITES:
            tl.store(row_ptr + cols, tl.zeros([BLOCK], tl.float32), mask=mask)
            if part == 0:
                tl.store(loss_ptr + row, 0.0)
                tl.store(lse_ptr + row, 0.0)
                tl.store(lse_ptr + lse_stride + row, 0.0)
    else:
        col = (label.to(tl.int64) - part * BLOCK).to(tl.int32)
        has_label = (col >= 0) & (col < BLOCK)
        z = tl.load(row_ptr + cols, mask=mask, other=float("-inf")).to(tl.float32) * logit_scale
        # asked for here: behind the meeting nothing else would be under way
        dloss = tl.load(dloss_ptr + row * dloss_stride) * logit_scale
        high = tl.max(z)
        # a part may be nothing but -inf (a mask), and -inf less -inf is NaN
        e = tl.exp(z - tl.where(high == float("-inf"), 0.0, high))
        highs_ptr = measures_ptr + row * n_parts
        sums_ptr = highs_ptr + tl.num_programs(0).to(tl.int64)
        if MEASURES:
            tl.store(highs_ptr + part, high)
            tl.store(sums_ptr + part, tl.sum(e))
        if MEASURES and WRITES:
            meet(arrivals_ptr, row, n_parts)
        if WRITES:
            peak, total = peak_and_total(highs_ptr, sums_ptr, n_parts, MERGE, False)
            inverse = reciprocal(total)
            rest = tl.log(total)
            lse = peak + rest
            on_lse = 2.0 * z_loss * lse
            z_label = 0.0
            if has_label:
                z_label = tl.load(row_ptr + col).to(tl.float32) * logit_scale
                # all threads have it before any of them overwrites it
                tl.debug_barrier()
            tl.store(row_ptr + cols, e * (tl.exp(high - peak) * inverse * (1.0 + on_lse) * dloss), mask=mask)
            if has_label:
                tl.store(lse_ptr + row, peak)
                tl.store(lse_ptr + lse_stride + row, rest)
                # this order keeps the bits of a small loss under large logits
                tl.store(loss_ptr + row, (peak - z_label) + rest + z_loss * lse * lse)
                p = tl.exp((z_label - peak) - rest)
                tl.debug_barrier()
                # the difference first: what is left of it may be small
                tl.store(row_ptr + col, ((p - 1.0) + p * on_lse) * dloss)


def can_share(logits: Tensor) -> bool:
    """Whether as many programs as a row has parts may meet."""
    return can_meet(logits, cdiv(logits.shape[1], PART))


def lent_logits_in_parts(
    logits: Tensor,  # [N, V], overwritten by the gradient
    labels: Tensor,  # [N]
    loss: Tensor,  # [N] fp32, written
    lse: Tensor,  # [2, N] fp32, written
    dloss: Tensor,  # [N] fp32, any stride
    options: LossOptions,  # no smoothing, no softcap
) -> None:
    n, n_vocab = logits.shape
    n_parts = cdiv(n_vocab, PART)
    measures = torch.empty(2 * n * n_parts, dtype=torch.float32, device=logits.device)
    steps = passes(logits, n_parts)
    arrived = arrivals(logits, n, steps)
    for step in steps:
        launch(
            _lent_logits_part_kernel, (n * n_parts,),
            logits, labels, loss, dloss, lse, measures, arrived,
            row_stride(logits), dloss.stride(0), row_stride(lse), n_vocab, n_parts, options.ignore_index,
            float(options.logit_scale), float(options.z_loss),
            HAS_SCALE=options.logit_scale != 1.0, BLOCK=PART, MERGE=power_of_2(n_parts),
            num_warps=warps_for(PART, PER_THREAD), **step, **limited(logits, steps, REGISTERS),
        )  # fmt: skip
