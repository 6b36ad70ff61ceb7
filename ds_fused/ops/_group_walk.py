"""Group norm of groups too large for a tile: walked once for the statistics and once more for what is written.

A group has no gaps in memory. The second walk goes through it backwards, so that what the first saw last comes from L2.

- Many groups: one program of 1024 threads owns a group and walks it twice. As few groups as multiprocessors are under
  way at a time, so that much of them is still in L2: of 132 groups of 512 KiB 50 of 66 MiB, and backward, where dy is
  read as well, 50 of 132.
- Few groups, which so few programs could not read at memory's speed: several share a group, in parts, and each walk is
  a launch. The first one leaves in scratch what it found, and every program of the second merges that of its group.

Sums of dweight and dbias are those of the tiles' rows: one partial sum for each sample and tile of a channel.

Sizes: N samples, C channels, G groups, S values of a channel, P parts of a group, T tiles of a channel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops._launch import launch
from ds_fused.ops._norms import Wanted
from ds_fused.ops._sums import partials
from ds_fused.ops._triton import cdiv, multiprocessors, power_of_2, stages_for, warps_for

# from how many groups for each multiprocessor on one program owns a group. Not measured yet.
GROUPS_ALONE = 2
# of such a program: elements of a tile, of a thread (8: 1024 threads, so that few programs share a multiprocessor), and
# how many tiles are in flight. Not measured yet.
WALK_TILE, WALK_PER_THREAD, WALK_STAGES = 8192, 8, 3
# in parts: elements of a tile, its warps, and how many tiles a program takes; more where a group would have more than
# MOST_PARTS parts. Found for kernels that cut channels instead of groups (results/h100/tune.csv), not measured since.
PART_TILE, PART_WARPS, PART_TURNS, MOST_PARTS = 2048, 8, 8, 1024
# values side by side of a channel that a tile has at least, where there are so many
NARROWEST = 256


@triton.jit
def _merged(counts, means, squares, N: tl.constexpr):
    """Mean and squared distances of N sets together, from the counts, means and squared distances of each.

    The first set is not empty.
    """
    total = tl.sum(counts)
    # measured from the first one's mean, so that values far from zero don't cost bits
    some = tl.sum(tl.where(tl.arange(0, N) == 0, means, 0.0))
    mean = some + tl.sum(counts * (means - some)) / total
    means -= mean
    return mean, tl.sum(squares + counts * means * means)


@triton.jit
def _moments(x_ptr, n_values, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Mean, and sum of squared distances from it, of x[:n_values], which is not empty."""
    lane = tl.arange(0, BLOCK)
    # every lane keeps mean and squared distances of its own values (Welford's update), and they are merged once
    means = tl.zeros((BLOCK,), tl.float32)
    squares = tl.zeros((BLOCK,), tl.float32)
    turn = 0.0
    for start in tl.range(0, n_values, BLOCK, num_stages=STAGES):
        mask = start + lane < n_values
        x = tl.load(x_ptr + start + lane, mask=mask, other=0.0).to(tl.float32)
        turn += 1.0
        distance = tl.where(mask, x - means, 0.0)
        means += distance * (1.0 / turn)  # one division for all lanes
        squares += distance * (x - means)
    # some lanes have no value in the last turn
    counts = turn - tl.where(lane < (n_values - 1) % BLOCK + 1, 0.0, 1.0)
    return _merged(counts, means, squares, BLOCK)


@triton.jit
def _part(n_parts, MEASURES: tl.constexpr):
    """The number of a part, its group among those of all samples, and its place in that."""
    number = tl.program_id(0).to(tl.int64)
    if not MEASURES:
        # from the end, whose values were read last
        number = tl.num_programs(0) - 1 - number
    return number, number // n_parts, number % n_parts


@triton.jit
def _tiles(part, n_parts, group_channels, n_space, ROWS: tl.constexpr, SPACE: tl.constexpr):
    """The first tile of a part, and the one behind its last. It may have none."""
    n_tiles = tl.cdiv(group_channels, ROWS) * tl.cdiv(n_space, SPACE)
    turns = tl.cdiv(n_tiles, n_parts)
    first = part.to(tl.int32) * turns
    return first, tl.minimum(first + turns, n_tiles)


@triton.jit
def _tile(tile, group_channels, n_space, ROWS: tl.constexpr, SPACE: tl.constexpr):
    """A tile of a group: where it starts, offsets from there [ROWS, SPACE], its channels [ROWS], and if they exist."""
    n_tiles = tl.cdiv(n_space, SPACE)
    channel = tile // n_tiles * ROWS
    space = tile % n_tiles * SPACE
    rows = tl.arange(0, ROWS)
    lane = tl.arange(0, SPACE)[None, :]
    exists = channel + rows < group_channels
    # 32 bits suffice in a tile, and take half of the registers
    offset = rows[:, None] * n_space + lane
    mask = exists[:, None] & (space + lane < n_space)
    return channel.to(tl.int64) * n_space + space, offset, channel + rows, exists, mask


@triton.jit
def _group_norm_walk_fwd_kernel(
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    moments_ptr,  # [2, N, G, P] fp32: mean, and sum of squared distances from it, of each part
    x_stride,  # elements from one sample to the next; y has no gaps
    n_groups,
    group_channels,
    n_space,
    group_size,
    n_parts,
    part_size,  # the last part of a group may have fewer values, but has some
    eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, SPACE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """MEASURES: the first walk; WRITES: the second one."""
    number, group, part = _part(n_parts, MEASURES)
    first_channel = (group % n_groups) * group_channels
    x_ptr += (group // n_groups) * x_stride + first_channel * n_space

    if MEASURES:
        before = part * part_size
        n_values = tl.minimum(part_size, group_size - before).to(tl.int32)
        mean, squares = _moments(x_ptr + before, n_values, ROWS * SPACE, STAGES)
        if not WRITES:
            tl.store(moments_ptr + number, mean)
            tl.store(moments_ptr + tl.num_programs(0) + number, squares)
    if WRITES:
        if not MEASURES:
            lane = tl.arange(0, PARTS)
            counts = tl.minimum(part_size, group_size - lane.to(tl.int64) * part_size).to(tl.float32)
            moments_ptr += group * n_parts + lane
            means = tl.load(moments_ptr, mask=lane < n_parts, other=0.0)
            own = tl.load(moments_ptr + tl.num_programs(0), mask=lane < n_parts, other=0.0)
            mean, squares = _merged(tl.where(lane < n_parts, counts, 0.0), means, own, PARTS)
        rstd = tl.rsqrt(squares / group_size + eps)
        tl.store(mean_ptr + group, mean, mask=part == 0)
        tl.store(rstd_ptr + group, rstd, mask=part == 0)

        y_ptr += group * group_size
        first, end = _tiles(part, n_parts, group_channels, n_space, ROWS, SPACE)
        for back in tl.range(1, end - first + 1, num_stages=STAGES):
            start, offset, channel, exists, mask = _tile(end - back, group_channels, n_space, ROWS, SPACE)
            x = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
            y = (x - mean) * rstd
            if HAS_WEIGHT:
                y *= tl.load(weight_ptr + first_channel + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
            if HAS_BIAS:
                y += tl.load(bias_ptr + first_channel + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
            # what is written leaves L2 first: its room is for groups that have yet to be read again
            tl.store(y_ptr + start + offset, y, mask=mask, eviction_policy="evict_first")


@triton.jit
def _group_norm_walk_bwd_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, C, S]
    partial_ptr,  # [2, T, N, C] fp32: parts of dweight and dbias
    sums_ptr,  # [2, N, G, P] fp32: of weight * dy * x_hat, and of weight * dy, of each part
    dy_stride,  # elements from one sample to the next; dx has no gaps
    x_stride,
    n_groups,
    group_channels,
    n_space,
    group_size,
    n_parts,
    HAS_WEIGHT: tl.constexpr, MEASURES: tl.constexpr, WRITES: tl.constexpr, WANTS_SUMS: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, SPACE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """MEASURES: the first walk; WRITES: the second one."""
    number, group, part = _part(n_parts, MEASURES)
    first_channel = (group % n_groups) * group_channels
    dy_ptr += (group // n_groups) * dy_stride + first_channel * n_space
    x_ptr += (group // n_groups) * x_stride + first_channel * n_space
    mean = tl.load(mean_ptr + group)
    rstd = tl.load(rstd_ptr + group)
    first, end = _tiles(part, n_parts, group_channels, n_space, ROWS, SPACE)

    if MEASURES:
        along = tl.zeros((ROWS,), tl.float32)
        aside = tl.zeros((ROWS,), tl.float32)
        tiles_of_channel = tl.cdiv(n_space, SPACE)
        n_rows = tl.num_programs(0).to(tl.int64) // n_parts * group_channels
        for tile in tl.range(first, end, num_stages=STAGES):
            start, offset, channel, exists, mask = _tile(tile, group_channels, n_space, ROWS, SPACE)
            dy = tl.load(dy_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
            x = tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
            dys = tl.sum(dy, axis=1)
            products = tl.sum(dy * (x - mean), axis=1) * rstd
            if WANTS_SUMS:
                place = tile % tiles_of_channel * n_rows + group * group_channels + channel
                tl.store(partial_ptr + place, products, mask=exists)
                tl.store(partial_ptr + tiles_of_channel * n_rows + place, dys, mask=exists)
            if HAS_WEIGHT:
                weight = tl.load(weight_ptr + first_channel + channel, mask=exists, other=0.0).to(tl.float32)
                products *= weight
                dys *= weight
            along += products
            aside += dys
        along = tl.sum(along)
        aside = tl.sum(aside)
        if not WRITES:
            tl.store(sums_ptr + number, along)
            tl.store(sums_ptr + tl.num_programs(0) + number, aside)
    if WRITES:
        if not MEASURES:
            lane = tl.arange(0, PARTS)
            sums_ptr += group * n_parts + lane
            along = tl.sum(tl.load(sums_ptr, mask=lane < n_parts, other=0.0))
            aside = tl.sum(tl.load(sums_ptr + tl.num_programs(0), mask=lane < n_parts, other=0.0))
        along /= group_size
        aside /= group_size
        dx_ptr += group * group_size
        for back in tl.range(1, end - first + 1, num_stages=STAGES):
            start, offset, channel, exists, mask = _tile(end - back, group_channels, n_space, ROWS, SPACE)
            dy = tl.load(dy_ptr + start + offset, mask=mask, other=0.0).to(tl.float32)
            x_hat = (tl.load(x_ptr + start + offset, mask=mask, other=0.0).to(tl.float32) - mean) * rstd
            if HAS_WEIGHT:
                dy *= tl.load(weight_ptr + first_channel + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
            dx = rstd * (dy - aside - x_hat * along)
            tl.store(dx_ptr + start + offset, dx, mask=mask, eviction_policy="evict_first")


class Sizes(NamedTuple):
    """Of a tensor [N, C, S] and its groups."""

    samples: int
    groups: int
    group_channels: int
    space: int

    @classmethod
    def of(cls, x: Tensor, n_groups: int) -> Sizes:
        n, c, s = x.shape
        return cls(n, n_groups, c // n_groups, s)

    @property
    def channels(self) -> int:
        return self.groups * self.group_channels

    @property
    def group_size(self) -> int:
        return self.group_channels * self.space

    @property
    def count(self) -> int:
        """Of the groups of all samples."""
        return self.samples * self.groups


class Walk(NamedTuple):
    """How groups are cut: into parts of part_size values, each a program's, and tiles of rows x space."""

    parts: int
    part_size: int
    constants: dict[str, int]

    @classmethod
    def of(cls, sizes: Sizes, *inputs: Tensor) -> Walk:
        """The one place that decides whether a group is one program's, or is shared: one, if the GPU is full then."""
        if sizes.count >= GROUPS_ALONE * multiprocessors(inputs[0]):
            tile, warps = WALK_TILE, warps_for(WALK_TILE, WALK_PER_THREAD)
            stages = stages_for(WALK_STAGES, WALK_TILE * sum(x.element_size() for x in inputs))
            part_size = sizes.group_size
        else:
            tile, warps, stages = PART_TILE, PART_WARPS, 1
            part_size = max(PART_TURNS, cdiv(sizes.group_size, MOST_PARTS * tile)) * tile
        parts = cdiv(sizes.group_size, part_size)
        rows, space = _sides(sizes, tile)
        constants = {"PARTS": power_of_2(parts), "ROWS": rows, "SPACE": space, "STAGES": stages, "num_warps": warps}
        return cls(parts, part_size, constants)

    def launches(self, writes: bool) -> list[dict[str, bool]]:
        """The walks of each launch."""
        if self.parts == 1:
            return [{"MEASURES": True, "WRITES": writes}]
        return [{"MEASURES": not second, "WRITES": second} for second in (False, True)[: 1 + writes]]


def _sides(sizes: Sizes, tile: int) -> tuple[int, int]:
    """Rows and space of a tile: as wide as a channel, or narrower where fewer tiles cover a group then."""
    space = best = min(power_of_2(sizes.space), tile)
    # in a longer channel at most one lane in 16 idles, and 32 bits could not count several such channels
    while sizes.space < 16 * tile and space >= 2 * NARROWEST:
        space //= 2
        if _n_tiles(sizes, tile, space) < _n_tiles(sizes, tile, best):
            best = space
    return tile // best, best


def _n_tiles(sizes: Sizes, tile: int, space: int) -> int:
    return cdiv(sizes.group_channels, tile // space) * cdiv(sizes.space, space)


def sample_stride(x: Tensor) -> int:
    """Elements from one sample of x [N, C, S] to the next."""
    # as row_stride in _triton.py: dynamo can't say the strides of every tensor
    if torch.compiler.is_compiling() and x.is_contiguous():
        return x.shape[1] * x.shape[2]
    return x.stride(0)


def walk_fwd(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    sizes: Sizes,
    eps: float,
) -> None:
    """x [N, C, S], weight, bias [C]; fills y [N, C, S], mean and rstd [N, G]."""
    walk = Walk.of(sizes, x)
    moments = _scratch(x, sizes, walk) if walk.parts > 1 else None
    for walks in walk.launches(writes=True):
        launch(
            _group_norm_walk_fwd_kernel, (sizes.count * walk.parts,),
            x, weight, bias, y, mean, rstd, moments, sample_stride(x), *sizes[1:], sizes.group_size, walk.parts,
            walk.part_size, eps,
            HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **walks, **walk.constants,
        )  # fmt: skip


def walk_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: Tensor | None,
    sizes: Sizes,
    wanted: Wanted,
) -> tuple[Tensor | None, int]:
    """Fills dx; the partial sums of dweight and dbias, and how many there are."""
    walk = Walk.of(sizes, dy, x)
    sums = None if walk.parts == 1 and wanted.dx else _scratch(x, sizes, walk)
    n_partials = cdiv(sizes.space, walk.constants["SPACE"]) * sizes.samples
    wants_sums = wanted.dweight or wanted.dbias
    partial = partials(x, n_partials, sizes.channels) if wants_sums else None
    for walks in walk.launches(writes=wanted.dx):
        launch(
            _group_norm_walk_bwd_kernel, (sizes.count * walk.parts,),
            dy, x, weight, mean, rstd, dx, partial, sums, sample_stride(dy), sample_stride(x), *sizes[1:],
            sizes.group_size, walk.parts,
            HAS_WEIGHT=weight is not None, WANTS_SUMS=wants_sums, **walks, **walk.constants,
        )  # fmt: skip
    return partial, n_partials


def _scratch(x: Tensor, sizes: Sizes, walk: Walk) -> Tensor:
    """Two numbers for each part of each group."""
    return torch.empty(2 * sizes.count * walk.parts, dtype=torch.float32, device=x.device)
