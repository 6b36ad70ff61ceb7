"""How far two distributions over a vocabulary are apart, token by token: the row passes of the distillation losses.

With ``p = softmax(student / temperature)``, ``q = softmax(teacher / temperature)`` and ``m = beta q + (1 - beta) p``:

    0 < beta < 1   D = beta KL(q || m) + (1 - beta) KL(p || m)     dz = (1 - beta) p (log p - log m - KL(p || m))
    beta = 0       D = KL(q || p)                                  dz = p - q
    beta = 1       D = KL(p || q)                                  dz = p (log p - log q - D)

where dz is the gradient of D by ``student / temperature``; the teacher has none. This is the generalised Jensen-Shannon
divergence of Agarwal et al., "On-Policy Distillation of Language Models" (2023), and at the ends, where it vanishes,
the two divergences that ``D / beta`` and ``D / (1 - beta)`` tend to.

The mixture is never formed: log(m / p) and log(m / q) come from d = log q - log p alone, by the exponential of -|d|, so
nothing underflows, and a word without probability (a logit of -inf) adds nothing.

Kept for backward: 20 bytes a token: maximum and rest of both log-sum-exps (see cross_entropy.py), and the mean that dz
subtracts. Traffic per pair of logits: forward 4 reads, backward 2 reads + 1 write, which may be in place.

Sizes: N tokens, V vocabulary. The backward may see some columns of the rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._triton import cdiv, on_device, power_of_2, row_stride, warps_for

# forward: one program walks the row of both twice; backward: one program a block. Not yet measured
FWD_BLOCK, FWD_STAGES, FWD_PER_THREAD = 2048, 3, 16
BWD_BLOCK, BWD_PER_THREAD = 4096, 16
# rows of `stats`
N_STATS = 5


@dataclass(frozen=True)
class DivergenceOptions:
    """The divergence as a number of each token's two rows of logits."""

    beta: float = 0.5
    temperature: float = 1.0
    ignore_index: int = -100

    @property
    def kind(self) -> str:
        """Which line of the table at the top."""
        return {0.0: "forward", 1.0: "reverse"}.get(self.beta, "mixture")


def check_divergence(op: str, options: DivergenceOptions) -> None:
    if not 0.0 <= options.beta <= 1.0:
        raise ValueError(f"{op}: beta is {options.beta}; it must lie in [0, 1]")
    if not options.temperature > 0.0:
        raise ValueError(f"{op}: temperature is {options.temperature}; it must be positive")


def divergence_reference(student: Tensor, teacher: Tensor, labels: Tensor | None, options: DivergenceOptions) -> Tensor:
    """[..., V], [..., V] -> [...], in PyTorch and differentiable."""
    a, b = (z.to(torch.promote_types(z.dtype, torch.float32)) / options.temperature for z in (student, teacher))
    if labels is not None:
        ignored = (labels == options.ignore_index)[..., None]
        a, b = a.masked_fill(ignored, 0.0), b.masked_fill(ignored, 0.0)
    a, b = torch.log_softmax(a, -1), torch.log_softmax(b, -1)
    beta = options.beta
    if beta == 0.0:
        return _kl(b, a)
    if beta == 1.0:
        return _kl(a, b)
    # both masked: logaddexp of two -inf has a NaN for a gradient
    nowhere = (a == float("-inf")) & (b == float("-inf"))
    log_beta, log_rest = torch.tensor([beta, 1.0 - beta], dtype=torch.float64).log().tolist()
    m = torch.logaddexp(b.masked_fill(nowhere, 0.0) + log_beta, a.masked_fill(nowhere, 0.0) + log_rest)
    return beta * _kl(b, m) + (1.0 - beta) * _kl(a, m)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * torch.where(p == 0.0, 0.0, log_p - log_q)).sum(-1)


@triton.jit
def _log_p(x, scale, peak, rest):
    return (x.to(tl.float32) * scale - peak) - rest


@triton.jit
def _lse(top, total):
    """Each lane's running maximum and sum to maximum and rest of the row."""
    peak = tl.max(top, 0)
    return peak, tl.log(tl.sum(total * tl.exp(top - peak), 0))


@triton.jit
def _more(top, total, z):
    """One exponential an element: either z or top is the new maximum, whose own is 1."""
    e = tl.exp(-tl.abs(z - top))
    return tl.maximum(z, top), tl.where(z > top, total * e + 1.0, total + e)


@triton.jit
def _from_mixture(a, b, beta):
    """log p - log m and log q - log m, from a = log p and b = log q."""
    d = b - a
    t = tl.exp(-tl.abs(d))
    # the larger of p and q divides, so that t never overflows
    log_m = tl.log(tl.where(d > 0.0, beta + (1.0 - beta) * t, (1.0 - beta) + beta * t))
    return tl.where(d > 0.0, -d - log_m, -log_m), tl.where(d > 0.0, -log_m, d - log_m)


@triton.jit
def _terms(a, b, beta, KIND: tl.constexpr):
    """What an element adds to the divergence, and to the mean that the gradient subtracts."""
    p, q = tl.exp(a), tl.exp(b)
    if KIND == "mixture":
        of_p, of_q = _from_mixture(a, b, beta)
        own = tl.where(p == 0.0, 0.0, p * of_p)
        return beta * tl.where(q == 0.0, 0.0, q * of_q) + (1.0 - beta) * own, own
    if KIND == "forward":
        term = tl.where(q == 0.0, 0.0, q * (b - a))
    else:
        term = tl.where(p == 0.0, 0.0, p * (a - b))
    return term, term


@triton.jit
def _divergence_fwd_kernel(
    student_ptr, teacher_ptr,  # [N, V]
    labels_ptr, loss_ptr,  # [N]
    stats_ptr,  # [5, N]: peak and rest of the student, of the teacher; the mean
    student_stride, teacher_stride, stats_stride,
    n_cols, ignore_index, scale, beta,
    KIND: tl.constexpr, HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    stats_ptr += row
    counts = True
    if HAS_LABELS:
        counts = tl.load(labels_ptr + row) != ignore_index
    if counts:
        student_ptr += row * student_stride
        teacher_ptr += row * teacher_stride
        cols = tl.arange(0, BLOCK)
        # finite, since -inf - -inf is not a number; no logit lies below it
        top_s = tl.full([BLOCK], -1e38, tl.float32)
        top_t = tl.full([BLOCK], -1e38, tl.float32)
        total_s = tl.zeros([BLOCK], tl.float32)
        total_t = tl.zeros([BLOCK], tl.float32)
        # whole blocks carry no mask: one on an odd n_cols would cut every load down to single elements
        n_whole = (n_cols // BLOCK) * BLOCK
        mask = n_whole + cols < n_cols
        for start in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
            s = tl.load(student_ptr + start + cols).to(tl.float32) * scale
            t = tl.load(teacher_ptr + start + cols).to(tl.float32) * scale
            top_s, total_s = _more(top_s, total_s, s)
            top_t, total_t = _more(top_t, total_t, t)
        if n_whole < n_cols:
            s = tl.load(student_ptr + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            t = tl.load(teacher_ptr + n_whole + cols, mask=mask, other=float("-inf")).to(tl.float32) * scale
            top_s, total_s = _more(top_s, total_s, s)
            top_t, total_t = _more(top_t, total_t, t)
        peak_s, rest_s = _lse(top_s, total_s)
        peak_t, rest_t = _lse(top_t, total_t)

        apart = tl.zeros([BLOCK], tl.float32)
        mean = tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
            a = _log_p(tl.load(student_ptr + start + cols), scale, peak_s, rest_s)
            b = _log_p(tl.load(teacher_ptr + start + cols), scale, peak_t, rest_t)
            term, own = _terms(a, b, beta, KIND)
            apart += term
            mean += own
        if n_whole < n_cols:
            # -inf in both adds nothing
            a = _log_p(tl.load(student_ptr + n_whole + cols, mask=mask, other=float("-inf")), scale, peak_s, rest_s)
            b = _log_p(tl.load(teacher_ptr + n_whole + cols, mask=mask, other=float("-inf")), scale, peak_t, rest_t)
            term, own = _terms(a, b, beta, KIND)
            apart += term
            mean += own
        tl.store(loss_ptr + row, tl.sum(apart, 0))
        tl.store(stats_ptr, peak_s)
        tl.store(stats_ptr + stats_stride, rest_s)
        tl.store(stats_ptr + 2 * stats_stride, peak_t)
        tl.store(stats_ptr + 3 * stats_stride, rest_t)
        tl.store(stats_ptr + 4 * stats_stride, tl.sum(mean, 0))
    else:
        tl.store(loss_ptr + row, 0.0)
        for i in tl.static_range(5):
            tl.store(stats_ptr + i * stats_stride, 0.0)


@triton.jit
def _dz(a, b, mean, beta, KIND: tl.constexpr):
    p = tl.exp(a)
    if KIND == "forward":
        dz = p - tl.exp(b)
    elif KIND == "reverse":
        dz = p * (tl.where(p == 0.0, 0.0, a - b) - mean)
    else:
        of_p, _ = _from_mixture(a, b, beta)
        dz = (1.0 - beta) * p * (tl.where(p == 0.0, 0.0, of_p) - mean)
    return dz


@triton.jit
def _divergence_bwd_kernel(
    dloss_ptr, labels_ptr,  # [N]
    stats_ptr,  # [5, N]
    student_ptr, teacher_ptr, dstudent_ptr,  # [N, n_cols]; dstudent may be student
    dloss_stride, stats_stride, student_stride, teacher_stride, dstudent_stride,
    n_cols, n_blocks, ignore_index, scale, beta,
    KIND: tl.constexpr, HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid // n_blocks
    start = (pid % n_blocks).to(tl.int32) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    mask = cols < n_cols
    student_ptr += row * student_stride
    teacher_ptr += row * teacher_stride
    dstudent_ptr += row * dstudent_stride
    counts = True
    if HAS_LABELS:
        counts = tl.load(labels_ptr + row) != ignore_index
    if counts:
        stats_ptr += row
        factor = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32) * scale
        peak_s, rest_s = tl.load(stats_ptr), tl.load(stats_ptr + stats_stride)
        peak_t, rest_t = tl.load(stats_ptr + 2 * stats_stride), tl.load(stats_ptr + 3 * stats_stride)
        mean = tl.load(stats_ptr + 4 * stats_stride)
        if start + BLOCK <= n_cols:  # without a mask: see the forward
            a = _log_p(tl.load(student_ptr + cols), scale, peak_s, rest_s)
            b = _log_p(tl.load(teacher_ptr + cols), scale, peak_t, rest_t)
            tl.store(dstudent_ptr + cols, factor * _dz(a, b, mean, beta, KIND))
        else:
            a = _log_p(tl.load(student_ptr + cols, mask=mask, other=0.0), scale, peak_s, rest_s)
            b = _log_p(tl.load(teacher_ptr + cols, mask=mask, other=0.0), scale, peak_t, rest_t)
            tl.store(dstudent_ptr + cols, factor * _dz(a, b, mean, beta, KIND), mask=mask)
    else:
        # zeros, whatever the upstream gradient is: with all tokens ignored the mean's is infinite
        tl.store(dstudent_ptr + cols, tl.zeros([BLOCK], tl.float32), mask=mask)


def divergence_fwd(
    student: Tensor,  # [N, V]
    teacher: Tensor,  # [N, V]
    labels: Tensor | None,  # [N]
    loss: Tensor,  # [N] fp32, written
    stats: Tensor,  # [5, N] fp32, written
    options: DivergenceOptions,
) -> None:
    n, n_cols = student.shape
    if n == 0:
        return
    block = min(FWD_BLOCK, power_of_2(n_cols))
    with on_device(student):
        _divergence_fwd_kernel[(n,)](
            student, teacher, labels, loss, stats, row_stride(student), row_stride(teacher), row_stride(stats),
            n_cols, options.ignore_index, 1.0 / options.temperature, float(options.beta),
            KIND=options.kind, HAS_LABELS=labels is not None,
            BLOCK=block, STAGES=FWD_STAGES, num_warps=warps_for(block, FWD_PER_THREAD),
        )  # fmt: skip


def divergence_bwd(
    dloss: Tensor,  # [N], any stride: an expanded scalar is not copied
    student: Tensor,  # [N, n_cols]
    teacher: Tensor,  # [N, n_cols]
    labels: Tensor | None,  # [N]
    stats: Tensor,  # [5, N], of whole rows
    dstudent: Tensor,  # [N, n_cols], written; may be student itself
    options: DivergenceOptions,
) -> None:
    n, n_cols = student.shape
    if n == 0:
        return
    block = min(BWD_BLOCK, power_of_2(n_cols))
    n_blocks = cdiv(n_cols, block)
    with on_device(student):
        _divergence_bwd_kernel[(n * n_blocks,)](
            dloss, labels, stats, student, teacher, dstudent,
            dloss.stride(0), row_stride(stats), row_stride(student), row_stride(teacher), row_stride(dstudent),
            n_cols, n_blocks, options.ignore_index, 1.0 / options.temperature, float(options.beta),
            KIND=options.kind, HAS_LABELS=labels is not None,
            BLOCK=block, num_warps=warps_for(block, BWD_PER_THREAD),
        )  # fmt: skip


def divergence_fwd_torch(
    student: Tensor, teacher: Tensor, labels: Tensor | None, loss: Tensor, stats: Tensor, options: DivergenceOptions
) -> None:
    """divergence_fwd without kernels."""
    beta = options.beta
    for rows in _row_blocks(student):
        parts = []
        for i, logits in ((0, student), (2, teacher)):
            z = logits[rows].to(loss.dtype) * (1.0 / options.temperature)
            stats[i, rows] = z.amax(1)
            z.sub_(stats[i, rows, None])
            stats[i + 1, rows] = z.exp().sum(1).log()
            parts.append(z.sub_(stats[i + 1, rows, None]))
        a, b = parts
        p, q = a.exp(), b.exp()
        if options.kind == "mixture":
            of_p, of_q = _from_mixture_torch(a, b, beta)
            mean = _sum(p, of_p)
            apart = beta * _sum(q, of_q) + (1.0 - beta) * mean
        else:
            mean = apart = _sum(q, b - a) if options.kind == "forward" else _sum(p, a - b)
        loss[rows], stats[4, rows] = apart, mean
    if labels is not None:
        ignored = labels == options.ignore_index
        loss.masked_fill_(ignored, 0.0)
        stats.masked_fill_(ignored, 0.0)


def divergence_bwd_torch(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    dstudent: Tensor,
    options: DivergenceOptions,
) -> None:
    """divergence_bwd without kernels."""
    scale = 1.0 / options.temperature
    for rows in _row_blocks(student):
        a, b = (
            (logits[rows].to(stats.dtype) * scale).sub_(stats[i, rows, None]).sub_(stats[i + 1, rows, None])
            for i, logits in ((0, student), (2, teacher))
        )
        p = a.exp()
        if options.kind == "forward":
            dz = p - b.exp()
        else:
            gap = a - b if options.kind == "reverse" else _from_mixture_torch(a, b, options.beta)[0]
            weight = 1.0 if options.kind == "reverse" else 1.0 - options.beta
            dz = weight * p * (gap.masked_fill_(p == 0.0, 0.0) - stats[4, rows, None])
        dz.mul_(dloss[rows, None] * scale)
        if labels is not None:
            dz.masked_fill_((labels[rows] == options.ignore_index)[:, None], 0.0)
        dstudent[rows] = dz.to(dstudent.dtype)


def _from_mixture_torch(a: Tensor, b: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    d = b - a
    t = (-d.abs()).exp_()
    ahead = d > 0.0
    log_m = torch.where(ahead, beta + (1.0 - beta) * t, (1.0 - beta) + beta * t).log_()
    return torch.where(ahead, -d, 0.0) - log_m, torch.where(ahead, 0.0, d) - log_m


def _sum(p: Tensor, gap: Tensor) -> Tensor:
    return (p * gap.masked_fill_(p == 0.0, 0.0)).sum(1)


def _row_blocks(logits: Tensor) -> list[slice]:
    step = max(1, 2**20 // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]
