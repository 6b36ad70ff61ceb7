"""Attention over depth: ``y = sum_i p_i v_i``, p the softmax over i of ``<query, weight * v_i / rms(v_i)>``.

What a block adds to is no sum of the blocks before it but a mean of their outputs v_1 ... v_N, weighted token by token:
the residual connection of "Attention Residuals" (Kimi Team, Moonshot AI, 2026, arXiv 2603.15031).
rms(v) = sqrt(mean(v^2) + eps). Computed in fp32 and rounded once, to the blocks' dtype.

Saved for backward: the blocks, query and weight; in fp32 score and 1/rms of each token and block, and of each token the
largest score.
Traffic per token, in rows of D: forward N reads + 1 write, the softmax going on from block to block; backward N + 1
reads + N writes, the blocks being read a second time where they were just read (L1 or L2) unless a program holds them
all, plus one row of fp32 partial sums per program, added up in a fixed order by a second small launch (no atomics: same
input, same bits).

Blocks lie in one stack, or each by itself, up to LISTED of them without a copy: the kernels take their addresses.

Sizes: N blocks, T tokens (every leading dimension, flattened), D columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ds_fused.ops.common import _triton
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._say import say_once
from ds_fused.ops.common._sums import SUM_COLS, SUM_ROWS
from ds_fused.ops.common._triton import (
    cdiv,
    check_dtypes,
    copies_tiles,
    like,
    multiprocessors,
    power_of_2,
    resident,
    row_stride,
    rows_of,
    runs_kernels,
    stages_for,
    warps_for,
)
from ds_fused.ops.norms._norms import contiguous
from ds_fused.ops.residual._attention_residual_held import (
    _attention_residual_bwd_held_kernel,
    _attention_residual_bwd_held_listed_kernel,
)
from ds_fused.ops.residual._attention_residual_kernels import (
    _attention_residual_bwd_kernel,
    _attention_residual_bwd_listed_kernel,
    _attention_residual_fwd_kernel,
    _attention_residual_fwd_listed_kernel,
    _attention_residual_sums_kernel,
)

# blocks that need not lie in one stack: as many pointers as the kernels take
LISTED = 16
# the widest row that a program's registers hold; of wider ones than the second the backward reads the query again for
# each block: at 16384 columns of fp32 196 bytes a thread would spill on sm90
WIDEST = 16384
WIDEST_QUERY = 8192
# Elements of the blocks that a program takes up at a time, and these blocks, at most. On an H100, us: forward one block
# and two 430 and 427 at 8x16384x4096, one, two and four 506, 385 and 405 at 16x4096x7168; backward four and eight 931
# and 954, at 16x4096x7168 918 and 931
TILE_FWD, MOST_GROUP_FWD, PER_THREAD_FWD, STAGES_FWD = 16384, 2, 16, 3
TILE_BWD, MOST_GROUP_BWD, PER_THREAD_BWD = 32768, 4, 16
# Blocks whose gradients are computed side by side: one, two, four 1018, 934, 931 us. Of a list, each with two of 32
# pointers, two take 934 us; four take registers that a second program needs, 1310
UNROLL_BWD, UNROLL_LISTED_BWD = 4, 2
# two programs of 8 warps: three, where registers let them, take 1174 us, 1024 of a list
WARPS_PER_MULTIPROCESSOR_FWD = 16
WARPS_PER_MULTIPROCESSOR_BWD = 16
# of L2, for what the programs read a second time, in bytes: half of an H100's
MOST_READ_AGAIN = 24 * 2**20
# Blocks whose gradients are computed from one read, as one program of a multiprocessor has them in its registers: bf16
# rows of more than half of HELD_COLS. The rows of the STAGES_HELD - 1 next tokens wait in shared memory, up to 145 KiB.
# A kernel that spells out eight blocks took 818 us at 8x16384x4096 on an H100, with the blocks read again 939, with one
# token ahead 830, by 16 warps 946. TODO: five to seven, when they are timed (benchmarks/tune.py). Nine spill 88 bytes a
# thread, eight 12, and the kernel of a list has no more pointers; eight of fp16 144: nothing but .to makes it fp32, so
# its numbers are kept (see wide_again)
HELD_COLS, LEAST_HELD, MOST_HELD, STAGES_HELD = 4096, 5, 8, 3


def attention_residual_reference(
    blocks: Tensor | Sequence[Tensor], query: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    stack = blocks if isinstance(blocks, Tensor) else torch.stack([*blocks])
    wide = stack.to(torch.promote_types(stack.dtype, torch.float32))
    keys = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if weight is not None:
        keys = keys * weight.to(wide.dtype)
    shares = (keys * query.to(wide.dtype)).sum(-1, keepdim=True).softmax(0)
    return (shares * wide).sum(0).to(stack.dtype)


class Blocks(NamedTuple):
    """How the kernels find the blocks."""

    tensors: tuple[Tensor | None, ...]  # a stack [N, T, D]; or rows [T, D], and None up to LISTED
    listed: bool
    strides: tuple[int, ...]  # elements from one block of a stack to the next, and from one row to the next
    count: int
    rows: int
    cols: int

    @classmethod
    def of(cls, blocks: Sequence[Tensor]) -> Blocks:
        """One stack [N, ..., D], or rows [..., D]."""
        if len(blocks) == 1:
            stack = blocks[0]
            if stack.ndim != 3:
                stack = stack.flatten(1, -2) if stack.ndim > 3 else stack.unsqueeze(1)
            n, t, d = stack.shape
            if torch.compiler.is_compiling():
                # as in row_stride: dynamo can't say the strides of every tensor
                return cls((stack.contiguous(),), False, (t * d, d), n, t, d)
            if stack.stride(2) != 1 and d != 1:
                stack = stack.contiguous()
            return cls((stack,), False, stack.stride()[:2], n, t, d)
        rows = [rows_of(block) for block in blocks]
        if len({row_stride(block) for block in rows}) > 1:
            rows = [block.contiguous() for block in rows]
        return cls(_padded(rows), True, (row_stride(rows[0]),), len(rows), *rows[0].shape)


def row_tile(d: int, per_thread: int) -> tuple[int, int]:
    """Columns and warps of a program, which has a row of d columns whole."""
    cols = power_of_2(d)
    return cols, warps_for(cols, per_thread)


def group_of(at: Blocks, cols: int, elements: int, most: int) -> int:
    """How many blocks a program takes up at a time: a power of two."""
    if at.listed and _triton.LANES == 64:
        # for AMD's devices Triton compiles no tile whose rows have pointers of their own
        return 1
    return max(1, min(power_of_2(at.count), most, elements // cols))


def _padded(tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
    return *tensors, *[None] * (LISTED - len(tensors))


def attention_residual_fwd(
    blocks: Sequence[Tensor], query: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """A stack [N, ..., D] or blocks [..., D], query, weight [D] -> y [..., D], saved [2 N + 1, T]."""
    first, at = blocks[0], Blocks.of(blocks)
    # half the host time of torch.empty, as `like` is
    y = like(first) if at.listed else first.new_empty(*first.shape[1:])
    saved = torch.empty((2 * at.count + 1, at.rows), dtype=torch.float32, device=first.device)
    if at.rows == 0 or at.cols == 0:
        return y, saved
    cols, warps = row_tile(at.cols, PER_THREAD_FWD)
    group = group_of(at, cols, TILE_FWD, MOST_GROUP_FWD)
    launch(
        _attention_residual_fwd_listed_kernel if at.listed else _attention_residual_fwd_kernel,
        (min(at.rows, resident(first, WARPS_PER_MULTIPROCESSOR_FWD, warps)),),
        *at.tensors, query, weight, y, saved, *at.strides, at.count, at.rows, at.cols, eps,
        HAS_WEIGHT=weight is not None, GROUP=group, BLOCK_COLS=cols,
        STAGES=stages_for(first, STAGES_FWD, first.itemsize * group * cols), num_warps=warps,
    )  # fmt: skip
    return y, saved


def attention_residual_bwd(
    dy: Tensor,
    blocks: Sequence[Tensor],
    query: Tensor,
    weight: Tensor | None,
    saved: Tensor,
    wants: tuple[bool, bool, bool],
) -> tuple[list[Tensor] | None, Tensor | None, Tensor | None]:
    """dy [..., D], blocks, query, weight [D], saved -> the blocks' gradients, dquery, dweight [D]; those wanted."""
    at = Blocks.of(blocks)
    nothing = at.rows == 0 or at.cols == 0
    make = torch.zeros_like if nothing else torch.empty_like
    dblocks = [like(block) for block in blocks] if wants[0] else None
    dquery = make(query) if wants[1] else None
    dweight = make(weight) if wants[2] else None
    if nothing or not any(wants):
        return dblocks, dquery, dweight
    dy = rows_of(dy)
    cols, warps = row_tile(at.cols, PER_THREAD_BWD)
    way = _held(dy, at) if is_held(dy, at) else _walked(dy, at, cols, warps)
    gradients = [None] if dblocks is None else dblocks
    wants_sums = wants[1] or wants[2]
    partial = torch.empty((way.programs, at.cols), dtype=torch.float32, device=dy.device) if wants_sums else None
    launch(
        way.kernel, (way.programs,),
        dy, *at.tensors[: way.pointers], *(_padded(gradients)[: way.pointers] if at.listed else gradients),
        query, weight, saved, *way.scratch, partial, row_stride(dy), *at.strides, *way.count, at.rows, at.cols,
        HAS_WEIGHT=weight is not None, WANTS_DV=wants[0], WANTS_SUMS=wants_sums,
        **way.constants, BLOCK_COLS=cols, num_warps=warps,
    )  # fmt: skip
    if partial is not None:
        launch(
            _attention_residual_sums_kernel, (cdiv(at.cols, SUM_COLS),),
            partial, query, weight, dquery, dweight, partial.shape[0], at.cols,
            HAS_WEIGHT=weight is not None, WANTS_DQUERY=wants[1], WANTS_DWEIGHT=wants[2],
            BLOCK_ROWS=SUM_ROWS, BLOCK_COLS=SUM_COLS, num_warps=8,
        )  # fmt: skip
    return dblocks, dquery, dweight


def is_held(x: Tensor, at: Blocks) -> bool:
    """Whether one read of x's blocks is enough for their gradients; what copies tiles has the shared memory, too."""
    return (
        x.dtype == torch.bfloat16
        and power_of_2(at.cols) == HELD_COLS
        and LEAST_HELD <= at.count <= MOST_HELD
        and copies_tiles(x)
    )


class Way(NamedTuple):
    """How the backward goes over the blocks, and what its kernel takes that those of the other way don't."""

    kernel: JITFunction
    pointers: int  # to the blocks of a list
    programs: int
    constants: dict[str, bool | int]
    scratch: tuple[Tensor, ...] = ()
    count: tuple[int, ...] = ()


def _held(dy: Tensor, at: Blocks) -> Way:
    """Once: a program holds its token's blocks."""
    kernel = _attention_residual_bwd_held_listed_kernel if at.listed else _attention_residual_bwd_held_kernel
    programs = min(at.rows, multiprocessors(dy))
    return Way(kernel, MOST_HELD, programs, {"N_BLOCKS": at.count, "STAGES": STAGES_HELD})


def _walked(dy: Tensor, at: Blocks, cols: int, warps: int) -> Way:
    """Twice: what was read first is read again."""
    kernel = _attention_residual_bwd_listed_kernel if at.listed else _attention_residual_bwd_kernel
    again = max(multiprocessors(dy), MOST_READ_AGAIN // (at.count * dy.itemsize * cols))
    programs = min(at.rows, resident(dy, WARPS_PER_MULTIPROCESSOR_BWD, warps), again)
    # 1024 threads have 64 registers each
    is_crowded = warps * _triton.LANES > 512
    constants = {
        "HOLDS_QUERY": cols <= WIDEST_QUERY,
        "GROUP": 1 if is_crowded else group_of(at, cols, TILE_BWD, MOST_GROUP_BWD),
        "UNROLL": 1 if is_crowded else UNROLL_LISTED_BWD if at.listed else UNROLL_BWD,
    }
    # in memory of its own, not behind the partial sums: see mhc_coefficients_bwd
    scratch = torch.empty(2 * programs * at.count, dtype=torch.float32, device=dy.device)
    return Way(kernel, LISTED, programs, constants, (scratch,), (at.count,))


class AttentionResidualFunction(torch.autograd.Function):
    """Autograd around the launchers, which flatten (see RMSNormFunction). One block is a stack."""

    @staticmethod
    def forward(ctx, query: Tensor, weight: Tensor | None, eps: float, *blocks: Tensor) -> Tensor:
        y, saved = attention_residual_fwd(blocks, query, weight, eps)
        ctx.save_for_backward(query, weight, saved, *blocks)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        query, weight, saved, *blocks = ctx.saved_tensors
        wants_query, wants_weight, _, *each = ctx.needs_input_grad
        dblocks, dquery, dweight = attention_residual_bwd(
            dy, blocks, query, weight, saved, (any(each), wants_query, wants_weight)
        )
        if dblocks is None:
            return dquery, dweight, None, *[None] * len(blocks)
        return dquery, dweight, None, *[d if wants else None for d, wants in zip(dblocks, each, strict=True)]


def _as_tensors(blocks: Tensor | Sequence[Tensor], query: Tensor, weight: Tensor | None) -> list[Tensor]:
    """One stack, or from two to LISTED blocks."""
    op = "attention_residual"
    if isinstance(blocks, Tensor):
        if blocks.ndim < 2 or blocks.shape[0] == 0:
            raise ValueError(f"{op}: blocks {tuple(blocks.shape)} must be a stack of at least one block, [N, ..., D]")
        tensors, d = [blocks], blocks.shape[-1]
    else:
        tensors = [*blocks]
        if not tensors:
            raise ValueError(f"{op}: blocks is empty; there must be at least one")
        first = tensors[0]
        if first.ndim == 0:
            raise ValueError(f"{op}: blocks[0] is a number; it must have a last dimension, its columns")
        for i, block in enumerate(tensors):
            if block.shape != first.shape or block.dtype != first.dtype:
                raise ValueError(
                    f"{op}: blocks[{i}] is {block.dtype} {tuple(block.shape)}, blocks[0] {first.dtype} "
                    f"{tuple(first.shape)}; all must have one shape and dtype"
                )
        d = first.shape[-1]
        if len(tensors) == 1 or len(tensors) > LISTED:
            tensors = [torch.stack(tensors)]
    for name, vector in (("query", query), ("weight", weight)):
        if vector is not None and vector.shape != (d,):
            raise ValueError(f"{op}: {name} {tuple(vector.shape)} must be one value per column of the blocks, ({d},)")
    return tensors


def attention_residual(
    blocks: Tensor | Sequence[Tensor], query: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6
) -> Tensor:
    """The mean of N blocks' outputs by the softmax over them of ``query . rms_norm(block, weight)``: [..., D].

    blocks: a stack [N, ..., D], or a sequence of N tensors [..., D] of one dtype (more than 16 are stacked, which
    copies them); query [D]; weight [D] or None, that of the keys' norm; eps is that norm's. Rows of more than 16384
    columns run the reference, and a line says so outside of graphs. No block, blocks of unlike shapes or dtypes, and
    other widths of query or weight are a ValueError. From "Attention Residuals" (Kimi Team, arXiv 2603.15031).
    """
    check_numbers("attention_residual", eps=eps)
    # a generator gives its blocks once
    blocks = blocks if isinstance(blocks, Tensor) else [*blocks]
    tensors = _as_tensors(blocks, query, weight)
    d = tensors[0].shape[-1]
    has_kernels = runs_kernels(*tensors, query, weight)
    # a graph can't hold a line of a log
    if has_kernels and d > WIDEST and not torch.compiler.is_compiling():
        say_once(f"ds_fused: attention_residual: rows of {d} columns are wider than {WIDEST}: PyTorch computes them")
    if d > WIDEST or not has_kernels:
        return attention_residual_reference(blocks, query, weight, eps=eps)
    check_dtypes("attention_residual", blocks=tensors[0], query=query, weight=weight)
    query, weight = query.contiguous(), contiguous(weight)
    if torch.compiler.is_compiling():
        # as in rms_norm
        shape = tensors[0].shape[1:] if len(tensors) == 1 else tensors[0].shape
        flat = [t.reshape(t.shape[0], -1, t.shape[-1]) if len(tensors) == 1 else rows_of(t) for t in tensors]
        return AttentionResidualFunction.apply(query, weight, eps, *flat).view(shape)
    return AttentionResidualFunction.apply(query, weight, eps, *tensors)
