"""What the two cross entropies share beside the kernels: options, checks, reduction, the softmax pass in PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common._options import check_numbers, check_numbers_or_none, check_whole


class LossOptions(NamedTuple):
    """The loss as a number of each token's logits; the reduction over tokens is not its business."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    logit_scale: float = 1.0


def reduced(loss: Tensor, shape: torch.Size, count: Tensor | int, reduction: str) -> Tensor:
    """[N] losses by token to what `reduction` names. The mean is over the tokens that count, NaN where none does."""
    if reduction == "none":
        return loss.view(shape)
    if reduction == "sum":
        return loss.sum()
    return loss.sum() / count


def weights_of_tokens(
    weight: Tensor | None, labels: Tensor, options: LossOptions, dtype: torch.dtype
) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
    """What class weights [V] come to: that of each label [N], 0 where it is ignored; and what the softmax passes need.

    That is nothing without smoothing, where a token's loss is its weight times the plain one. Else the weights [V] and,
    per token [2, N], the weight of its label and the sum over all classes of weight times wanted probability.
    """
    if weight is None:
        return None, (None, None)
    weight = weight.to(dtype).contiguous()
    ignored = labels == options.ignore_index
    of_token = weight[labels.clamp(0, weight.shape[0] - 1).long()].masked_fill(ignored, 0.0)
    smoothing = options.label_smoothing
    if not smoothing:
        return of_token, (None, None)
    of_all = (1.0 - smoothing) * of_token + smoothing * weight.mean()
    return of_token, (weight, torch.stack([of_token, of_all]))


def weighted(loss: Tensor, of_token: Tensor | None, in_kernel: tuple[Tensor | None, Tensor | None]) -> Tensor:
    """Losses [N] with the weights that the softmax passes did not see."""
    return loss if of_token is None or in_kernel[0] is not None else of_token * loss


def dloss_of_tokens(
    dloss: Tensor,  # of what `reduced` has made of `weighted`
    n: int,
    total: Tensor | None,
    of_token: Tensor | None,
    in_kernel: tuple[Tensor | None, Tensor | None],
    reduction: str,
) -> Tensor:
    """The upstream gradient of each token's loss [N] as the softmax passes know it."""
    if reduction == "mean":
        dloss = dloss / total
    # an ignored token's part of an infinite mean is not looked at
    return weighted(dloss if reduction == "none" else dloss.expand(n), of_token, in_kernel)


def outputs(
    loss: Tensor,  # [N], weighted; or [] where it is reduced already
    z_losses: Tensor | None,  # [N], without weights
    right: Tensor | None,  # [N]
    of_token: Tensor | None,  # [N]: weights
    count: Tensor,  # of the tokens that count
    shape: torch.Size,
    reduction: str,
) -> Tensor | tuple[Tensor, ...]:
    """The loss alone, or with what else was asked for."""
    result = reduced(loss, shape, total_weight(of_token, count), reduction) if loss.ndim else loss
    more = []
    if z_losses is not None:
        z_losses = z_losses.detach() if of_token is None else of_token * z_losses.detach()
        more.append(reduced(z_losses, shape, total_weight(of_token, count), reduction))
    if right is not None:
        more.append(right.sum() / count)
    return (result, *more) if more else result


def total_weight(of_token: Tensor | None, count: Tensor) -> Tensor:
    """What a mean divides by."""
    return count if of_token is None else of_token.sum()


def check_weight(op: str, name: str, weight: Tensor | None, n_vocab: int, device: torch.device) -> None:
    """Class weights: one floating-point number for each class, of which no gradient is wanted."""
    if weight is None:
        return
    if weight.shape != (n_vocab,) or not weight.is_floating_point():
        raise ValueError(
            f"{op}: {name} is {weight.dtype} {tuple(weight.shape)}; it must be a floating-point number for each of the "
            f"{n_vocab} classes"
        )
    if weight.device != device:
        raise ValueError(f"{op}: {name} is on {weight.device}, the scores on {device}; they must share a device")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: {name} requires a gradient, and none is made for it; pass {name}.detach()")


def _check_options(op: str, ignore_index: int, softcap: float | None, **others: float) -> None:
    check_whole(op, ignore_index=ignore_index)
    check_numbers(op, **others)
    check_numbers_or_none(op, softcap=softcap)


def check_loss(
    op: str,
    options: LossOptions,
    labels: Tensor | None,  # None: all tokens count
    reduction: str,
    shape: torch.Size,  # of the tokens
    n_vocab: int,
    device: torch.device,
) -> None:
    """One clear error for each bad argument; what stands in the labels is judged in _labels.py."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{op}: reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    _check_options(op, **options._asdict())
    if not 0.0 <= options.label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing is {options.label_smoothing}; it must lie in [0, 1]")
    if options.softcap is not None and not 0.0 < options.softcap < math.inf:
        raise ValueError(f"{op}: softcap is {options.softcap}; it must be positive and finite, or None for no cap")
    if not 0 < n_vocab < 2**31:
        raise ValueError(f"{op}: a vocabulary of {n_vocab}; columns are counted in int32, so 1 to {2**31 - 1} fit")
    if labels is None:
        return
    if labels.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: labels are {labels.dtype}; they must be int64 or int32")
    if labels.shape != shape:
        raise ValueError(f"{op}: labels {tuple(labels.shape)} must have the shape of the tokens, {tuple(shape)}")
    if labels.device != device:
        raise ValueError(f"{op}: labels are on {labels.device}, the scores on {device}; they must share a device")


def cross_entropy_fwd_torch(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor,
    lse: Tensor,
    options: LossOptions,
    *,
    n_vocab: int,
    first_id: int = 0,
    is_first: bool = True,
    is_last: bool = True,
    right: Tensor | None = None,
    weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
) -> None:
    """cross_entropy_fwd without kernels: the same arguments, [N, n_cols] and [N]."""
    smoothing = options.label_smoothing
    for rows in row_blocks(logits):
        z, _ = capped_torch(logits[rows].to(loss.dtype), options)
        col, here = columns(labels[rows], first_id, z.shape[1])
        of_label, of_all = (1.0, 1.0) if token_weights is None else token_weights[:, rows]
        picked = torch.where(here, (1.0 - smoothing) * of_label * z.gather(1, col[:, None])[:, 0], 0.0)
        if smoothing:
            picked = picked + smoothing / n_vocab * (z.sum(1) if weight is None else (z * weight).sum(1))
        # finite where a whole slab is -inf, since -inf - -inf is not a number
        peak = z.amax(1).clamp_min(torch.finfo(z.dtype).min)
        if right is not None:
            is_right = (here & (z.argmax(1) == col)).to(right.dtype)
            right[rows] = is_right if is_first else torch.where(peak > lse[0, rows], is_right, right[rows])
        if not is_first:
            picked, peak = picked + loss[rows], torch.maximum(peak, lse[0, rows])
        below = peak[:, None] - z
        e = (-below).exp_()
        total = e.sum(1)
        if entropy is not None:
            below_sum = e.mul_(below.clamp_max_(torch.finfo(z.dtype).max)).sum(1)
        if not is_first:
            before, shrunk = lse[1, rows].exp(), (lse[0, rows] - peak).exp()
            total += before * shrunk
            if entropy is not None:
                below_sum += (entropy[rows] + before * (peak - lse[0, rows])) * shrunk
        rest = total.log()
        whole = peak + rest
        ignored = labels[rows] == options.ignore_index
        lse[0, rows], lse[1, rows] = peak.masked_fill(ignored, 0.0), rest.masked_fill(ignored, 0.0)
        if entropy is not None:
            entropy[rows] = (rest + below_sum / total if is_last else below_sum).masked_fill(ignored, 0.0)
        done = picked
        if is_last:
            done = (of_all * peak - picked) + of_all * rest + options.z_loss * of_label * whole * whole
        loss[rows] = done.masked_fill(ignored, 0.0)
        if right is not None:
            right[rows] = right[rows].masked_fill(ignored, 0.0)


def cross_entropy_bwd_torch(
    dloss: Tensor,
    logits: Tensor,
    labels: Tensor,
    lse: Tensor,
    dlogits: Tensor,
    options: LossOptions,
    *,
    n_vocab: int,
    first_id: int = 0,
    weight: Tensor | None = None,
    token_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    dentropy: Tensor | None = None,
    count: Tensor | None = None,
) -> None:
    """cross_entropy_bwd without kernels."""
    smoothing = options.label_smoothing
    if count is not None:
        dloss = dloss / count
    dloss = dloss.expand(logits.shape[0])
    for rows in row_blocks(logits):
        z, slope = capped_torch(logits[rows].to(lse.dtype), options)
        col, here = columns(labels[rows], first_id, z.shape[1])
        peak, rest = lse[:, rows, None]
        log_p = (z - peak).sub_(rest)
        dz = log_p.exp()
        if dentropy is not None:
            log_p.clamp_min_(torch.finfo(z.dtype).min).add_(entropy[rows, None]).mul_(dz).mul_(-dentropy[rows, None])
        of_label, of_all = (1.0, 1.0) if token_weights is None else token_weights[:, rows, None]
        of_lse = dz * (2.0 * options.z_loss * of_label * (peak + rest)) if options.z_loss else 0.0
        # p - wanted first: what is left of it may be small
        wanted = torch.full_like(dz, smoothing / n_vocab)
        wanted.scatter_add_(1, col[:, None], torch.where(here, 1.0 - smoothing, 0.0).to(dz.dtype)[:, None])
        if weight is not None:
            wanted.mul_(weight)
            dz.mul_(of_all)
        dz.sub_(wanted).add_(of_lse)
        dz.mul_(dloss[rows, None])
        if dentropy is not None:
            dz.add_(log_p)
        dz.mul_(slope)
        dlogits[rows] = dz.masked_fill_((labels[rows] == options.ignore_index)[:, None], 0.0).to(dlogits.dtype)


def row_blocks(logits: Tensor) -> list[slice]:
    """Rows in parts of about a million logits: the wide copies of one part stay in the caches of a CPU."""
    step = max(1, 2**20 // logits.shape[1])
    return [slice(start, start + step) for start in range(0, logits.shape[0], step)]


def capped_torch(x: Tensor, options: LossOptions) -> tuple[Tensor, Tensor | float]:
    z = x * options.logit_scale
    if options.softcap is None:
        return z, options.logit_scale
    t = torch.tanh(z / options.softcap)
    return options.softcap * t, options.logit_scale * (1.0 - t * t)


def columns(labels: Tensor, first_id: int, n_cols: int) -> tuple[Tensor, Tensor]:
    """Each label's column, and whether this slab has it; an index that is safe to read in any case."""
    col = labels.long() - first_id
    return col.clamp(0, n_cols - 1), (col >= 0) & (col < n_cols)
