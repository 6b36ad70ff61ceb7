"""Head and loss in one: ``cross_entropy(logit_scale * F.linear(x, weight, bias), labels)`` without the whole logits.

The logits exist as tiles: a *chunk* of tokens times a *slab* of vocabulary rows. Which way leads through them is chosen
here: gradients in the forward (one_pass.py) or in the backward (two_pass.py), a head that is not trained
(frozen_head.py), or one whose rows stay on their ranks (stationary.py).

Sizes: M tokens (every leading dimension of x, flattened), H hidden, V vocabulary, n rows of a slab.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.common._tiles import (
    check_accumulate,
    check_memory,
    tiling,
    wide,
)
from ds_fused.ops.common._triton import (
    autocast_dtype,
    check_dtypes,
    check_here,
    refuse_transforms,
    rows_of,
    runs_kernels,
)
from ds_fused.ops.losses._labels import counting_tokens, flat_labels
from ds_fused.ops.losses._loss import (
    LossOptions,
    check_loss,
    check_weight,
    outputs,
    weighted,
    weights_of_tokens,
)
from ds_fused.ops.losses.cross_entropy import cross_entropy_reference
from ds_fused.ops.vocab import frozen_head
from ds_fused.ops.vocab._slab import labels_in_order
from ds_fused.ops.vocab.frozen_head import FrozenHeadFunction
from ds_fused.ops.vocab.one_pass import CrossEntropyRows, OnePassFunction, cut
from ds_fused.ops.vocab.one_pass_node import one_pass_node
from ds_fused.ops.vocab.slabs import WeightSlabs, WholeWeight, in_order
from ds_fused.ops.vocab.stationary import StationaryFunction
from ds_fused.ops.vocab.two_pass import TwoPassFunction
from ds_fused.ops.vocab.vocab_shard import VocabShard


def linear_cross_entropy_reference(
    x: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    labels: Tensor,  # [...]
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_z_loss: bool = False,
    return_accuracy: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """What this file computes, in PyTorch and with all logits at once: the specification and the tests' yardstick."""
    return cross_entropy_reference(
        F.linear(x, weight, bias),
        labels,
        weight=class_weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        return_z_loss=return_z_loss,
        return_accuracy=return_accuracy,
    )


def linear_cross_entropy(
    x: Tensor,  # [..., H]
    weight: Tensor | WeightSlabs | VocabShard,  # [V, H]
    labels: Tensor,  # [...] int64 or int32
    *,
    bias: Tensor | None = None,  # [V]
    class_weight: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_z_loss: bool = False,
    return_accuracy: bool = False,
    chunk_mb: int = 512,
    # all logits of 8192 tokens at a vocabulary of 128256: 37 ms on H100; with 1024, at a peak 364 MiB lower, 43
    # (benchmarks/results/h100/ops.csv)
    keep_mb: int = 2048,
    # 4 % more time and 1503 MiB less than with all logits kept (benchmarks/results/h100/quick/ops.csv)
    grad_in_forward: bool = True,
    accumulate: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """``cross_entropy(logit_scale * F.linear(x, weight, bias), labels, ...)``; the logits never exist as a whole.

    ``class_weight`` is what ``weight`` is there, and what is returned is the same. Of equal logits the first is the
    argmax; where slabs bring rows out of order, the first that came.

    ``chunk_mb``: MiB of logits that are worked on at a time. ``keep_mb``: MiB of logits kept for backward; the rest is
    computed again. Logits that fit it whole are not cut. Kept logits make way for their gradient, so a second
    backward raises unless ``grad_in_forward=False, keep_mb=0``.

    ``grad_in_forward``: where the weight is whole, the loss alone a mean or a sum, without class weights, and x not in
    fp16, gradients are made in the forward, chunk after chunk: each logit is computed once and none is kept, whatever
    ``keep_mb`` says. The result is the same (one_pass.py). In a graph of torch.compile all of this is one node.

    ``accumulate``: what dweight is added up in where the tokens are cut into n chunks. ``"fp32"``: fp32, rounded once.
    ``"native"``: its own dtype, which spares the fp32 copy (of a slab, where the weight comes in slabs) and is about
    sqrt(n / 2) times as far off as one product. ``"auto"``: fp32, but with ``grad_in_forward`` native up to n = 8, and
    n = 8 rather than more where larger chunks take less memory than the fp32 copy. Of a weight that stays on its ranks
    (stationary) it is always fp32.
    """
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    more = return_z_loss or return_accuracy
    found = token_losses(
        "linear_cross_entropy", x, weight, labels, bias, options, reduction, chunk_mb=chunk_mb, keep_mb=keep_mb,
        class_weight=class_weight, more=more, accumulate=accumulate,
        in_forward=grad_in_forward and reduction != "none" and class_weight is None and not more,
    )  # fmt: skip
    z_losses = z_loss * found.lse.sum(0) ** 2 if return_z_loss else None
    return outputs(
        weighted(found.loss, found.of_token, found.in_kernel), z_losses, found.right if return_accuracy else None,
        found.of_token, found.count, labels.shape, reduction,
    )  # fmt: skip


class TokenLosses(NamedTuple):
    """What `token_losses` finds; None is what it was not asked for."""

    loss: Tensor  # [M]; [] where it is reduced
    count: Tensor  # of the tokens that count
    lse: Tensor | None = None  # [2, M]
    right: Tensor | None = None  # [M]
    entropy: Tensor | None = None  # [M]
    # see weights_of_tokens
    of_token: Tensor | None = None
    in_kernel: tuple[Tensor | None, Tensor | None] = (None, None)


def token_losses(
    op: str,  # who speaks in an error
    x: Tensor,
    weight: Tensor | WeightSlabs | VocabShard,
    labels: Tensor,
    bias: Tensor | None,
    options: LossOptions,
    reduction: str,  # what the caller will do with the losses
    *,
    chunk_mb: int,
    keep_mb: int,
    class_weight: Tensor | None = None,
    more: bool = False,  # lse and right
    entropy: bool = False,  # not beside `more`
    in_forward: bool = False,  # gradients made there, with the reduction, where that can be
    accumulate: str = "auto",
) -> TokenLosses:
    """What each token loses, and what else is asked for."""
    refuse_transforms(op)
    n_vocab = _checked_vocabulary(op, x, weight, bias)
    check_loss(op, options, labels, reduction, x.shape[:-1], n_vocab, x.device)
    check_weight(op, "class_weight", class_weight, n_vocab, x.device)
    check_memory(op, chunk_mb, keep_mb)
    check_accumulate(op, accumulate)
    autocast = autocast_dtype(x)
    slabs = None if isinstance(weight, (Tensor, VocabShard)) else weight
    for name, dtype in (("weight", weight.dtype), ("bias", bias.dtype if bias is not None else x.dtype)):
        if autocast is None and dtype != x.dtype:
            raise ValueError(f"{op}: x is {x.dtype} and {name} is {dtype}; outside autocast they must be the same")
    if runs_kernels(x):
        check_dtypes(op, x=x, weight=torch.empty(0, dtype=weight.dtype))

    if slabs is not None:
        # under way while the labels are looked at
        slabs.prefetch(0)
    # casts of x are autograd's; the weight is cast slab by slab inside, since a cast copy would live until backward
    rows = rows_of(x.to(autocast or x.dtype))
    handle = weight if isinstance(weight, Tensor) else x.new_empty(0, requires_grad=weight.requires_grad)
    training = torch.is_grad_enabled()
    trains = training and any(t is not None and t.requires_grad for t in (x, handle, bias))
    flat = flat_labels(labels)
    count = counting_tokens(op, flat, n_vocab, options.ignore_index)
    of_token, in_kernel = weights_of_tokens(class_weight, flat, options, wide(rows))
    chunk_bytes = int(chunk_mb * 2**20)
    is_whole = slabs is None and not isinstance(weight, VocabShard)
    if in_forward and is_whole and not (trains and rows.dtype == torch.float16):
        if torch.compiler.is_compiling():
            loss = one_pass_node(rows, weight, bias, flat, count, options, reduction, chunk_bytes, accumulate)
            return TokenLosses(loss, count)
        if trains:
            sizes = (*rows.shape[:1], *weight.shape, rows.element_size())
            how = cut(*sizes, chunk_bytes, accumulate, trains=handle.requires_grad)
            losses = CrossEntropyRows(flat, options)
            loss = OnePassFunction.apply(rows, weight, bias, losses, count, op, reduction, *how)
            return TokenLosses(loss, count)
    trains_x_alone = trains and not handle.requires_grad and (bias is None or not bias.requires_grad)
    in_one_go = trains_x_alone and not entropy and in_kernel[0] is None and frozen_head.takes(options)
    if isinstance(weight, VocabShard):
        # class weights make a mean's divisor another than the count
        may_guess = trains and weight.guesses and reduction != "none" and of_token is None and not entropy
        guess = reduction if may_guess else None
        results = StationaryFunction.apply(
            rows, handle, bias, flat, weight, options, chunk_bytes, *in_kernel, guess, more, entropy
        )
    else:
        keeps = trains and not in_one_go
        tiles = tiling(
            rows.shape[0], n_vocab, rows.element_size(), chunk_bytes, int(keep_mb * 2**20) if keeps else 0,
            dx=training and x.requires_grad, dweight=training and handle.requires_grad,
            casts=weight.dtype != rows.dtype,
            slab_rows=slabs.slab_rows if slabs is not None else None,
            n_slabs=len(slabs) if slabs is not None else None,
            keeps_slabs=keeps and slabs is not None,
        )  # fmt: skip
        if slabs is not None:
            flat, options = labels_in_order(flat, options, slabs)
            bias, in_kernel = in_order(bias, slabs), (in_order(in_kernel[0], slabs), in_kernel[1])
        if in_one_go:
            source = WholeWeight(weight, tiles.rows) if slabs is None else slabs
            results = FrozenHeadFunction.apply(rows, source, bias, flat, tiles, options, more)
        else:
            results = TwoPassFunction.apply(
                rows, handle, bias, flat, slabs, tiles, options, *in_kernel, more, op, entropy, accumulate == "native"
            )
    if entropy:
        loss, entropies = results
        return TokenLosses(loss, count, entropy=entropies)
    loss, lse, right = results if more else (results, None, None)
    return TokenLosses(loss, count, lse, right, of_token=of_token, in_kernel=in_kernel)


def _checked_vocabulary(op: str, x: Tensor, weight: Tensor | WeightSlabs | VocabShard, bias: Tensor | None) -> int:
    """V, once x [..., H], weight [V, H] and bias [V] fit together on one device."""
    check_here(op, "", x, weight, bias)
    if x.ndim == 0 or len(weight.shape) != 2 or weight.shape[1] != x.shape[-1]:
        raise ValueError(f"{op}: x {tuple(x.shape)} and weight {tuple(weight.shape)} must be [..., H] and [V, H]")
    n_vocab = weight.shape[0]
    if bias is not None and bias.shape != (n_vocab,):
        raise ValueError(f"{op}: bias {tuple(bias.shape)} must be one number for each of the {n_vocab} rows of weight")
    for name, device in (("weight", weight.device), ("bias", bias.device if bias is not None else x.device)):
        if device != x.device:
            raise ValueError(f"{op}: {name} is on {device}, x on {x.device}; they must share a device")
    return n_vocab
