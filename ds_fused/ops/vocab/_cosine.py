"""The angle between a student's logits and a frozen teacher's: the row passes of linear_cosine.

    loss = 1 - cos,  cos = <s, t> / (|s| |t|)        ds = cos / |s|^2 * s - t / (|s| |t|)

Norms below EPS count as EPS, as in ``F.cosine_similarity``; the first term of ds is then 0. Of each row the backward
needs the two factors alone, by which it multiplies s and t.

Traffic per pair of logits: forward 2 reads, backward 2 reads + 1 write.

Sizes: N tokens, V vocabulary. The backward may see some columns of the rows alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._triton import cdiv, power_of_2, row_stride, warps_for
from ds_fused.ops.losses._loss import row_blocks

EPS = 1e-8
# Not measured yet.
FWD_BLOCK, FWD_STAGES, FWD_PER_THREAD = 4096, 3, 8
BWD_BLOCK, BWD_PER_THREAD = 4096, 16


@dataclass(frozen=True)
class CosineOptions:
    """The loss as a number of each token's two rows of logits."""

    ignore_index: int = -100
    n_stats: ClassVar[int] = 2  # numbers of a row that its backward needs: the factors of s and of t

    def check(self, op: str) -> None:
        """Every ignore_index will do."""

    def passes(self, kernels: bool) -> tuple[Callable[..., None], Callable[..., None]]:
        return (cosine_fwd, cosine_bwd) if kernels else (cosine_fwd_torch, cosine_bwd_torch)


@triton.jit
def _cosine_fwd_kernel(
    s_ptr, t_ptr,  # [N, V]
    labels_ptr,  # [N]
    loss_ptr,  # [N]
    stats_ptr,  # [2, N]
    s_stride, t_stride, stats_stride,
    n_cols, ignore_index, eps,
    HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    counts = True
    if HAS_LABELS:
        counts = tl.load(labels_ptr + row) != ignore_index
    if counts:
        s_row, t_row = s_ptr + row * s_stride, t_ptr + row * t_stride
        cols = tl.arange(0, BLOCK)
        n_whole = (n_cols // BLOCK) * BLOCK  # whole blocks carry no mask: see _cross_entropy_kernels.py
        ss, tt, st = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in tl.range(0, n_whole, BLOCK, num_stages=STAGES):
            s = tl.load(s_row + start + cols).to(tl.float32)
            t = tl.load(t_row + start + cols).to(tl.float32)
            ss, tt, st = ss + s * s, tt + t * t, st + s * t
        if n_whole < n_cols:
            mask = n_whole + cols < n_cols
            s = tl.load(s_row + n_whole + cols, mask=mask, other=0.0).to(tl.float32)
            t = tl.load(t_row + n_whole + cols, mask=mask, other=0.0).to(tl.float32)
            ss, tt, st = ss + s * s, tt + t * t, st + s * t
        s_norm, t_norm = tl.sqrt(tl.sum(ss, 0)), tl.sqrt(tl.sum(tt, 0))
        s_long, t_long = tl.maximum(s_norm, eps), tl.maximum(t_norm, eps)
        cosine = tl.sum(st, 0) / s_long / t_long
        tl.store(loss_ptr + row, 1.0 - cosine)
        tl.store(stats_ptr + row, tl.where(s_norm < eps, 0.0, cosine / s_long / s_long))
        tl.store(stats_ptr + stats_stride + row, -1.0 / s_long / t_long)
    else:
        # nobody reads its stats, but no memory is left as it was found
        tl.store(loss_ptr + row, 0.0)
        tl.store(stats_ptr + row, 0.0)
        tl.store(stats_ptr + stats_stride + row, 0.0)


@triton.jit
def _cosine_bwd_kernel(
    dloss_ptr, labels_ptr,  # [N]
    stats_ptr,  # [2, N]
    s_ptr, t_ptr, ds_ptr,  # [N, n_cols]
    dloss_stride, stats_stride, s_stride, t_stride, ds_stride,
    n_cols, n_blocks, ignore_index,
    HAS_LABELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    row = pid // n_blocks
    start = (pid % n_blocks).to(tl.int32) * BLOCK
    cols = start + tl.arange(0, BLOCK)
    mask = cols < n_cols
    s_row, t_row, ds_row = s_ptr + row * s_stride, t_ptr + row * t_stride, ds_ptr + row * ds_stride
    counts = True
    if HAS_LABELS:
        counts = tl.load(labels_ptr + row) != ignore_index
    if counts:
        dloss = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
        of_s, of_t = tl.load(stats_ptr + row), tl.load(stats_ptr + stats_stride + row)
        if start + BLOCK <= n_cols:  # without a mask: see _cross_entropy_kernels.py
            s = tl.load(s_row + cols).to(tl.float32)
            t = tl.load(t_row + cols).to(tl.float32)
            tl.store(ds_row + cols, dloss * (of_s * s + of_t * t))
        else:
            s = tl.load(s_row + cols, mask=mask, other=0.0).to(tl.float32)
            t = tl.load(t_row + cols, mask=mask, other=0.0).to(tl.float32)
            tl.store(ds_row + cols, dloss * (of_s * s + of_t * t), mask=mask)
    else:
        # whatever the upstream gradient is: with all tokens ignored the mean's is infinite
        tl.store(ds_row + cols, tl.zeros([BLOCK], tl.float32), mask=mask)


def cosine_fwd(
    student: Tensor,  # [N, V]
    teacher: Tensor,  # [N, V]
    labels: Tensor | None,  # [N]
    loss: Tensor,  # [N] fp32, written
    stats: Tensor,  # [2, N] fp32, written
    options: CosineOptions,
) -> None:
    n, n_cols = student.shape
    if n == 0:
        return
    block = min(FWD_BLOCK, power_of_2(n_cols))
    launch(
        _cosine_fwd_kernel, (n,),
        student, teacher, student if labels is None else labels, loss, stats,
        row_stride(student), row_stride(teacher), row_stride(stats), n_cols, options.ignore_index, EPS,
        HAS_LABELS=labels is not None, BLOCK=block, STAGES=FWD_STAGES, num_warps=warps_for(block, FWD_PER_THREAD),
    )  # fmt: skip


def cosine_bwd(
    dloss: Tensor,  # [N], any stride: an expanded scalar is not copied
    student: Tensor,  # [N, n_cols]
    teacher: Tensor,  # [N, n_cols]
    labels: Tensor | None,  # [N]
    stats: Tensor,  # [2, N], of whole rows
    dstudent: Tensor,  # [N, n_cols], written; may be student itself
    options: CosineOptions,
) -> None:
    n, n_cols = student.shape
    if n == 0:
        return
    block = min(BWD_BLOCK, power_of_2(n_cols))
    n_blocks = cdiv(n_cols, block)
    launch(
        _cosine_bwd_kernel, (n * n_blocks,),
        dloss, student if labels is None else labels, stats, student, teacher, dstudent,
        dloss.stride(0), row_stride(stats), row_stride(student), row_stride(teacher), row_stride(dstudent),
        n_cols, n_blocks, options.ignore_index,
        HAS_LABELS=labels is not None, BLOCK=block, num_warps=warps_for(block, BWD_PER_THREAD),
    )  # fmt: skip


def cosine_fwd_torch(
    student: Tensor, teacher: Tensor, labels: Tensor | None, loss: Tensor, stats: Tensor, options: CosineOptions
) -> None:
    """cosine_fwd without kernels."""
    for rows in row_blocks(student):
        s, t = student[rows].to(loss.dtype), teacher[rows].to(loss.dtype)
        s_norm, t_norm = s.norm(dim=1), t.norm(dim=1)
        s_long, t_long = s_norm.clamp_min(EPS), t_norm.clamp_min(EPS)
        cosine = (s * t).sum(1) / s_long / t_long
        loss[rows] = 1.0 - cosine
        stats[0, rows] = (cosine / s_long / s_long).masked_fill_(s_norm < EPS, 0.0)
        stats[1, rows] = -1.0 / s_long / t_long
    if labels is not None:
        ignored = labels == options.ignore_index
        loss.masked_fill_(ignored, 0.0)
        stats.masked_fill_(ignored, 0.0)


def cosine_bwd_torch(
    dloss: Tensor,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    stats: Tensor,
    dstudent: Tensor,
    options: CosineOptions,
) -> None:
    """cosine_bwd without kernels."""
    for rows in row_blocks(student):
        s, t = student[rows].to(stats.dtype), teacher[rows].to(stats.dtype)
        ds = (stats[0, rows, None] * s).addcmul_(stats[1, rows, None], t).mul_(dloss[rows, None])
        if labels is not None:
            ds.masked_fill_((labels[rows] == options.ignore_index)[:, None], 0.0)
        dstudent[rows] = ds.to(dstudent.dtype)
