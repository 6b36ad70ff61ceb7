"""Rotary embedding of q and k in one launch; backward is the rotation by -theta, one launch too.

    q' = q * cos + rotate(q) * sin,  k' = k * cos + rotate(k) * sin

over the first R columns of a head (cos and sin are R wide); the other D - R pass through. ``rotate`` turns pairs of
columns: (i, i + R/2) as most HuggingFace models do, or (2i, 2i + 1) ("interleaved").

Angles come as cos and sin, both halves as HuggingFace makes them; as one complex number for each pair (Llama-4's
``freqs_cis``); or three times, by time, height and width, of which each pair takes one (multimodal sections, Qwen2-VL,
arXiv 2409.12191). They are read as they are: nothing is put together in memory first.

Saved for backward: the angles. Traffic per element of q and k: 1 read + 1 write each way. cos and sin are read once
per token for all heads. q' and k' get the memory layout of q and k (and so do the gradients), so that the transposes
around attention stay free. fp32 inside, one rounding. With ``inplace`` and ``overwrite_grad`` neither way takes memory;
a program reads the heads that it works on before it writes them, and nobody else's.

Sizes: B batch, T tokens, H heads (q and k have their own number), D columns of a head, R rotated columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common._heads import (
    Gradient,
    angle_strides,
    as_called,
    as_kernels_read,
    as_pairs,
    gradient_of,
    is_swapped,
    keeps_columns,
    strides,
    with_room,
)
from ds_fused.ops.common._launch import Kept, Ready, launch_ready, ready
from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_whole
from ds_fused.ops.common._triton import check_dtypes, note_taken, power_of_2, runs_kernels
from ds_fused.ops.rotary._rope import RopeForm, are_few, check_inplace, check_inplace_strides, check_rope
from ds_fused.ops.rotary._rope_kernels import _rope_kernel

# pairs of columns that a program turns at a time (heads x R/2), and its warps. 0.8 % from best of 15 at 32768 tokens of
# 64 + 8 heads of 128 on H100 (benchmarks/results/h100/tune.csv); complex angles and sections are not measured yet
TILE_PAIRS = 2048
NUM_WARPS = 4
# of few heads: on an H200, ms of 32768 tokens of 9 + 3 heads of 64 and 12 + 2 of 128 0.034 and 0.067, by 4 warps 0.043
# and 0.080 (results/h200/tune.csv)
FEW_WARPS = 1


def _angles_reference(
    cos: Tensor, sin: Tensor | None, sections: Sequence[int] | None, alternating: bool
) -> tuple[Tensor, Tensor]:
    """cos and sin, [B or 1, T, R]."""
    if sections is not None:
        time, height, width = sections
        pair = torch.arange(cos.shape[-1] // (2 - cos.is_complex()), device=cos.device)
        if alternating:
            axis = 1 * ((pair % 3 == 1) & (pair < 3 * height)) + 2 * ((pair % 3 == 2) & (pair < 3 * width))
        else:
            axis = 1 * (pair >= time) + 1 * (pair >= time + height)
        axis = axis if cos.is_complex() else axis.repeat(2)
        cos, sin = (None if x is None else x.gather(0, axis.expand(1, *x.shape[1:])).squeeze(0) for x in (cos, sin))
    if sin is None:
        cos, sin = (torch.cat((x, x), -1) for x in (cos.real, cos.imag))
    return cos, sin


def _rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """One of q and k, [B, H, T, D]; cos and sin [B or 1, 1, T, R]."""
    r = cos.shape[-1]
    turned, rest = x[..., :r], x[..., r:]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., : r // 2], turned[..., r // 2 :]
    cos_1, cos_2, sin_1, sin_2 = *cos.chunk(2, -1), *sin.chunk(2, -1)
    pair = (first * cos_1 - second * sin_1, second * cos_2 + first * sin_2)
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat((turned, rest.to(turned.dtype)), -1)


def rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    unsqueeze_dim: int = 1,
    sections: Sequence[int] | None = None,
    alternating: bool = False,
    keep_dtype: bool = False,
    inplace: bool = False,
    overwrite_grad: bool = False,  # a permission that plain PyTorch makes no use of
) -> tuple[Tensor, Tensor]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    cos, sin = _angles_reference(cos, sin, sections, alternating)
    if q.ndim == 4:
        # angles without a batch dimension get one
        cos, sin = ((x if x.ndim == 3 else x[None]).unsqueeze(unsqueeze_dim) for x in (cos, sin))
    else:
        cos, sin = (x.unsqueeze(unsqueeze_dim - 1) for x in (cos, sin))
    ys = [_rotate_reference(x, cos, sin, interleaved) for x in (q, k)]
    if keep_dtype or inplace:
        ys = [y.to(x.dtype) for x, y in zip((q, k), ys, strict=True)]
    if inplace:
        ys = [x.copy_(y) for x, y in zip((q, k), ys, strict=True)]
    return ys[0], ys[1]


class Turn(NamedTuple):
    """What a call of rope does, beside its tensors."""

    form: RopeForm
    dtypes: tuple[torch.dtype, torch.dtype]  # of the results
    inplace: bool
    overwrite_grad: bool
    is_plain: bool  # kernels read the tensors as they are
    gradients: tuple[Gradient, Gradient] | None  # of q and k; None where the results are asked how they lie
    # the launches of tensors that lie as this call's do, by `_rope`'s key. None in a graph, whose sizes may be symbols
    launches: dict[tuple[object, ...], Ready] | None


# calls whose tensors lie alike differ in nothing that a check or a launcher looks at
_turns: Kept[Turn] = Kept()


def _rope(
    q: Tensor | None,
    k: Tensor | None,
    cos: Tensor,
    sin: Tensor | None,
    yq: Tensor | None,
    yk: Tensor | None,
    turn: Turn,
    inplace: bool,
    key: tuple[object, ...] = (),
) -> None:
    """q, yq [B, Hq, T, D], k, yk [B, Hk, T, D], cos, sin [(3,) (B or 1,) T, R]: writes yq and yk, or one of both.

    ``inplace``: all that is written lies over what is read. ``key``: of a backward, all that the turn itself doesn't
    say of it.
    """
    it = None if turn.launches is None else turn.launches.get(key)
    # heads that there are not are not touched: any pointer does
    tensors = (
        k if q is None else q, q if k is None else k, cos, cos if sin is None else sin,
        yk if q is None else yq, yq if k is None else yk,
    )  # fmt: skip
    if it is None:
        grid, numbers, constants = _arguments(*tensors, turn, q is not None, k is not None, inplace, backward=key != ())
        if not grid[0]:
            return
        it = ready(_rope_kernel, grid, *numbers, **constants)
        if turn.launches is not None:
            turn.launches[key] = it
    launch_ready(it, *tensors)


def _arguments(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    yq: Tensor,
    yk: Tensor,
    turn: Turn,
    has_q: bool,
    has_k: bool,
    inplace: bool,
    *,
    backward: bool,
) -> tuple[tuple[int], tuple[int, ...], dict[str, object]]:
    """The grid, which may be empty, and what a launch takes behind its tensors."""
    form = turn.form
    heads_dim = form.heads_dim
    shape, k_shape = q.shape, k.shape
    q_heads, k_heads = shape[heads_dim] if has_q else 0, k_shape[heads_dim] if has_k else 0
    batch, n_tokens, d = shape[0], shape[3 - heads_dim], shape[3]
    r = cos.shape[-1]
    block_pairs = power_of_2(r // 2)
    most_heads = max(1, TILE_PAIRS // block_pairs)
    time, height, width = form.sections or (0, 0, 0)
    numbers = (
        *strides(q, shape, heads_dim), *strides(k, k_shape, heads_dim),
        *strides(yq, shape, heads_dim), *strides(yk, k_shape, heads_dim),
        *angle_strides(cos, form.sections is not None), n_tokens,
    )  # fmt: skip
    constants = dict(
        Q_HEADS=q_heads, K_HEADS=k_heads, D=d, R=r, INTERLEAVED=form.interleaved, COMPLEX=form.complex,
        SECTIONS=form.sections is not None, TIME=time, HEIGHT=height, WIDTH=width, ALTERNATING=form.alternating,
        BACKWARD=backward, INPLACE=inplace, BLOCK_Q_HEADS=min(power_of_2(q_heads), most_heads),
        BLOCK_K_HEADS=min(power_of_2(k_heads), most_heads), BLOCK_PAIRS=block_pairs, BLOCK_REST=power_of_2(d - r),
        num_warps=FEW_WARPS if are_few(q_heads, k_heads, d) else NUM_WARPS,
    )  # fmt: skip
    return (batch * n_tokens if d else 0,), numbers, constants


class RopeFunction(torch.autograd.Function):
    """Autograd around the launches; sees q [B, Hq, T, D], k [B, Hk, T, D], cos and sin [(3,) (B or 1,) T, R].

    Or q and k as [B, T, heads, D], as the form says: views that autograd sees are nodes forward and backward.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor | None, turn: Turn) -> tuple[Tensor, Tensor]:
        if turn.inplace:
            # mark_dirty is no way: autograd refuses it for two views, which q and k are in every model. So the results
            # are other tensors over the same memory, and whoever saved q or k gets autograd's error, not wrong numbers
            yq, yk = q.detach(), k.detach()
        else:
            # strides in the order of q's and k's, without their gaps
            yq, yk = torch.empty_like(q, dtype=turn.dtypes[0]), torch.empty_like(k, dtype=turn.dtypes[1])
        _rope(q, k, cos, sin, yq, yk, turn, turn.inplace)
        if turn.inplace and not q.is_inference():
            torch.autograd.graph.increment_version((q, k))
        ctx.save_for_backward(cos, sin)
        wanted_q, wanted_k = ctx.needs_input_grad[:2]
        if wanted_q != wanted_k:
            ctx.mark_non_differentiable(yk if wanted_q else yq)
        ctx.turn = turn
        ctx.gradients = turn.gradients or (Gradient(is_swapped(yq), q.dtype), Gradient(is_swapped(yk), k.dtype))
        return yq, yk

    @staticmethod
    @once_differentiable
    def backward(ctx, dyq: Tensor, dyk: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        turn = ctx.turn
        wants_q, wants_k = ctx.needs_input_grad[:2]
        # the sum of both results hands one tensor to both
        overwrite = turn.overwrite_grad and not (wants_q and wants_k and dyq.data_ptr() == dyk.data_ptr())
        dyq, dq = with_room(dyq, ctx.gradients[0], overwrite) if wants_q else (None, None)
        dyk, dk = with_room(dyk, ctx.gradients[1], overwrite) if wants_k else (None, None)
        # where one is not wanted, nothing of it lies elsewhere
        over_q, over_k = dq is dyq, dk is dyk
        # a hook may have brought the angles back in another layout
        key = (
            None if dyq is None else dyq.stride(), None if dyk is None else dyk.stride(), cos.stride(), over_q, over_k,
        )  # fmt: skip
        _rope(dyq, dyk, cos, sin, dq, dk, turn, over_q and over_k, key)
        if overwrite:
            note_taken((dyq, dyk), (dq, dk))
        return dq, dk, None, None, None


def rope(
    q: Tensor,  # [B, Hq, T, D]
    k: Tensor,  # [B, Hk, T, D]
    cos: Tensor,  # [B or 1, T, R]
    sin: Tensor | None = None,
    *,
    interleaved: bool = False,
    unsqueeze_dim: int = 1,
    sections: Sequence[int] | None = None,
    alternating: bool = False,
    keep_dtype: bool = False,
    inplace: bool = False,
    overwrite_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turns q [B, Hq, T, D] and k [B, Hk, T, D] (``unsqueeze_dim=2``: [B, T, H, D]) by the angles of cos and sin.

    cos and sin are [B or 1, T, R], R <= D, as HuggingFace makes them: column i and column R/2 + i belong to pair i
    (``cat((angles, angles), -1)``), whichever columns of q the pair is: i and R/2 + i, or with ``interleaved`` 2i and
    2i + 1. Or cos is complex, [B or 1, T, R/2], with cos + i sin of each pair, and there is no sin: Llama-4's
    freqs_cis, with ``interleaved=True``. The batch dimension of the angles may be left out, and then that of q and k,
    too (a vision tower's patches). Angles get no gradient.
    ``sections``: angles have a dimension of 3 in front, for time, height and width, and that many pairs turn by each of
    them: the first ones by time, the next by height, the last by width (Qwen2-VL), or ``alternating`` (Qwen3-VL).
    Any strides of q and k are read in place if the columns of a head lie side by side. The results have the promoted
    dtype of q (k) and the angles; with ``keep_dtype`` that of q (k).
    ``inplace``: the results, in the dtype of q (k), take the memory of q and k, whose values are lost. Only for tensors
    whose producer keeps nothing of them (a matrix product's output); autograd raises where it does. A compiled
    graph, which sees to its own memory, may ignore it.
    ``overwrite_grad``: the same backward, over the gradients of the results. Only where these are this call's alone, as
    those that attention has made of q and k; an addition hands one tensor to both its summands. One that does not lie
    as q (k) does, without gaps, or has another dtype is left as it is. A second backward is right if they are made
    anew, and autograd's error if they were saved.
    """
    check_whole("rope", unsqueeze_dim=unsqueeze_dim)
    compiling = torch.compiler.is_compiling()
    sections = None if sections is None else tuple(sections)
    if not runs_kernels(q, k, cos, sin):
        form = RopeForm(interleaved, sections, alternating, cos.is_complex())
        check_rope("rope", q, k, cos, sin, unsqueeze_dim, form)
        if inplace and not compiling:
            check_inplace(q, k)
            check_inplace_strides(q, k)
        return rope_reference(
            q, k, cos, sin, interleaved=interleaved, unsqueeze_dim=unsqueeze_dim, sections=sections,
            alternating=alternating, keep_dtype=keep_dtype, inplace=inplace and not compiling,
        )  # fmt: skip
    options = interleaved, unsqueeze_dim, sections, alternating, keep_dtype, inplace, overwrite_grad
    if compiling:
        turn = _turn(q, k, cos, sin, *options)
    else:
        key = (
            q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, cos.shape, cos.stride(), cos.dtype,
            None if sin is None else (sin.shape, sin.stride(), sin.dtype, sin.requires_grad), cos.requires_grad,
            # conjugates are copied, to other strides
            cos.is_conj(), options, TILE_PAIRS, NUM_WARPS, FEW_WARPS,
        )  # fmt: skip
        turn = _turns.get(key)
        if turn is None:
            turn = _turn(q, k, cos, sin, *options)
            # angles that require a gradient are refused, but not under no_grad
            if not (cos.requires_grad or (sin is not None and sin.requires_grad)):
                _turns.keep(key, turn)
        if inplace:
            check_inplace(q, k)
    if turn.form.complex:
        cos = as_pairs(cos)
    if turn.is_plain:
        return RopeFunction.apply(q, k, cos, sin, turn)
    n_dims = q.ndim
    # of eager tensors the form says where their heads are
    heads_dim = unsqueeze_dim if compiling else 1
    q, k, cos, sin = as_kernels_read(q, k, cos, sin, heads_dim)
    return as_called(RopeFunction.apply(q, k, cos, sin, turn), n_dims, heads_dim)


def _turn(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor | None,
    interleaved: bool,
    unsqueeze_dim: int,
    sections: tuple[int, int, int] | None,
    alternating: bool,
    keep_dtype: bool,
    inplace: bool,
    overwrite_grad: bool,
) -> Turn:
    """What rope does of these tensors, or one clear error."""
    compiling = torch.compiler.is_compiling()
    # dynamo can't say the strides of all layouts, and there views cost nothing
    form = RopeForm(interleaved, sections, alternating, cos.is_complex(), 1 if compiling else unsqueeze_dim)
    check_rope("rope", q, k, cos, sin, unsqueeze_dim, form)
    real = cos.real if form.complex else cos
    check_dtypes("rope", q=q, k=k, cos=real, sin=sin)
    dtypes = q.dtype, k.dtype
    if not (keep_dtype or inplace):
        angle = real.dtype if sin is None else torch.promote_types(real.dtype, sin.dtype)
        dtypes = torch.promote_types(q.dtype, angle), torch.promote_types(k.dtype, angle)
    is_plain = (
        not compiling
        and q.ndim == 4
        and all(x is None or x.stride(-1) == 1 for x in (q, k, cos, sin))
        and (sin is None or cos.stride() == sin.stride())
        and keeps_columns(q)
        and keeps_columns(k)
    )
    if inplace and not compiling:
        check_inplace_strides(q, k)
    permitted = inplace and not compiling, overwrite_grad and not compiling
    gradients = None
    if is_plain:
        gradients = gradient_of(q, dtypes[0], inplace), gradient_of(k, dtypes[1], inplace)
    return Turn(form, dtypes, *permitted, is_plain, gradients, None if compiling else {})
