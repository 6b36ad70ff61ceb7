"""Group norm: each sample's channels in groups, ``y = weight * (x - mean) / std + bias``, mean and std of a group.

weight and bias, one value per channel, may each be None; std = sqrt(var + eps). Computed in fp32 and rounded once.
Idea: Wu and He, "Group Normalization" (2018).

A group that fits a tile is one program's. Larger ones are shared by several, in parts: that is _group_parts.py.

Saved for backward: x, weight, and mean and 1/std in fp32 per group.
Traffic per element: forward 1 read + 1 write, backward 2 reads + 1 write; in parts, where programs can't meet or a
group has too many, forward 2 + 1 and backward 4 + 1.
dweight and dbias are added up from sums per channel in a fixed order (no atomics: same input, same bits).

Sizes: N samples, C channels, G groups, S values of a channel (every dimension behind it, flattened).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ds_fused.ops.common import _triton
from ds_fused.ops.common._launch import Kept, Ready, launch_ready, ready
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers, check_whole
from ds_fused.ops.common._sums import partials, sum_partials
from ds_fused.ops.common._triton import (
    cdiv,
    check_dtypes,
    like,
    norm_dtype,
    power_of_2,
    resident,
    runs_kernels,
    warps_for,
)
from ds_fused.ops.norms._group_parts import Parts, Sizes, bwd_in_parts, fwd_in_parts, sample_stride
from ds_fused.ops.norms._norms import Wanted, contiguous

# Measured alone are those of groups in parts.
# A tile is whole groups up to these sizes (channels and values each rounded up to a power of two).
WHOLE_GROUP_FWD = 32768
WHOLE_GROUP_BWD = 16384
# elements of a tile when a group is smaller (as many as fit), and of a thread
TILE_FWD, PER_THREAD_FWD = 2048, 16
TILE_BWD, PER_THREAD_BWD = 2048, 8
WARPS_PER_MULTIPROCESSOR = 32
# in parts: elements of a tile, and of a thread. Forward on an H100, 16 x 512 x 128 x 128 in bf16: 32 take 228 us (five
# programs of 8 warps a multiprocessor), 64 take 209 (six of 4, 80 registers). Where tiles may be cut off, their masks
# would fill the registers: 255 with 64
PART_TILE_FWD, PART_PER_THREAD_FWD, CUT_OFF_PER_THREAD_FWD = 8192, 64, 32
PART_TILE_BWD, PART_PER_THREAD_BWD = 8192, 32

# launches of whole groups
_forwards: Kept[Ready] = Kept()
_backwards: Kept[tuple[Ready, int]] = Kept()


def group_norm_reference(
    x: Tensor, n_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # PyTorch's backward fails without
    affine = [t for t in (weight, bias) if t is not None]
    if all(t.dtype == x.dtype for t in affine):
        return torch.group_norm(x, n_groups, weight, bias, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if t is None else t.to(wide) for t in (weight, bias))
    return torch.group_norm(x.to(wide), n_groups, weight, bias, eps).to(norm_dtype(x, x.dtype))


@triton.jit
def _over_group(values, N_GROUPS: tl.constexpr, CHANNELS: tl.constexpr):
    """[groups * channels] -> each channel's sum over its group, of the same shape."""
    if CHANNELS == 1:
        return values
    total = tl.sum(tl.reshape(values, (N_GROUPS, CHANNELS)), axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], (N_GROUPS, CHANNELS)), (N_GROUPS * CHANNELS,))


@triton.jit
def _channels_of_tile(
    n_groups, group_channels, SAMPLES: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A tile's rows are channels of groups of samples: sample in the tile, group, channel, if it is there, of each."""
    row = tl.arange(0, SAMPLES * GROUPS * CHANNELS)
    sample = row // (GROUPS * CHANNELS)
    group = tl.program_id(1).to(tl.int64) * GROUPS + (row // CHANNELS) % GROUPS
    in_group = row % CHANNELS
    channel = group * group_channels + in_group
    return sample, group, channel, in_group, (group < n_groups) & (in_group < group_channels)


# n_samples is not specialized: a batch whose size is no multiple of 16 would compile everything again
@triton.jit(do_not_specialize=["n_samples"])
def _group_norm_fwd_kernel(
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [N, C, S]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    x_stride,  # elements from one sample to the next; y has no gaps
    n_samples,
    n_groups,
    group_channels,
    n_space,
    group_size,
    eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SAMPLES: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, SPACE: tl.constexpr,
):  # fmt: skip
    """Whole groups."""
    # Inductor passes fp64
    eps = tl.cast(eps, tl.float32)
    sample, group, channel, in_group, exists = _channels_of_tile(n_groups, group_channels, SAMPLES, GROUPS, CHANNELS)
    sample += tl.program_id(0).to(tl.int64) * SAMPLES
    exists = exists & (sample < n_samples)
    space = tl.arange(0, SPACE)[None, :]
    mask = exists[:, None] & (space < n_space)

    x = tl.load(x_ptr + (sample * x_stride + channel * n_space)[:, None] + space, mask=mask, other=0.0).to(tl.float32)
    mean = _over_group(tl.sum(x, axis=1), SAMPLES * GROUPS, CHANNELS) / group_size
    x = tl.where(mask, x - mean[:, None], 0.0)
    # the rounding of a mean far from zero, found beside the variance, so that it costs no bits of either
    rest = _over_group(tl.sum(x, axis=1), SAMPLES * GROUPS, CHANNELS) / group_size
    var = _over_group(tl.sum(x * x, axis=1), SAMPLES * GROUPS, CHANNELS) / group_size - rest * rest
    rstd = tl.rsqrt(var + eps)
    stats = sample * n_groups + group
    tl.store(mean_ptr + stats, mean + rest, mask=exists & (in_group == 0))
    tl.store(rstd_ptr + stats, rstd, mask=exists & (in_group == 0))

    y = (x - rest[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=exists, other=0.0).to(tl.float32)[:, None]
    place = (sample * n_groups * group_channels + channel) * n_space
    tl.store(y_ptr + place[:, None] + space, y, mask=mask)


@triton.jit(do_not_specialize=["n_samples"])
def _group_norm_bwd_kernel(
    dy_ptr,  # [N, C, S]
    x_ptr,  # [N, C, S]
    weight_ptr,  # [C]
    mean_ptr,  # [N, G]
    rstd_ptr,  # [N, G]
    dx_ptr,  # [N, C, S]
    partial_ptr,  # [2, programs * SAMPLES, C] fp32: parts of dweight and dbias
    dy_stride,  # elements from one sample to the next; dx has no gaps
    x_stride,
    n_samples,
    n_groups,
    group_channels,
    n_space,
    group_size,
    HAS_WEIGHT: tl.constexpr, WANTS_DX: tl.constexpr, WANTS_SUMS: tl.constexpr,
    SAMPLES: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr, SPACE: tl.constexpr,
):  # fmt: skip
    """Whole groups, of one sample after the other."""
    pid = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    in_tile, group, channel, in_group, known = _channels_of_tile(n_groups, group_channels, SAMPLES, GROUPS, CHANNELS)
    n_channels = n_groups * group_channels
    space = tl.arange(0, SPACE)[None, :]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + channel, mask=known, other=0.0).to(tl.float32)
    if WANTS_SUMS:
        dweight = tl.zeros((SAMPLES * GROUPS * CHANNELS,), tl.float32)
        dbias = tl.zeros((SAMPLES * GROUPS * CHANNELS,), tl.float32)

    for start in range(pid * SAMPLES, n_samples, programs * SAMPLES):
        sample = start + in_tile
        exists = known & (sample < n_samples)
        mask = exists[:, None] & (space < n_space)
        place = (sample * dy_stride + channel * n_space)[:, None]
        dy = tl.load(dy_ptr + place + space, mask=mask, other=0.0).to(tl.float32)
        place = (sample * x_stride + channel * n_space)[:, None]
        x = tl.load(x_ptr + place + space, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + sample * n_groups + group, mask=exists, other=0.0)
        rstd = tl.load(rstd_ptr + sample * n_groups + group, mask=exists, other=0.0)

        # where the mask is off this is no zero, but its dy is
        x_hat = (x - mean[:, None]) * rstd[:, None]
        dys = tl.sum(dy, axis=1)
        products = tl.sum(dy * x_hat, axis=1)
        if WANTS_SUMS:
            dbias += dys
            dweight += products
        if WANTS_DX:
            if HAS_WEIGHT:
                dy *= weight[:, None]
                dys *= weight
                products *= weight
            aside = _over_group(dys, SAMPLES * GROUPS, CHANNELS) / group_size
            along = _over_group(products, SAMPLES * GROUPS, CHANNELS) / group_size
            dx = rstd[:, None] * (dy - aside[:, None] - x_hat * along[:, None])
            place = ((sample * n_channels + channel) * n_space)[:, None]
            tl.store(dx_ptr + place + space, dx, mask=mask)

    if WANTS_SUMS:
        row = pid * SAMPLES + in_tile
        tl.store(partial_ptr + row * n_channels + channel, dweight, mask=known)
        tl.store(partial_ptr + (programs * SAMPLES + row) * n_channels + channel, dbias, mask=known)


def _whole(sizes: Sizes, elements: int, per_thread: int, widest: int) -> dict[str, int] | None:
    """The tile of whole groups, several where they are small; None where one is too large."""
    channels, space = power_of_2(sizes.group_channels), power_of_2(sizes.space)
    if channels * space > widest:
        return None
    groups = min(power_of_2(sizes.groups), max(1, elements // (channels * space)))
    samples = max(1, elements // (groups * channels * space))
    return {
        "SAMPLES": samples,
        "GROUPS": groups,
        "CHANNELS": channels,
        "SPACE": space,
        "num_warps": warps_for(samples * groups * channels * space, per_thread),
    }


def group_norm_fwd(
    x: Tensor, n_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, *], weight, bias [C] -> y [N, C, *] of dtype, mean [N, G], rstd [N, G]."""
    y = like(x, dtype)
    mean = torch.empty(x.shape[0], n_groups, dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    key = None
    if not torch.compiler.is_compiling():
        constants = TILE_FWD, PER_THREAD_FWD, WHOLE_GROUP_FWD, _triton.LANES
        key = x.shape, x.stride(0), n_groups, eps, weight is None, bias is None, constants
    it = _forwards.get(key)
    if it is None:
        sizes = Sizes.of(x, n_groups)
        if sizes.rows * sizes.space == 0:
            return y, mean, rstd
        whole = _whole(sizes, TILE_FWD, PER_THREAD_FWD, WHOLE_GROUP_FWD)
        if whole is None:
            parts = Parts.of(sizes, PART_TILE_FWD, warps_for(PART_TILE_FWD, PART_PER_THREAD_FWD))
            if not parts.full:
                parts = parts._replace(warps=warps_for(PART_TILE_FWD, CUT_OFF_PER_THREAD_FWD))
            fwd_in_parts(x, weight, bias, y, mean, rstd, sizes, parts, eps)
            return y, mean, rstd
        it = _forwards.keep(
            key,
            ready(
                _group_norm_fwd_kernel, (cdiv(sizes.samples, whole["SAMPLES"]), cdiv(n_groups, whole["GROUPS"])),
                sample_stride(x), *sizes, sizes.group_size, eps,
                HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, **whole,
            ),
        )  # fmt: skip
    launch_ready(it, x, weight, bias, y, mean, rstd)
    return y, mean, rstd


def group_norm_bwd(
    dy: Tensor,
    x: Tensor,
    n_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    wanted: Wanted,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy, x [N, C, *], weight, bias [C], mean, rstd [N, G] -> dx [N, C, *], dweight, dbias [C]; None if not wanted."""
    nothing = x.numel() == 0
    make = torch.zeros_like if nothing else torch.empty_like
    dx = like(x) if wanted.dx else None
    dweight = make(weight) if wanted.dweight else None
    dbias = make(bias) if wanted.dbias else None
    if nothing:
        return dx, dweight, dbias
    sums = wanted.dweight or wanted.dbias
    key = None
    if not torch.compiler.is_compiling():
        constants = TILE_BWD, PER_THREAD_BWD, WHOLE_GROUP_BWD, WARPS_PER_MULTIPROCESSOR, _triton.LANES
        key = x.shape, dy.stride(0), x.stride(0), n_groups, weight is None, wanted.dx, sums, x.device, constants
    whole = _backwards.get(key)
    if whole is None:
        sizes = Sizes.of(x, n_groups)
        tile = _whole(sizes, TILE_BWD, PER_THREAD_BWD, WHOLE_GROUP_BWD)
        if tile is not None:
            whole = _backwards.keep(key, _backward_of_whole_groups(dy, x, weight, sizes, tile, wanted.dx, sums))
    if whole is None:
        parts = Parts.of(sizes, PART_TILE_BWD, warps_for(PART_TILE_BWD, PART_PER_THREAD_BWD))
        partial, n_partials = bwd_in_parts(dy, x, weight, mean, rstd, dx, sizes, parts)
    else:
        it, n_partials = whole
        partial = partials(x, n_partials, x.shape[1]) if sums else None
        launch_ready(it, dy, x, weight, mean, rstd, dx, partial)
    if sums:
        sum_partials(partial, n_partials, x.shape[1], dweight, dbias)
    return dx, dweight, dbias


def _backward_of_whole_groups(
    dy: Tensor, x: Tensor, weight: Tensor | None, sizes: Sizes, tile: dict[str, int], wants_dx: bool, wants_sums: bool
) -> tuple[Ready, int]:
    """A launch, and how many partial sums of dweight and dbias it leaves."""
    group_blocks = cdiv(sizes.groups, tile["GROUPS"])
    most = max(1, resident(x, WARPS_PER_MULTIPROCESSOR, tile["num_warps"]) // group_blocks)
    programs = min(cdiv(sizes.samples, tile["SAMPLES"]), most)
    it = ready(
        _group_norm_bwd_kernel, (programs, group_blocks),
        sample_stride(dy), sample_stride(x), *sizes, sizes.group_size,
        HAS_WEIGHT=weight is not None, WANTS_DX=wants_dx, WANTS_SUMS=wants_sums, **tile,
    )  # fmt: skip
    return it, programs * tile["SAMPLES"]


class GroupNormFunction(torch.autograd.Function):
    """Autograd around the launchers; sees [N, C, *], samples without gaps inside."""

    @staticmethod
    def forward(
        ctx, x: Tensor, n_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        y, mean, rstd = group_norm_fwd(x, n_groups, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.n_groups = n_groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        wants_dx, _, wants_dweight, wants_dbias = ctx.needs_input_grad[:4]
        wanted = Wanted(wants_dx, weight is not None and wants_dweight, bias is not None and wants_dbias)
        dx, dweight, dbias = group_norm_bwd(_without_gaps(dy), x, ctx.n_groups, weight, bias, mean, rstd, wanted)
        return dx, None, dweight, dbias, None, None


def _planes(x: Tensor) -> Tensor:
    """[N, C, *] -> [N, C, S], samples without gaps inside: a view where that can be one, else a copy."""
    planes = x.unsqueeze(2) if x.ndim == 2 else x.flatten(2)
    if planes.is_contiguous() or (planes.stride(2) == 1 and planes.stride(1) == planes.shape[2]):
        return planes
    return planes.contiguous()


def _without_gaps(x: Tensor) -> Tensor:
    """[N, C, *], itself where it can be: a view that autograd sees is a node forward and one backward."""
    return x if x.is_contiguous() and not torch.compiler.is_compiling() else _planes(x)


def group_norm(
    x: Tensor, n_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *, eps: float = 1e-5
) -> Tensor:
    """Group norm of x [N, C, ...] over n_groups groups of channels; weight and bias [C] or None.

    The result has x's dtype, but fp32 where PyTorch's is: under the autocast of a GPU. It is contiguous; an x whose
    channels are its last in memory (``torch.channels_last``) is copied first.
    """
    if x.ndim < 2:
        raise ValueError(f"group_norm: x {tuple(x.shape)} must be [samples, channels, ...]")
    check_whole("group_norm", n_groups=n_groups)
    check_numbers("group_norm", eps=eps)
    if n_groups < 1 or x.shape[1] % n_groups:
        raise ValueError(f"group_norm: n_groups is {n_groups}; it must divide the {x.shape[1]} channels of x")
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[1:2]:
            raise ValueError(
                f"group_norm: {name} {tuple(vector.shape)} must be one value per channel of x {tuple(x.shape)}, or None"
            )
    if not runs_kernels(x, weight, bias):
        return group_norm_reference(x, n_groups, weight, bias, eps=eps)
    check_dtypes("group_norm", x=x, weight=weight, bias=bias)
    weight, bias = contiguous(weight), contiguous(bias)
    y = GroupNormFunction.apply(_without_gaps(x), n_groups, weight, bias, eps, norm_dtype(x, x.dtype))
    return y if y.shape == x.shape else y.view(x.shape)
