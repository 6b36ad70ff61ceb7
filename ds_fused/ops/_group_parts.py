"""Group norm of groups too large for a tile: twice over everything, in parts that many programs share.

A row is one channel of one sample. The first walk leaves moments (backward: sums) of each part of a row, a small launch
merges those of a group, and the second walk goes over all parts again, from the end of the tensor, which is what L2
still holds. Sums of dweight and dbias come from the same parts.

Sizes: N samples, C channels, G groups, S values of a channel, K parts of a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._sums import partials
from ds_fused.ops._triton import cdiv, power_of_2

# Not yet measured.
MERGE_BLOCK = 256


@triton.jit
def _part(block, x_stride, n_rows, n_channels, n_space, ROWS: tl.constexpr):
    """Some rows (a channel of a sample each) of block: their numbers, channels, offsets in x, and if they are there."""
    row = block * ROWS + tl.arange(0, ROWS)
    channel = row % n_channels
    return row, channel, (row // n_channels) * x_stride + channel * n_space, row < n_rows


@triton.jit(do_not_specialize=["n_rows"])
def _group_norm_moments_kernel(
    x_ptr,  # [N, C, S]
    moments_ptr,  # [2, K, N * C] fp32: mean, and sum of squared distances from it, of each part of a row
    x_stride,
    n_rows,
    n_channels,
    n_space,
    part_size,  # values of a row that a part has; the last one may have fewer
    ROWS: tl.constexpr, SPACE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    row, _, offset, exists = _part(tl.program_id(0).to(tl.int64), x_stride, n_rows, n_channels, n_space, ROWS)
    first = part * part_size
    end = tl.minimum(first + part_size, n_space)
    lane = tl.arange(0, SPACE)[None, :]
    # every lane keeps count, mean and squared distances of its own values (Welford's update), and they are merged once
    count = tl.zeros((ROWS, SPACE), tl.float32)
    means = tl.zeros((ROWS, SPACE), tl.float32)
    squares = tl.zeros((ROWS, SPACE), tl.float32)
    turn = 0.0
    for start in range(first, end, SPACE):
        mask = exists[:, None] & (start + lane < end)
        x = tl.load(x_ptr + offset[:, None] + start + lane, mask=mask, other=0.0).to(tl.float32)
        turn += 1.0
        distance = tl.where(mask, x - means, 0.0)
        means += distance * (1.0 / turn)  # one division for all lanes
        squares += tl.where(mask, distance * (x - means), 0.0)
        count += tl.where(mask, 1.0, 0.0)
    # measured from the first lane's mean, so that values far from zero don't cost bits
    some = tl.sum(tl.where(lane == 0, means, 0.0), axis=1)
    mean = some + tl.sum(count * (means - some[:, None]), axis=1) / (end - first)
    means -= mean[:, None]
    squares = tl.sum(squares + count * means * means, axis=1)
    tl.store(moments_ptr + part * n_rows + row, mean, mask=exists)
    tl.store(moments_ptr + (tl.num_programs(1) + part) * n_rows + row, squares, mask=exists)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _group_norm_merge_moments_kernel(
    moments_ptr,  # [2, K, N * C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    n_rows,
    n_parts,
    part_size,
    group_channels,
    n_space,
    group_size,
    eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    group = tl.program_id(0).to(tl.int64)
    moments_ptr += group * group_channels
    some = tl.load(moments_ptr)
    shift = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_parts * group_channels, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        part = entry // group_channels
        mask = part < n_parts
        count = tl.minimum(part_size, n_space - part * part_size).to(tl.float32)
        mean = tl.load(moments_ptr + part * n_rows + entry % group_channels, mask=mask, other=0.0)
        shift += tl.where(mask, count * (mean - some), 0.0)
    total_mean = some + tl.sum(shift) / group_size

    squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_parts * group_channels, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        part = entry // group_channels
        mask = part < n_parts
        count = tl.minimum(part_size, n_space - part * part_size).to(tl.float32)
        place = part * n_rows + entry % group_channels
        mean = tl.load(moments_ptr + place, mask=mask, other=0.0) - total_mean
        own = tl.load(moments_ptr + n_parts * n_rows + place, mask=mask, other=0.0)
        squares += tl.where(mask, own + count * mean * mean, 0.0)
    tl.store(mean_ptr + group, total_mean)
    tl.store(rstd_ptr + group, tl.rsqrt(tl.sum(squares) / group_size + eps))


@triton.jit(do_not_specialize=["n_rows"])
def _group_norm_apply_kernel(
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    x_stride,
    n_rows,
    n_channels,
    n_space,
    part_size,
    group_channels,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, SPACE: tl.constexpr,
):  # fmt: skip
    # from the end, whose values were read last
    block = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    row, channel, offset, exists = _part(block, x_stride, n_rows, n_channels, n_space, ROWS)
    lane = tl.arange(0, SPACE)[None, :]
    mean = tl.load(mean_ptr + row // group_channels, mask=exists, other=0.0)[:, None]
    scale = tl.load(rstd_ptr + row // group_channels, mask=exists, other=0.0)[:, None]
    if HAS_WEIGHT:
        scale *= tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
    first = (tl.num_programs(1).to(tl.int64) - 1 - tl.program_id(1)) * part_size
    end = tl.minimum(first + part_size, n_space)
    for start in range(first, end, SPACE):
        mask = exists[:, None] & (start + lane < end)
        x = tl.load(x_ptr + offset[:, None] + start + lane, mask=mask, other=0.0).to(tl.float32)
        y = (x - mean) * scale
        if HAS_BIAS:
            y += bias
        tl.store(y_ptr + (row * n_space)[:, None] + start + lane, y, mask=mask)


@triton.jit(do_not_specialize=["n_rows"])
def _group_norm_sums_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    sums_ptr,  # [2, K, N * C] fp32: sums of dy * x_hat, and of dy, of each part of a row
    dy_stride,
    x_stride,
    n_rows,
    n_channels,
    n_space,
    part_size,
    group_channels,
    ROWS: tl.constexpr, SPACE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    row, _, offset, exists = _part(block, x_stride, n_rows, n_channels, n_space, ROWS)
    _, _, dy_offset, _ = _part(block, dy_stride, n_rows, n_channels, n_space, ROWS)
    lane = tl.arange(0, SPACE)[None, :]
    mean = tl.load(mean_ptr + row // group_channels, mask=exists, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + row // group_channels, mask=exists, other=0.0)[:, None]
    first = part * part_size
    end = tl.minimum(first + part_size, n_space)
    dys = tl.zeros((ROWS, SPACE), tl.float32)
    products = tl.zeros((ROWS, SPACE), tl.float32)
    for start in range(first, end, SPACE):
        mask = exists[:, None] & (start + lane < end)
        dy = tl.load(dy_ptr + dy_offset[:, None] + start + lane, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offset[:, None] + start + lane, mask=mask, other=0.0).to(tl.float32)
        dys += dy
        products += dy * ((x - mean) * rstd)
    tl.store(sums_ptr + part * n_rows + row, tl.sum(products, axis=1), mask=exists)
    tl.store(sums_ptr + (tl.num_programs(1) + part) * n_rows + row, tl.sum(dys, axis=1), mask=exists)


@triton.jit(do_not_specialize=["n_rows", "n_parts"])
def _group_norm_merge_sums_kernel(
    sums_ptr,  # [2, K, N * C]
    weight_ptr,  # [C]
    means_ptr,  # [2, N, G] fp32: of weight * dy * x_hat, and of weight * dy
    n_rows,
    n_parts,
    n_groups,
    group_channels,
    group_size,
    HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    along = tl.zeros((BLOCK,), tl.float32)
    aside = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n_parts * group_channels, BLOCK):
        entry = start + tl.arange(0, BLOCK).to(tl.int64)
        part = entry // group_channels
        mask = part < n_parts
        in_group = entry % group_channels
        place = part * n_rows + group * group_channels + in_group
        products = tl.load(sums_ptr + place, mask=mask, other=0.0)
        dys = tl.load(sums_ptr + n_parts * n_rows + place, mask=mask, other=0.0)
        if HAS_WEIGHT:
            channel = (group % n_groups) * group_channels + in_group
            weight = tl.load(weight_ptr + channel, mask=mask, other=0.0).to(tl.float32)
            products *= weight
            dys *= weight
        along += products
        aside += dys
    tl.store(means_ptr + group, tl.sum(along) / group_size)
    tl.store(means_ptr + tl.num_programs(0) + group, tl.sum(aside) / group_size)


@triton.jit(do_not_specialize=["n_rows"])
def _group_norm_dx_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    means_ptr,  # [2, N, G]
    dx_ptr,  # [N, C, S]
    dy_stride,
    x_stride,
    n_rows,
    n_channels,
    n_space,
    part_size,
    group_channels,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, SPACE: tl.constexpr,
):  # fmt: skip
    # from the end, whose values were read last
    block = tl.num_programs(0).to(tl.int64) - 1 - tl.program_id(0)
    row, channel, offset, exists = _part(block, x_stride, n_rows, n_channels, n_space, ROWS)
    _, _, dy_offset, _ = _part(block, dy_stride, n_rows, n_channels, n_space, ROWS)
    lane = tl.arange(0, SPACE)[None, :]
    group = row // group_channels
    mean = tl.load(mean_ptr + group, mask=exists, other=0.0)[:, None]
    rstd = tl.load(rstd_ptr + group, mask=exists, other=0.0)[:, None]
    along = tl.load(means_ptr + group, mask=exists, other=0.0)[:, None]
    aside = tl.load(means_ptr + n_rows // group_channels + group, mask=exists, other=0.0)[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
    first = (tl.num_programs(1).to(tl.int64) - 1 - tl.program_id(1)) * part_size
    end = tl.minimum(first + part_size, n_space)
    for start in range(first, end, SPACE):
        mask = exists[:, None] & (start + lane < end)
        dy = tl.load(dy_ptr + dy_offset[:, None] + start + lane, mask=mask, other=0.0).to(tl.float32)
        x_hat = tl.load(x_ptr + offset[:, None] + start + lane, mask=mask, other=0.0).to(tl.float32)
        x_hat = (x_hat - mean) * rstd
        if HAS_WEIGHT:
            dy *= weight
        dx = rstd * (dy - aside - x_hat * along)
        tl.store(dx_ptr + (row * n_space)[:, None] + start + lane, dx, mask=mask)


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
    """How the rows of groups too large for a tile are cut: tiles of rows x space, parts of part_size values."""

    rows: int
    space: int
    part_size: int
    count: int
    warps: int

    @classmethod
    def of(cls, sizes: Sizes, tile: int, most_space: int, warps: int, turns: int) -> Parts:
        """Tiles of `tile` elements, at most most_space of one row; a program takes `turns` of them."""
        space = min(power_of_2(sizes.space), most_space)
        part_size = space * turns
        return cls(max(1, tile // space), space, part_size, cdiv(sizes.space, part_size), warps)


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
    stride = sample_stride(x)
    grid = (cdiv(sizes.rows, parts.rows), parts.count)
    tile = {"ROWS": parts.rows, "SPACE": parts.space, "num_warps": parts.warps}
    moments = torch.empty((2, parts.count, sizes.rows), dtype=torch.float32, device=x.device)
    launch(
        _group_norm_moments_kernel, grid,
        x, moments, stride, sizes.rows, sizes.channels, sizes.space, parts.part_size,
        **tile,
    )  # fmt: skip
    launch(
        _group_norm_merge_moments_kernel, (sizes.samples * sizes.groups,),
        moments, mean, rstd, sizes.rows, parts.count, parts.part_size, sizes.group_channels, sizes.space,
        sizes.group_size, eps,
        BLOCK=MERGE_BLOCK, num_warps=4,
    )  # fmt: skip
    launch(
        _group_norm_apply_kernel, grid,
        x, weight, bias, y, mean, rstd, stride, sizes.rows, sizes.channels, sizes.space, parts.part_size,
        sizes.group_channels,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **tile,
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
    grid = (cdiv(sizes.rows, parts.rows), parts.count)
    tile = {"ROWS": parts.rows, "SPACE": parts.space, "num_warps": parts.warps}
    strides = sample_stride(dy), sample_stride(x)
    # [2, K, N, C]: a part of a sample is one of the partial sums of dweight and dbias
    n_partials = parts.count * sizes.samples
    sums = partials(x, n_partials, sizes.channels)
    numbers = sizes.rows, sizes.channels, sizes.space, parts.part_size, sizes.group_channels
    launch(_group_norm_sums_kernel, grid, dy, x, mean, rstd, sums, *strides, *numbers, **tile)
    if dx is not None:
        means = torch.empty((2, *mean.shape), dtype=torch.float32, device=x.device)
        launch(
            _group_norm_merge_sums_kernel, (sizes.samples * sizes.groups,),
            sums, weight, means, sizes.rows, parts.count, sizes.groups, sizes.group_channels, sizes.group_size,
            HAS_WEIGHT=weight is not None, BLOCK=MERGE_BLOCK, num_warps=4,
        )  # fmt: skip
        launch(
            _group_norm_dx_kernel, grid,
            dy, x, weight, mean, rstd, means, dx, *strides, *numbers,
            HAS_WEIGHT=weight is not None, **tile,
        )  # fmt: skip
    return sums, n_partials
