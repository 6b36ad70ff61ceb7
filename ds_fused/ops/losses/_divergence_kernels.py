"""How far two distributions over the vocabulary are apart, from the logits of both: kernels and their launchers.

Per token, with ``p = softmax(scale * p_logits)`` and ``q = softmax(scale * q_logits)``:

    kl   sum(p * log(p / q))
    jsd  beta * sum(p * log(p / m)) + (1 - beta) * sum(q * log(q / m)), m = beta * p + (1 - beta) * q
    tvd  sum(abs(p - q)) / 2

The gradient of each is ``dp_logits = scale * p * (g - sum(p * g))`` with ``g = dloss/dp``, and for q alike:

    kl   g_p = log(p / q),         dq_logits = scale * (q - p)
    jsd  g_p = beta * log(p / m),  g_q = (1 - beta) * log(q / m)
    tvd  g_p = sign(p - q) / 2,    g_q = sign(q - p) / 2, which is 0 where p = q

A column that p gives nothing counts 0 in sum(p * ...), whatever q gives it. Ignored tokens: loss and gradients are
exactly zero and their logits are never read.

Traffic per column: forward 2 reads (kl, where p gets no gradient), or 4 of which the caches may give some of the second
pair; backward 2 reads + 1 write, + 1 where both inputs require a gradient.

Sizes: N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, power_of_2, row_stride, warps_for
from ds_fused.ops.losses._softmax_parts import online

# not yet measured. the second pass of a row wants the first one's columns in L2, so few and large programs: of 16 warps
# with 8 elements a thread (64 registers on sm90) two run side by side on a multiprocessor; with 16 elements they spill
FWD_BLOCK, FWD_STAGES, FWD_PER_THREAD = 4096, 3, 8
BWD_BLOCK, BWD_PER_THREAD = 4096, 16
# rows of `stats`
N_STATS = 6


@dataclass(frozen=True)
class Divergence:
    """Which of the three, and of what."""

    kind: str  # "kl", "jsd" or "tvd"
    beta: float = 0.5
    scale: float = 1.0  # of both logits
    ignore_index: int = -100


@triton.jit
def _below(log_p):
    """A finite number for the log of nothing, since -inf - -inf is not one; exp of it is 0. Keeps NaN."""
    return tl.where(log_p < -1e4, -1e4, log_p)


@triton.jit
def _jsd_terms(log_p, log_q, beta):
    """p, q, log(p / m), log(q / m). The larger of p and q is taken out of m, so its log never sees an underflow."""
    log_p, log_q = _below(log_p), _below(log_q)
    gap = log_p - log_q
    more = tl.exp(tl.maximum(log_p, log_q))
    ratio = tl.exp(-tl.abs(gap))
    less = more * ratio
    p_has_more = gap > 0.0
    log_mean = tl.log(tl.where(p_has_more, beta + (1.0 - beta) * ratio, (1.0 - beta) + beta * ratio))
    p, q = tl.where(p_has_more, more, less), tl.where(p_has_more, less, more)
    return p, q, tl.minimum(gap, 0.0) - log_mean, -tl.maximum(gap, 0.0) - log_mean


@triton.jit
def _tvd_terms(log_p, log_q):
    """p, q, and the slope of abs(p - q) / 2 in p."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    return p, q, tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))


@triton.jit
def _add_terms(p_logit, q_logit, peak_p, rest_p, peak_q, rest_q, beta, loss, mean_p, mean_q, KIND: tl.constexpr):
    """The lanes' sums of the loss and of p * g, with one more column each."""
    log_p, log_q = (p_logit - peak_p) - rest_p, (q_logit - peak_q) - rest_q
    if KIND == "jsd":
        p, q, over_p, over_q = _jsd_terms(log_p, log_q, beta)
        from_p, from_q = beta * p * over_p, (1.0 - beta) * q * over_q
        loss += from_p + from_q
    elif KIND == "kl":
        # without the rests, see _kl_fwd_kernel; to be divided by the sum of p, which is 1 but for rounding
        p = tl.exp(log_p)
        from_p, from_q = tl.where(p == 0.0, 0.0, p * ((p_logit - peak_p) - (q_logit - peak_q))), p
    else:
        p, q, slope = _tvd_terms(log_p, log_q)
        from_p, from_q = p * slope, -q * slope
        loss += 0.5 * tl.abs(p - q)
    return loss, mean_p + from_p, mean_q + from_q


@triton.jit
def _store_zeros(row, loss_ptr, stats_ptr, stats_stride):
    """For an ignored token: nobody reads its stats, but no memory is left as it was found."""
    tl.store(loss_ptr + row, 0.0)
    for i in tl.static_range(6):
        tl.store(stats_ptr + i * stats_stride + row, 0.0)


@triton.jit
def _divergence_fwd_kernel(
    p_ptr, q_ptr,  # [N, V] logits
    labels_ptr,  # [N]
    loss_ptr,  # [N]
    stats_ptr,  # [6, N]: peak and rest of p, of q, the means of g under p and q
    p_stride, q_stride, stats_stride,
    n_cols, ignore_index, scale, beta,
    HAS_LABELS: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    beta = tl.cast(beta, tl.float32)
    scale = tl.cast(scale, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    counts = True
    if HAS_LABELS:
        counts = tl.load(labels_ptr + row) != ignore_index
    if counts:
        p_row, q_row = p_ptr + row * p_stride, q_ptr + row * q_stride
        cols = tl.arange(0, BLOCK)
        n_whole = (n_cols // BLOCK) * BLOCK  # whole blocks carry no mask: see _cross_entropy_kernels.py
        mask = n_whole + cols < n_cols

        top_p = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        top_q = top_p
        total_p, total_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
            p = tl.load(p_row + start + cols).to(tl.float32) * scale
            q = tl.load(q_row + start + cols).to(tl.float32) * scale
            top_p, total_p = online(top_p, total_p, p)
            top_q, total_q = online(top_q, total_q, q)
        if n_whole < n_cols:
            p = tl.load(p_row + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            q = tl.load(q_row + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            top_p, total_p = online(top_p, total_p, p)
            top_q, total_q = online(top_q, total_q, q)
        peak_p, peak_q = tl.max(top_p, 0), tl.max(top_q, 0)
        rest_p = tl.log(tl.sum(total_p * tl.exp(top_p - peak_p), 0))
        rest_q = tl.log(tl.sum(total_q * tl.exp(top_q - peak_q), 0))

        loss = tl.zeros([BLOCK], tl.float32)
        mean_p, mean_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        # from the end of the row to its start: what was read last is the likeliest to be in the caches
        if n_whole < n_cols:
            p = tl.load(p_row + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            q = tl.load(q_row + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            loss, mean_p, mean_q = _add_terms(p, q, peak_p, rest_p, peak_q, rest_q, beta, loss, mean_p, mean_q, KIND)
        for done in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
            start = n_whole - BLOCK - done
            p = tl.load(p_row + start + cols).to(tl.float32) * scale
            q = tl.load(q_row + start + cols).to(tl.float32) * scale
            loss, mean_p, mean_q = _add_terms(p, q, peak_p, rest_p, peak_q, rest_q, beta, loss, mean_p, mean_q, KIND)

        total, mean = tl.sum(loss, 0), tl.sum(mean_p, 0)
        if KIND == "kl":
            mean = mean / tl.sum(mean_q, 0)
            total = mean + (rest_q - rest_p)
        tl.store(loss_ptr + row, total)
        tl.store(stats_ptr + row, peak_p)
        tl.store(stats_ptr + stats_stride + row, rest_p)
        tl.store(stats_ptr + 2 * stats_stride + row, peak_q)
        tl.store(stats_ptr + 3 * stats_stride + row, rest_q)
        tl.store(stats_ptr + 4 * stats_stride + row, mean)
        tl.store(stats_ptr + 5 * stats_stride + row, tl.sum(mean_q, 0))
    else:
        _store_zeros(row, loss_ptr, stats_ptr, stats_stride)


@triton.jit
def _online_kl(top_p, total_p, top_q, total_q, above, lost, p, q):
    """The lanes' softmax sums as in `online`; above: the sum of exp(p - top_p) * ((p - top_p) - (q - top_q)).

    lost: the largest p where q has nothing at all; such columns are left out of `above`.
    """
    e = tl.exp(-tl.abs(p - top_p))
    p_wins = p > top_p
    keep, weight = tl.where(p_wins, e, 1.0), tl.where(p_wins, 1.0, e)
    new_p = tl.maximum(p, top_p)
    new_q, total_q = online(top_q, total_q, q)
    q_has_none = q == float("-inf")
    gap = tl.where(q_has_none | (weight == 0.0), 0.0, (p - new_p) - (q - new_q))
    # what was summed so far was relative to the old maxima; before the first q there is none to be relative to
    shift = (top_p - new_p) - tl.where(top_q < -1e37, 0.0, top_q - new_q)
    above = keep * (above + total_p * shift) + weight * gap
    lost = tl.maximum(lost, tl.where(q_has_none, p, float("-inf")))
    return new_p, keep * total_p + weight, new_q, total_q, above, lost


@triton.jit
def _kl_fwd_kernel(
    p_ptr, q_ptr,  # [N, V] logits
    labels_ptr,  # [N]
    loss_ptr,  # [N]
    stats_ptr,  # [6, N], as above
    p_stride, q_stride, stats_stride,
    n_cols, ignore_index, scale,
    HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    scale = tl.cast(scale, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    counts = True
    if HAS_LABELS:
        counts = tl.load(labels_ptr + row) != ignore_index
    if counts:
        p_row, q_row = p_ptr + row * p_stride, q_ptr + row * q_stride
        cols = tl.arange(0, BLOCK)
        top_p = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
        top_q = top_p
        total_p, total_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        above, lost = tl.zeros([BLOCK], tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
        n_whole = (n_cols // BLOCK) * BLOCK
        for start in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
            p = tl.load(p_row + start + cols).to(tl.float32) * scale
            q = tl.load(q_row + start + cols).to(tl.float32) * scale
            top_p, total_p, top_q, total_q, above, lost = _online_kl(top_p, total_p, top_q, total_q, above, lost, p, q)
        if n_whole < n_cols:
            mask = n_whole + cols < n_cols
            p = tl.load(p_row + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            q = tl.load(q_row + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            top_p, total_p, top_q, total_q, above, lost = _online_kl(top_p, total_p, top_q, total_q, above, lost, p, q)
        peak_p, peak_q = tl.max(top_p, 0), tl.max(top_q, 0)
        sum_p = tl.sum(total_p * tl.exp(top_p - peak_p), 0)
        rest_p, rest_q = tl.log(sum_p), tl.log(tl.sum(total_q * tl.exp(top_q - peak_q), 0))
        shift = (top_p - peak_p) - tl.where(top_q < -1e37, 0.0, top_q - peak_q)
        above = tl.sum((above + total_p * shift) * tl.exp(top_p - peak_p), 0)
        # p has a share, however small, of what q rules out
        is_infinite = tl.exp((tl.max(lost, 0) - peak_p) - rest_p) > 0.0
        mean = tl.where(is_infinite, float("inf"), above / sum_p)
        loss = mean + (rest_q - rest_p)

        tl.store(loss_ptr + row, loss)
        tl.store(stats_ptr + row, peak_p)
        tl.store(stats_ptr + stats_stride + row, rest_p)
        tl.store(stats_ptr + 2 * stats_stride + row, peak_q)
        tl.store(stats_ptr + 3 * stats_stride + row, rest_q)
        # without the rests, which log(p / q) and its mean have in common: the backward's difference keeps more bits
        tl.store(stats_ptr + 4 * stats_stride + row, mean)
        tl.store(stats_ptr + 5 * stats_stride + row, 0.0)
    else:
        _store_zeros(row, loss_ptr, stats_ptr, stats_stride)


@triton.jit
def _slopes(p_logit, q_logit, peak_p, rest_p, peak_q, rest_q, mean_p, mean_q, beta, KIND: tl.constexpr):
    """The gradients of both logits, up to the upstream one and the scale."""
    log_p, log_q = (p_logit - peak_p) - rest_p, (q_logit - peak_q) - rest_q
    if KIND == "jsd":
        p, q, over_p, over_q = _jsd_terms(log_p, log_q, beta)
        dp, dq = p * (beta * over_p - mean_p), q * ((1.0 - beta) * over_q - mean_q)
    elif KIND == "kl":
        p, q = tl.exp(log_p), tl.exp(log_q)
        gap = (p_logit - peak_p) - (q_logit - peak_q)
        dp, dq = tl.where(p == 0.0, 0.0, p * (gap - mean_p)), q - p
    else:
        p, q, slope = _tvd_terms(log_p, log_q)
        dp, dq = p * (slope - mean_p), q * (-slope - mean_q)
    return dp, dq


@triton.jit
def _divergence_bwd_kernel(
    dloss_ptr, labels_ptr,  # [N]
    stats_ptr,  # [6, N]
    p_ptr, q_ptr, dp_ptr, dq_ptr,  # [N, V]
    dloss_stride, stats_stride, p_stride, q_stride, dp_stride, dq_stride,
    n_cols, n_blocks, ignore_index, scale, beta,
    HAS_LABELS: tl.constexpr, WANTS_P: tl.constexpr, WANTS_Q: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    beta = tl.cast(beta, tl.float32)
    scale = tl.cast(scale, tl.float32)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // n_blocks
    start = (pid % n_blocks).to(tl.int32) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    mask = cols < n_cols
    counts = True
    if HAS_LABELS:
        counts = tl.load(labels_ptr + row) != ignore_index
    if counts:
        factor = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32) * scale
        peak_p, rest_p = tl.load(stats_ptr + row), tl.load(stats_ptr + stats_stride + row)
        peak_q, rest_q = tl.load(stats_ptr + 2 * stats_stride + row), tl.load(stats_ptr + 3 * stats_stride + row)
        mean_p, mean_q = tl.load(stats_ptr + 4 * stats_stride + row), tl.load(stats_ptr + 5 * stats_stride + row)
        if start + BLOCK <= n_cols:  # without a mask: see _cross_entropy_kernels.py
            p = tl.load(p_ptr + row * p_stride + cols).to(tl.float32) * scale
            q = tl.load(q_ptr + row * q_stride + cols).to(tl.float32) * scale
            dp, dq = _slopes(p, q, peak_p, rest_p, peak_q, rest_q, mean_p, mean_q, beta, KIND)
            if WANTS_P:
                tl.store(dp_ptr + row * dp_stride + cols, factor * dp)
            if WANTS_Q:
                tl.store(dq_ptr + row * dq_stride + cols, factor * dq)
        else:
            p = tl.load(p_ptr + row * p_stride + cols, mask=mask, other=0.0).to(tl.float32) * scale
            q = tl.load(q_ptr + row * q_stride + cols, mask=mask, other=0.0).to(tl.float32) * scale
            dp, dq = _slopes(p, q, peak_p, rest_p, peak_q, rest_q, mean_p, mean_q, beta, KIND)
            if WANTS_P:
                tl.store(dp_ptr + row * dp_stride + cols, factor * dp, mask=mask)
            if WANTS_Q:
                tl.store(dq_ptr + row * dq_stride + cols, factor * dq, mask=mask)
    else:
        # zeros, whatever the upstream gradient is: with all tokens ignored the mean's is infinite
        if WANTS_P:
            tl.store(dp_ptr + row * dp_stride + cols, tl.zeros([BLOCK], tl.float32), mask=mask)
        if WANTS_Q:
            tl.store(dq_ptr + row * dq_stride + cols, tl.zeros([BLOCK], tl.float32), mask=mask)


def divergence_fwd(
    p: Tensor,  # [N, V] logits
    q: Tensor,
    labels: Tensor | None,  # [N]
    loss: Tensor,  # [N] fp32, written
    stats: Tensor,  # [6, N] fp32, written
    what: Divergence,
    wants_p: bool,  # p will get a gradient
) -> None:
    n, n_cols = p.shape
    if n == 0:
        return
    # in one pass a KL is summed relative to maxima that still move: good enough for the loss, but p's gradient is what
    # two numbers near its mean differ by
    one_pass = what.kind == "kl" and not wants_p
    block = min(FWD_BLOCK, power_of_2(n_cols))
    tensors = (p, q, p if labels is None else labels, loss, stats)
    strides = (row_stride(p), row_stride(q), row_stride(stats))
    if one_pass:
        launch(
            _kl_fwd_kernel, (n,),
            *tensors, *strides, n_cols, what.ignore_index, what.scale,
            HAS_LABELS=labels is not None, BLOCK=block, STAGES=FWD_STAGES,
            num_warps=warps_for(block, FWD_PER_THREAD),
        )  # fmt: skip
    else:
        launch(
            _divergence_fwd_kernel, (n,),
            *tensors, *strides, n_cols, what.ignore_index, what.scale, what.beta,
            HAS_LABELS=labels is not None, KIND=what.kind, BLOCK=block, STAGES=FWD_STAGES,
            num_warps=warps_for(block, FWD_PER_THREAD),
        )  # fmt: skip


def divergence_bwd(
    dloss: Tensor,  # [N], any stride
    p: Tensor,  # [N, n_cols]: all columns or some
    q: Tensor,
    labels: Tensor | None,
    stats: Tensor,  # [6, N], of whole rows
    dp: Tensor | None,  # [N, n_cols], written; may be p itself; None: none is wanted
    dq: Tensor | None,
    what: Divergence,
) -> None:
    n, n_cols = p.shape
    if n == 0:
        return
    block = min(BWD_BLOCK, power_of_2(n_cols))
    n_blocks = cdiv(n_cols, block)
    # a tensor that stands for one that is not there is never touched
    out_p, out_q = p if dp is None else dp, q if dq is None else dq
    launch(
        _divergence_bwd_kernel, (n * n_blocks,),
        dloss, p if labels is None else labels, stats, p, q, out_p, out_q,
        dloss.stride(0), row_stride(stats), row_stride(p), row_stride(q), row_stride(out_p), row_stride(out_q),
        n_cols, n_blocks, what.ignore_index, what.scale, what.beta,
        HAS_LABELS=labels is not None, WANTS_P=dp is not None, WANTS_Q=dq is not None, KIND=what.kind,
        BLOCK=block, num_warps=warps_for(block, BWD_PER_THREAD),
    )  # fmt: skip
