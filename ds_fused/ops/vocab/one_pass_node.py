"""one_pass.py as one node of a graph of torch.compile, which computes it as a call without a compiler does.

Traced, the loop over chunks would be unrolled for one number of tokens, and what of it is kept for backward would be
the compiler's choice. As a node its launches and its memory are those of an eager call, and a batch of another length
needs no other graph. Where nothing trains, the loss alone is computed.

Saved for backward: those of dx, dw and dbias that are wanted.

Sizes: M tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_fused.ops.common._tiles import wide
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.losses._scale import scaled_torch
from ds_fused.ops.vocab.one_pass import CrossEntropyRows, cut, one_pass


@torch.library.custom_op("ds_fused::one_pass", mutates_args=())
def _node(
    x: Tensor,  # [M, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    wants: list[bool],  # which of their gradients
    labels: Tensor,  # [M]
    count: Tensor,  # of the labels that count
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    logit_scale: float,
    reduction: str,
    chunk_bytes: int,
    accumulate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss [], and dx, dw and dbias for an upstream gradient of 1; empty where they aren't wanted."""
    losses = CrossEntropyRows(labels, LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale))
    how = cut(x.shape[0], *weight.shape, x.element_size(), chunk_bytes, accumulate, trains=wants[1])
    loss, grads = one_pass(x, weight, bias, losses, count, reduction, *how, wants)
    return loss, *(x.new_empty(0) if grad is None else grad for grad in grads)


@_node.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, wants: list[bool], *more: Any) -> tuple[Tensor, ...]:
    given = zip((x, weight, bias), wants, strict=True)
    grads = (torch.empty_like(t, memory_format=torch.contiguous_format) if w else x.new_empty(0) for t, w in given)
    return x.new_empty((), dtype=wide(x)), *grads


def _save(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.wants, ctx.n_inputs = inputs[3], len(inputs)
    ctx.save_for_backward(*output[1:])
    # none comes to the gradients, which nobody else has
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss: Tensor, *none: None) -> tuple[Tensor | None, ...]:
    made = zip(ctx.saved_tensors, ctx.wants, strict=True)
    grads = [scaled_torch(grad, dloss) if wanted else None for grad, wanted in made]
    return *grads, *[None] * (ctx.n_inputs - len(grads))


_node.register_autograd(_backward, setup_context=_save)


def one_pass_node(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    count: Tensor,
    options: LossOptions,
    reduction: str,
    chunk_bytes: int,
    accumulate: str,
) -> Tensor:
    """The mean or the sum of the losses, fp32 []. To be traced."""
    wants = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (x, weight, bias)]
    loss, *_ = _node(
        x, weight, bias, wants, labels, count, options.ignore_index, options.label_smoothing, options.z_loss,
        options.softcap, options.logit_scale, reduction, chunk_bytes, accumulate,
    )  # fmt: skip
    return loss
