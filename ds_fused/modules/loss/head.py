"""The lm head whose call is postponed until the loss is known, and the losses that make up for it (scope.py: when).

    forward of the model, labels given        Scope: the head is armed
        logits = lm_head(hidden)              Head.__call__: DeferredLogits; no hook fires, nothing is computed
        loss = loss_function(logits, labels)  CausalLMLoss: lm_head's own nn.Module.__call__ runs linear_cross_entropy
        loss = cross_entropy(logits, labels)  or PyTorch's, wherever the forward calls it: Head.cross_entropy, the same
    end of the forward                        Scope: what no loss consumed is computed, the rest leaves on demand

The loss runs inside the head's own call, so whatever acts on layers through hooks acts on it as on any other layer:
ZeRO-3 gathers the head's weight there and releases it after. Where the weight comes in slabs of its own instead, or its
rows stay on their ranks, there is nothing for hooks to do and the loss is computed past them. Outside such a forward
the head is an ordinary Linear.

torch.compile traces all of this, and the loss is part of its graph, unless the head has hooks: those act between two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.counted import counted_as
from ds_fused.modules.loss.deferred import DeferredLogits, materialised
from ds_fused.modules.loss.handed_over import check_reader
from ds_fused.modules.loss.head_call import HeadCall, unwritten
from ds_fused.modules.loss.on_demand import on_demand, sealed
from ds_fused.modules.loss.scope import Scope, has_hooks, in_backward, is_head_observed
from ds_fused.modules.loss.steps import Step, replay
from ds_fused.ops import cross_entropy, linear_cross_entropy
from ds_fused.ops.common._say import say_once
from ds_fused.ops.common._triton import is_fake, is_transformed
from ds_fused.ops.vocab.slabs import WeightSlabs
from ds_fused.ops.vocab.vocab_shard import VocabShard


@dataclasses.dataclass(frozen=True)
class LossArguments:
    """What the head needs besides its input to return the loss instead of logits."""

    labels: Tensor  # [M], shifted
    reduction: str
    ignore_index: int
    logit_scale: float
    softcap: float | None
    options: Mapping[str, Any]  # of linear_cross_entropy, as the JSON gives them
    rows: tuple[Step, ...] = ()  # the input's tokens that have labels
    bias: Tensor | None = None  # [V], beside the head's
    class_weight: Tensor | None = None  # [V]
    label_smoothing: float = 0.0


class Head:
    """Mix-in for an ``nn.Linear`` that is a model's head."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    _ds_fused_scope: Scope

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # a postponed call must fire no hook; the call that computes is nn.Module's own
        is_plain = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if self._ds_fused_scope.armed() and is_plain and not is_head_observed(self):
            return DeferredLogits(HeadCall(self, args[0]))
        trains = torch.is_grad_enabled() and not torch.compiler.is_compiling() and not is_transformed()
        is_sharded = trains and self._ds_fused_scope.weight.is_sharded(self)
        # what a checkpoint repeats was spoken of in the forward
        if is_sharded and not in_backward():
            say_once(
                "ds_fused: the forward was given no labels, so the head computes real logits and its weight is "
                "gathered whole. Give it labels (with shift_labels, where a sequence is split over ranks) and take its "
                "loss, and the weight stays sharded"
            )
        y = nn.Module.__call__(self, *args, **kwargs)
        if trains and not is_sharded and self._ds_fused_scope.is_plain() and isinstance(y, Tensor) and y.requires_grad:
            # whether somebody trains on them is known in the backward
            y.register_hook(_say_computed)
        return y

    def _logits(self, input: Tensor, weight: Tensor | None) -> Tensor:
        """On demand; None: the weight is not here whole."""
        call, scope = HeadCall(self, input), self._ds_fused_scope
        if weight is None:
            return sealed(call, scope.weight.whole, scope.weight.shard)
        return on_demand(call, scope.weight.whole, weight, self.bias)

    def forward(
        self,
        input: Tensor,
        loss: LossArguments | None = None,
        slabs: WeightSlabs | VocabShard | None = None,
        later: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """With ``loss``: its value, and the logits on demand (None in a compiled graph); with ``later`` those alone.

        ``slabs``: the weight, where it is not here whole.
        """
        scope = self._ds_fused_scope
        if loss is None and not later:
            return super().forward(input)
        is_sharded = scope.weight.is_sharded(self) if later else slabs is not None
        # once, since a parametrization computes it anew each time
        weight = None if is_sharded else self.weight
        if later:
            return self._logits(input, weight)
        logits = None
        if not torch.compiler.is_compiling():
            # beside the loss, so that hooks which act on a layer's outputs (ZeRO-3's) see a gradient to the logits too
            logits = self._logits(input, weight)
        hidden, labels = replay(input, loss.rows).reshape(-1, input.shape[-1]), loss.labels
        # sharded, how many tokens a rank has is agreed on already; a compiled graph has room for a fixed number of
        # them, and of fake ones nobody knows how many have labels
        may_choose = scope.masked and slabs is None and loss.reduction != "none"
        if may_choose and not torch.compiler.is_compiling() and not is_fake(labels):
            hidden, labels = _labelled(hidden, labels, loss.ignore_index)
        bias = self.bias if slabs is None else scope.weight.bias(self)
        if loss.bias is not None:
            bias = loss.bias if bias is None else bias + loss.bias
        # what is kept for backward would be the compiler's choice
        options = {**loss.options, "grad_in_forward": True} if torch.compiler.is_compiling() else loss.options
        rows = weight if slabs is None else slabs
        with counted_as(hidden.numel() * rows.shape[0]):
            value = linear_cross_entropy(
                hidden,
                rows,
                labels,
                bias=bias,
                class_weight=loss.class_weight,
                ignore_index=loss.ignore_index,
                reduction=loss.reduction,
                label_smoothing=loss.label_smoothing,
                softcap=loss.softcap,
                logit_scale=loss.logit_scale,
                **options,
            )
        return value, logits

    def cross_entropy(
        self,
        logits: DeferredLogits,
        target: Any,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor | None:
        """``torch.nn.functional.cross_entropy`` of this head's logits, or ``nll_loss`` of their log_softmax.

        None where the real ones have to go there.
        """
        is_labels = isinstance(target, Tensor) and target.dtype == torch.int64 and target.shape == logits.shape[:-1]
        if not is_labels or logits.ndim != 2 or size_average is not None or reduce is not None:
            return None
        if weight is not None and weight.requires_grad:
            return None
        device = logits.device.type
        # autocast computes cross_entropy in fp32
        dtype = torch.float32 if torch.is_autocast_enabled(device) else logits.dtype
        loss = linear_loss(
            logits,
            target,
            reduction=reduction,
            ignore_index=ignore_index,
            class_weight=weight,
            label_smoothing=label_smoothing,
        )
        return None if loss is None else loss.to(dtype)


def _say_computed(_: Tensor) -> None:
    say_once(
        "ds_fused: a loss of logits was trained on, of a forward that was given no labels: the head computed them, and "
        "their loss is not fused. Give the forward labels and take its own loss; what HuggingFace's Trainer smooths, "
        "ds_fused.fuse_label_smoother(trainer) fuses"
    )


def _labelled(hidden: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The tokens that have a label, where a masked language model gives one to every seventh."""
    kept = (labels != ignore_index).nonzero().squeeze(-1)
    # a mean over none is the op's matter
    return (hidden[kept], labels[kept]) if len(kept) else (hidden, labels)


def linear_loss(logits: DeferredLogits, labels: Tensor, **arguments: Any) -> Tensor | None:
    """linear_cross_entropy of the head's input, in the head's own call; None where it can't be.

    ``labels``: [M], of the deferred logits' tokens. ``arguments``: of ``LossArguments``.
    """
    head, scope, shape = logits.head, logits.head._ds_fused_scope, logits.scale_and_softcap()
    # logits that the model computed meanwhile may have been written to, and cost their memory already
    if scope.linear is None or scope.stock() or shape is None or logits.is_real() or is_transformed():
        return None
    check_reader(logits)
    scale, softcap = shape
    loss = LossArguments(
        labels,
        logit_scale=scale,
        softcap=softcap,
        options=scope.linear,
        rows=logits.rows,
        bias=logits.bias,
        **arguments,
    )
    call, with_graph = logits.call, logits.with_graph and torch.is_grad_enabled()
    compute = _computed_between if torch.compiler.is_compiling() and has_hooks(head) else _computed
    value, on_demand = compute(call, loss, with_graph)
    # a metric's has no graph, which those that leave the forward have
    if with_graph == call.with_graph:
        call.on_demand = on_demand
        call.fused = scope.fused = True
    return value


def _computed(call: HeadCall, loss: LossArguments, with_graph: bool) -> tuple[Tensor, Tensor | None]:
    head, scope, hidden = call.head, call.head._ds_fused_scope, unwritten(call.hidden, call.version)
    with call.as_called(with_graph):
        slabs = scope.weight.slabs(head, loss.labels.numel(), scope.is_running())
        if slabs is None:
            # the head's own call, past the one that postpones
            return nn.Module.__call__(head, hidden, loss=loss)
        # past the hooks, too: ZeRO-3's would gather the weight
        return head.forward(hidden, loss, slabs)


_computed_between = torch.compiler.disable(
    _computed, reason="the lm head has hooks, which act on its calls, so its loss is computed between two graphs"
)


class CausalLMLoss:
    """Stands where a model's ``ForCausalLMLoss`` stood: the same arguments, the same value, by the fused ops.

    Logits that are still deferred go to linear_cross_entropy.
    ``real``: whether cross_entropy takes real ones.
    Whatever neither takes goes to ``original``.
    """

    def __init__(self, original: Callable[..., Tensor], scope: Scope) -> None:
        self.original = original
        self.scope = scope
        self.real = False

    def __call__(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        fused = self._fused(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)
        if fused is not None:
            return fused
        return self.original(
            materialised(logits),
            labels,
            vocab_size,
            num_items_in_batch=num_items_in_batch,
            ignore_index=ignore_index,
            shift_labels=shift_labels,
            **kwargs,
        )

    def _fused(
        self,
        logits: Any,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None,
        ignore_index: int,
        shift_labels: Tensor | None,
    ) -> Tensor | None:
        """The loss, or None where the original has to say it (or to say what is wrong with the arguments)."""
        if self.scope.stock() or not isinstance(logits, (DeferredLogits, Tensor)) or logits.shape[-1] != vocab_size:
            return None
        if shift_labels is None:
            if labels is None:
                return None
            # token n predicts n + 1; the last one predicts nothing
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if shift_labels.numel() * vocab_size != logits.numel() or shift_labels.dtype != torch.int64:
            return None
        shift_labels = shift_labels.reshape(-1).to(logits.device)
        reduction = "mean" if num_items_in_batch is None else "sum"

        loss = None
        if isinstance(logits, DeferredLogits):
            loss = linear_loss(logits, shift_labels, reduction=reduction, ignore_index=ignore_index)
        if loss is None:
            # torch.func's transforms pass PyTorch's own operations only
            if not self.real or is_transformed():
                return None
            logits = materialised(logits)
            loss = cross_entropy(
                logits.reshape(-1, vocab_size), shift_labels, ignore_index=ignore_index, reduction=reduction
            )

        # as stock, whose logits become fp32 before the loss
        loss = loss.float()
        if num_items_in_batch is None:
            return loss
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss / num_items_in_batch
