"""Group norm of groups too large for one program: each of several keeps a part of the group in registers.

A part is a tile: some channels of the group, and some values of each. Its program measures it, leaves what it found,
waits until all programs of the group have (_meet.py), merges what they found, and writes its part. Everything is then
read once. Where programs can't meet, the same kernel is launched twice: to measure, and to write.

Sums of dweight and dbias come from the same parts.

Sizes: N samples, C channels, G groups, S values of a channel, P parts of a group, K parts of a channel.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common._again import wide_again
from ds_fused.ops.common._launch import launch
from ds_fused.ops.common._meet import MEASURES_ALONE, arrivals, limited, meet, passes, team_and_member
from ds_fused.ops.common._sums import partials
from ds_fused.ops.common._triton import cdiv, power_of_2

# values side by side of a channel that a tile has at least, where there are so many
NARROWEST = 256
# parts whose measures are merged at a time, at most
MERGE_BLOCK = 256
# of a thread, where a group's programs wait for each other: four share a multiprocessor, three with the 80 that the
# assembler takes. On an H200, us of the backward of 16x512x128x128: 251 for 272
REGISTERS_BWD = 64


@triton.jit
def _merged(count, mean, squares, other_count, other_mean, other_squares):
    """Of two sets together: how many values, their mean, and the sum of squared distances from it."""
    total = count + other_count
    share = tl.where(total > 0.0, other_count / tl.maximum(total, 1.0), 0.0)
    distance = other_mean - mean
    return total, mean + distance * share, squares + other_squares + distance * distance * count * share


@triton.jit
def _moments(
    first, moments_ptr, squares_ptr, n_parts, group_channels, n_space,
    ROWS: tl.constexpr, SPACE: tl.constexpr, MERGE: tl.constexpr,
):  # fmt: skip
    """Of the parts from `first` on: how many values each has, none behind the last part; their mean; the squares."""
    other = first + tl.arange(0, MERGE)
    there = other < n_parts
    blocks = tl.cdiv(n_space, SPACE)
    values = tl.minimum(group_channels - other // blocks * ROWS, ROWS)
    values *= tl.minimum(n_space - other % blocks * SPACE, SPACE)
    means = tl.load(moments_ptr + other, mask=there, other=0.0)
    return tl.where(there, values, 0).to(tl.float32), means, tl.load(squares_ptr + other, mask=there, other=0.0)


@triton.jit
def _channels(
    first, sums_ptr, dys_ptr, weight_ptr, n_rows, n_entries, group_channels, HAS_WEIGHT: tl.constexpr,
    MERGE: tl.constexpr,
):  # fmt: skip
    """Both sums of the parts of channels from entry `first` on, by the channel's weight."""
    entry = first + tl.arange(0, MERGE)
    channel = entry % group_channels
    at = (entry // group_channels).to(tl.int64) * n_rows + channel
    there = entry < n_entries
    products = tl.load(sums_ptr + at, mask=there, other=0.0)
    dys = tl.load(dys_ptr + at, mask=there, other=0.0)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
        products *= weight
        dys *= weight
    return products, dys


@triton.jit
def _tile(part, group_channels, n_space, FULL: tl.constexpr, ROWS: tl.constexpr, SPACE: tl.constexpr):
    """Of a part: its first channel and its place in that channel, where it starts in the group, how far its values are
    from there [ROWS, SPACE], which channels exist [ROWS], and which values. FULL: all do, in every part.
    """
    blocks = tl.cdiv(n_space, SPACE)
    channel = part // blocks * ROWS
    place = part % blocks
    rows = tl.arange(0, ROWS)
    lane = tl.arange(0, SPACE)[None, :]
    if FULL:
        exists = tl.full((ROWS,), True, tl.int1)
        mask = tl.full((ROWS, SPACE), True, tl.int1)
    else:
        exists = channel + rows < group_channels
        mask = exists[:, None] & (place * SPACE + lane < n_space)
    # 32 bits suffice in a tile, and take half of the registers
    offset = rows[:, None] * n_space + lane
    return channel, place, channel.to(tl.int64) * n_space + place * SPACE, offset, exists, mask


@triton.jit
def _group_norm_part_fwd_kernel(
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    moments_ptr,  # [2, N, G, P] fp32: mean, and sum of squared distances from it, of each part
    arrivals_ptr,  # of N * G teams
    x_stride,  # elements from one sample to the next; y has no gaps
    n_groups,
    group_channels,
    n_space,
    group_size,
    n_parts,
    eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, SPACE: tl.constexpr,
    MERGE: tl.constexpr, MANY: tl.constexpr,  # more parts than that
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    group, part = team_and_member(arrivals_ptr, n_parts, MEASURES, WRITES)
    in_group, place, start, offset, exists, mask = _tile(part, group_channels, n_space, FULL, ROWS, SPACE)
    first_channel = (group % n_groups) * group_channels
    x_ptr += (group // n_groups) * x_stride + first_channel * n_space + start
    channel = first_channel + in_group + tl.arange(0, ROWS)
    # as it is, not in fp32: half of the registers
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)

    moments_ptr += group * n_parts
    squares_ptr = moments_ptr + tl.num_programs(0).to(tl.int64)
    if MEASURES:
        rows = ROWS if FULL else tl.minimum(group_channels - in_group, ROWS)
        width = SPACE if FULL else tl.minimum(n_space - place * SPACE, SPACE)
        wide = x.to(tl.float32)
        mean = tl.sum(tl.sum(wide, axis=1)) / (rows * width)
        wide = tl.where(mask, wide - mean, 0.0)
        tl.store(moments_ptr + part, mean)
        tl.store(squares_ptr + part, tl.sum(tl.sum(wide * wide, axis=1)))
    if MEASURES and WRITES:
        meet(arrivals_ptr, group, n_parts)
    if WRITES:
        counts, means, all_squares = _moments(
            0, moments_ptr, squares_ptr, n_parts, group_channels, n_space, ROWS, SPACE, MERGE
        )
        if MANY:
            for first in range(MERGE, n_parts, MERGE):
                more_counts, more_means, more_squares = _moments(
                    first, moments_ptr, squares_ptr, n_parts, group_channels, n_space, ROWS, SPACE, MERGE
                )
                counts, means, all_squares = _merged(counts, means, all_squares, more_counts, more_means, more_squares)
        # measured from the first part's mean, so that values far from zero don't cost bits
        some = tl.load(moments_ptr)
        mean = some + tl.sum(counts * (means - some)) / group_size
        means -= mean
        squares = tl.sum(all_squares + counts * means * means)
        rstd = tl.rsqrt(squares / group_size + eps)
        tl.store(mean_ptr + group, mean, mask=part == 0)
        tl.store(rstd_ptr + group, rstd, mask=part == 0)
        y = (x.to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
        if HAS_BIAS:
            y += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
        tl.store(y_ptr + group * group_size + start + offset, y, mask=mask)


@triton.jit
def _group_norm_part_bwd_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, C, S]
    sums_ptr,  # [2, K, N, C] fp32: sums of dy * x_hat, and of dy, of each part of a channel
    arrivals_ptr,  # of N * G teams
    dy_stride,  # elements from one sample to the next; dx has no gaps
    x_stride,
    n_groups,
    group_channels,
    n_space,
    group_size,
    n_parts,
    HAS_WEIGHT: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, SPACE: tl.constexpr,
    MERGE: tl.constexpr, MANY: tl.constexpr,  # more entries than that
):  # fmt: skip
    group, part = team_and_member(arrivals_ptr, n_parts, MEASURES, WRITES)
    in_group, place, start, offset, exists, mask = _tile(part, group_channels, n_space, FULL, ROWS, SPACE)
    first_channel = (group % n_groups) * group_channels
    dy_ptr += (group // n_groups) * dy_stride + first_channel * n_space + start
    x_ptr += (group // n_groups) * x_stride + first_channel * n_space + start
    channel = in_group + tl.arange(0, ROWS)
    # as they are, not in fp32: half of the registers
    dy = tl.load(dy_ptr + offset, mask=mask, other=0.0)
    x = tl.load(x_ptr + offset, mask=mask, other=0.0)
    mean = tl.load(mean_ptr + group)
    rstd = tl.load(rstd_ptr + group)

    blocks = tl.cdiv(n_space, SPACE)
    n_rows = tl.num_programs(0).to(tl.int64) // n_parts * group_channels
    sums_ptr += group * group_channels
    dys_ptr = sums_ptr + blocks * n_rows
    if MEASURES:
        wide = dy.to(tl.float32)
        # where the mask is off x - mean is no zero, but its dy is
        products = tl.sum(wide * (x.to(tl.float32) - mean), axis=1) * rstd
        tl.store(sums_ptr + place * n_rows + channel, products, mask=exists)
        tl.store(dys_ptr + place * n_rows + channel, tl.sum(wide, axis=1), mask=exists)
    if MEASURES and WRITES:
        meet(arrivals_ptr, group, n_parts)
    if WRITES:
        entries = blocks * group_channels
        if HAS_WEIGHT:
            weight_ptr += first_channel
        along, aside = _channels(0, sums_ptr, dys_ptr, weight_ptr, n_rows, entries, group_channels, HAS_WEIGHT, MERGE)
        if MANY:
            for first in range(MERGE, entries, MERGE):
                more_along, more_aside = _channels(
                    first, sums_ptr, dys_ptr, weight_ptr, n_rows, entries, group_channels, HAS_WEIGHT, MERGE
                )
                along += more_along
                aside += more_aside
        dx = wide_again(dy)
        if HAS_WEIGHT:
            dx *= tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
        x_hat = (wide_again(x) - mean) * rstd
        dx = rstd * (dx - tl.sum(aside) / group_size - x_hat * (tl.sum(along) / group_size))
        tl.store(dx_ptr + group * group_size + start + offset, dx, mask=mask)


class Sizes(NamedTuple):
    """Of a tensor [N, C, *] and its groups."""

    samples: int
    groups: int
    group_channels: int
    space: int

    @classmethod
    def of(cls, x: Tensor, n_groups: int) -> Sizes:
        n, c, *space = x.shape
        return cls(n, n_groups, c // n_groups, math.prod(space))

    @property
    def channels(self) -> int:
        return self.groups * self.group_channels

    @property
    def rows(self) -> int:
        return self.samples * self.channels

    @property
    def group_size(self) -> int:
        return self.group_channels * self.space


class Parts(NamedTuple):
    """How a group too large for a tile is cut."""

    count: int  # of a group
    of_channel: int
    rows: int  # channels of a tile
    space: int  # values of each
    warps: int
    full: bool  # no tile has less

    @classmethod
    def of(cls, sizes: Sizes, tile: int, warps: int) -> Parts:
        """Tiles of so many elements, as few as may be."""
        widest = min(tile, power_of_2(sizes.space))
        fewest = None
        for halvings in range(max(1, widest // NARROWEST).bit_length()):
            space = widest >> halvings
            rows, of_channel = tile // space, cdiv(sizes.space, space)
            count = cdiv(sizes.group_channels, rows) * of_channel
            # of as few the widest; the kernels' places in a tile are 32 bits wide
            if fewest is None or (count < fewest.count and rows * sizes.space < 2**31):
                full = sizes.group_channels % rows == 0 and sizes.space % space == 0
                fewest = cls(count, of_channel, rows, space, warps, full)
        return fewest

    def constants(self, n_entries: int) -> dict[str, int]:
        """Of a kernel that merges so many numbers."""
        merge = min(MERGE_BLOCK, power_of_2(n_entries))
        tile = {"FULL": self.full, "ROWS": self.rows, "SPACE": self.space}
        return {**tile, "MERGE": merge, "MANY": n_entries > merge, "num_warps": self.warps}


def sample_stride(x: Tensor) -> int:
    """Elements from one sample of x [N, C, *] to the next."""
    # as row_stride in _triton.py: dynamo can't say the strides of every tensor
    if torch.compiler.is_compiling() and x.is_contiguous():
        return math.prod(x.shape[1:])
    return x.stride(0)


def fwd_in_parts(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sizes: Sizes,
    parts: Parts,
    eps: float,
) -> None:
    """x [N, C, S], weight, bias [C]; fills y [N, C, S], mean and rstd [N, G]."""
    groups = sizes.samples * sizes.groups
    moments = torch.empty(2 * groups * parts.count, dtype=torch.float32, device=x.device)
    steps = passes(x, parts.count)
    arrived = arrivals(x, groups, steps)
    for step in steps:
        launch(
            _group_norm_part_fwd_kernel, (groups * parts.count,),
            x, weight, bias, y, mean, rstd, moments, arrived,
            sample_stride(x), sizes.groups, sizes.group_channels, sizes.space, sizes.group_size, parts.count, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **step, **parts.constants(parts.count),
        )  # fmt: skip


def bwd_in_parts(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    sizes: Sizes,
    parts: Parts,
) -> tuple[Tensor, int]:
    """Fills dx; the partial sums of dweight and dbias, and how many there are."""
    groups = sizes.samples * sizes.groups
    # [2, K, N, C]: a part of a channel of a sample is one of the partial sums of dweight and dbias
    n_partials = parts.of_channel * sizes.samples
    sums = partials(x, n_partials, sizes.channels)
    steps = (MEASURES_ALONE,) if dx is None else passes(x, parts.count)
    arrived = arrivals(x, groups, steps)
    for step in steps:
        launch(
            _group_norm_part_bwd_kernel, (groups * parts.count,),
            dy, x, weight, mean, rstd, dx, sums, arrived, sample_stride(dy), sample_stride(x),
            sizes.groups, sizes.group_channels, sizes.space, sizes.group_size, parts.count,
            HAS_WEIGHT=weight is not None, **step, **parts.constants(parts.of_channel * sizes.group_channels),
            **limited(x, steps, REGISTERS_BWD if parts.full else None),
        )  # fmt: skip
    return sums, n_partials
