"""Cross entropy of materialised logits.

Per token, with ``z = softcap * tanh(logit_scale * logits / softcap)`` (or ``logit_scale * logits``):

    lse  = logsumexp(z)
    loss = lse - (1 - label_smoothing) * z[label] - label_smoothing * mean(z) + z_loss * lse**2
    dz   = dloss * (softmax(z) * (1 + 2 * z_loss * lse) - (1 - label_smoothing) * onehot - label_smoothing / V)

With class weights w [V] each term of a class is multiplied by its weight, and z_loss by that of the label:

    loss = sum(t * w * (lse - z)) + z_loss * w[label] * lse**2, t = (1 - label_smoothing) * onehot + label_smoothing / V

and a mean divides by the sum of w[label]. Without smoothing that is w[label] times the loss above, so the kernels see
weights only where both are given.

Ignored tokens: loss and gradient are exactly zero and their logits are never read.

Saved for backward: the logits (no copy of them) and lse, 8 bytes a token.
Traffic per logit: forward 1 read; backward 1 read + 1 write, over the logits themselves with ``overwrite_logits``.
With ``grad_in_forward`` all of it is the forward's, 1 read + 1 write (_lent_logits.py).

The kernels are in _cross_entropy_kernels.py: two_pass.py and its like have them too.

Sizes: N tokens (every leading dimension, flattened), V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_fused.ops.common._once import once_differentiable
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._triton import check_dtypes, lie_apart, like, rows_of, runs_kernels
from ds_fused.ops.losses._cross_entropy_kernels import cross_entropy_bwd, cross_entropy_fwd
from ds_fused.ops.losses._labels import counting_tokens, flat_labels, reduced_losses, refuse_illegal
from ds_fused.ops.losses._lent_logits import LentLogitsFunction
from ds_fused.ops.losses._loss import (
    LossOptions,
    check_loss,
    check_weight,
    dloss_of_tokens,
    outputs,
    reduced,
    total_weight,
    weighted,
    weights_of_tokens,
)


def cross_entropy_reference(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...]
    *,
    weight: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_z_loss: bool = False,
    return_accuracy: bool = False,
    # permissions that plain PyTorch makes no use of, and a hint
    overwrite_logits: bool = False,
    grad_in_forward: bool = False,
    upstream: float = 1.0,
) -> Tensor | tuple[Tensor, ...]:
    """What this file computes, in PyTorch: the specification, the CPU path and the yardstick of the tests."""
    z = logits.reshape(-1, logits.shape[-1]).to(torch.promote_types(logits.dtype, torch.float32))
    flat = labels.reshape(-1).long()
    if logit_scale != 1.0:
        z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    weight = None if weight is None else weight.to(z.dtype)
    loss = F.cross_entropy(
        z, flat, weight, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    counts = flat != ignore_index
    of_token = None if weight is None else torch.where(counts, weight[torch.where(counts, flat, 0)], 0.0)
    z_losses = None
    if z_loss or return_z_loss:
        z_losses = z_loss * torch.where(counts, torch.logsumexp(z, -1) ** 2, 0.0)
        loss = loss + (z_losses if of_token is None else of_token * z_losses)
    right = (counts & (z.argmax(-1) == flat)).to(z.dtype) if return_accuracy else None
    return outputs(loss, z_losses if return_z_loss else None, right, of_token, counts.sum(), labels.shape, reduction)


class CrossEntropyFunction(torch.autograd.Function):
    """Logits [N, V] and labels [N] to the mean or the sum of the losses, fp32 [], or to one a token [N].

    ``total``: what a mean divides by; None where the labels are still to be looked at, beside the reduction.
    ``of_token`` [N], ``weight``, ``token_weights``: see weights_of_tokens. ``more``: lse [2, N] and right [N] as well,
    and if there was none the total.
    """

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        labels: Tensor,
        options: LossOptions,
        reduction: str,
        overwrite: bool,
        total: Tensor | None,
        of_token: Tensor | None,
        weight: Tensor | None,
        token_weights: Tensor | None,
        more: bool,
    ) -> Tensor | tuple[Tensor, ...]:
        n, n_vocab = logits.shape
        loss = torch.empty(n, dtype=torch.float32, device=logits.device)
        lse = torch.empty(2, n, dtype=torch.float32, device=logits.device)
        right = torch.empty_like(loss) if more else None
        weights = {"weight": weight, "token_weights": token_weights}
        cross_entropy_fwd(logits, labels, loss, lse, options, n_vocab=n_vocab, right=right, **weights)
        ctx.at_once = reduction != "none" and total is None
        if ctx.at_once:
            loss, total, are_legal = reduced_losses(loss, labels, n_vocab, options.ignore_index, reduction)
            refuse_illegal("cross_entropy", labels, are_legal, n_vocab, options.ignore_index)
        else:
            loss = weighted(loss, of_token, (weight, token_weights))
            if reduction != "none":
                # here, where autograd makes no nodes of it
                loss = reduced(loss, loss.shape, total, reduction)
        ctx.save_for_backward(logits, labels, lse, total, of_token, weight, token_weights)
        ctx.options, ctx.reduction, ctx.overwrite, ctx.overwritten = options, reduction, overwrite, False
        if not more:
            return loss
        others = (lse, right, total) if ctx.at_once else (lse, right)
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.overwritten:
            raise RuntimeError(
                "cross_entropy: a second backward, but the first wrote the gradient over the logits; "
                "pass grad_in_forward=False and overwrite_logits=False to keep them"
            )
        logits, labels, lse, total, of_token, weight, token_weights = ctx.saved_tensors
        if ctx.overwrite:
            dlogits = logits.detach()
            # a trace writes nothing, and dynamo may need two
            ctx.overwritten = not torch.compiler.is_compiling()
            # whoever else saved these logits gets autograd's error instead of a wrong gradient
            torch.autograd.graph.increment_version(logits)
        else:
            dlogits = like(logits)
        n, n_vocab = logits.shape
        if ctx.at_once:
            how = {"count": total if ctx.reduction == "mean" else None}
        else:
            how = {"weight": weight, "token_weights": token_weights}
            dloss = dloss_of_tokens(dloss, n, total, of_token, (weight, token_weights), ctx.reduction)
        cross_entropy_bwd(dloss, logits, labels, lse, dlogits, ctx.options, n_vocab=n_vocab, **how)
        return dlogits, *[None] * 9


def cross_entropy(
    logits: Tensor,  # [..., V]
    labels: Tensor,  # [...] int64 or int32
    *,
    weight: Tensor | None = None,  # [V]
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_z_loss: bool = False,
    return_accuracy: bool = False,
    overwrite_logits: bool = False,
    grad_in_forward: bool = False,
    upstream: float = 1.0,
) -> Tensor | tuple[Tensor, ...]:
    """``F.cross_entropy(softcap * tanh(scaled / softcap), labels, weight) + z_loss * logsumexp(...) ** 2``, in fp32, of
    ``scaled = logit_scale * logits``.

    ``return_z_loss``: a tuple, its second the part of the loss that is z_loss's, reduced alike. ``return_accuracy``: a
    tuple, its last the share of the counting tokens whose label is the argmax (of equal logits the first). Neither has
    a gradient, and the host waits for neither.

    ``overwrite_logits``: the backward may write the gradient over the logits. Only for logits whose producer keeps
    nothing of them (a matrix product's output, no leaf); a second backward through them then raises. Rows that share
    memory, as those of an expanded tensor do, are left as they are.

    ``grad_in_forward``: the forward itself may, which saves a read of them; whoever reads them after it finds the
    gradient. Not for reduction "none", for fp16 and under torch.compile, where the backward overwrites them.
    ``upstream``: the gradient of the loss that the forward takes for granted, for instance 1 / steps of gradient
    accumulation. A backward that is given another one scales what is there, in one more pass over it.
    """
    check_numbers("cross_entropy", upstream=upstream)
    # in fp32 it is divided by
    if not 2.0**-100 <= abs(upstream) <= 2.0**100:
        raise ValueError(f"cross_entropy: upstream is {upstream}; it must be a number, from 2^-100 to 2^100 in size")
    if logits.ndim == 0:
        raise ValueError("cross_entropy: logits must be [..., vocabulary], got a scalar")
    options = LossOptions(ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    *shape, n_vocab = logits.shape
    check_loss("cross_entropy", options, labels, reduction, tuple(shape), n_vocab, logits.device)
    check_weight("cross_entropy", "weight", weight, n_vocab, logits.device)
    flat = flat_labels(labels)
    if not runs_kernels(logits):
        counting_tokens("cross_entropy", flat, n_vocab, ignore_index)
        return cross_entropy_reference(
            logits, labels, weight=weight, ignore_index=ignore_index, reduction=reduction,
            label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale,
            return_z_loss=return_z_loss, return_accuracy=return_accuracy,
        )  # fmt: skip
    check_dtypes("cross_entropy", logits=logits)
    rows = rows_of(logits)
    more = return_z_loss or return_accuracy
    compiling = torch.compiler.is_compiling()
    is_lent = grad_in_forward and reduction != "none" and _may_be_lent(rows)
    overwrite = (overwrite_logits or grad_in_forward) and (compiling or lie_apart(rows))
    of_token, in_kernel, count, total = None, (None, None), None, None
    # else the reduction's launch looks at the labels
    if is_lent or compiling or weight is not None or reduction == "none":
        count = counting_tokens("cross_entropy", flat, n_vocab, ignore_index)
        of_token, in_kernel = weights_of_tokens(weight, flat, options, torch.float32)
        total = total_weight(of_token, count) if reduction == "mean" else count
    if is_lent:
        results = LentLogitsFunction.apply(rows, flat, options, reduction, upstream, total, of_token, in_kernel, more)
    else:
        results = CrossEntropyFunction.apply(
            rows, flat, options, reduction, overwrite, total, of_token, *in_kernel, more
        )
    if not more and reduction != "none":
        return results
    loss, lse, right, *found = results if more else (results, None, None)
    (count,) = found or (count,)
    z_losses = z_loss * lse.sum(0) ** 2 if return_z_loss else None
    return outputs(loss, z_losses, right if return_accuracy else None, of_token, count, labels.shape, reduction)


def _may_be_lent(logits: Tensor) -> bool:
    """Whether a gradient of logits [N, V] is wanted, and may stand there before its upstream gradient is known."""
    # what a loss scale would keep above fp16's least number is rounded away before the scale is known; a trace would
    # write the gradient elsewhere and copy it
    is_eager = not torch.compiler.is_compiling()
    trains = torch.is_grad_enabled() and logits.requires_grad
    return is_eager and trains and logits.dtype != torch.float16 and lie_apart(logits)
