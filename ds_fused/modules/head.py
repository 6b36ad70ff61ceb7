"""The lm head whose call is postponed until the loss is known, and the scope in which it may be.

    forward of the model, labels given        Scope: the head is armed
        logits = lm_head(hidden)              Head.__call__: DeferredLogits; no hook fires, nothing is computed
        loss = loss_function(logits, labels)  CausalLMLoss: lm_head's own nn.Module.__call__ runs linear_cross_entropy
        loss = cross_entropy(logits, labels)  or PyTorch's, wherever the forward calls it: Head.cross_entropy, the same
    end of the forward                        Scope: what no loss consumed is computed, the rest leaves on demand

The loss runs inside the head's own call, so whatever acts on layers through hooks acts on it as on any other layer:
ZeRO-3 gathers the head's weight there and releases it after. Where the weight comes in slabs of its own instead, or its
rows stay on their ranks, there is nothing for hooks to do and the loss is computed past them. Outside such a forward
the head is an ordinary Linear.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_fused.modules.deferred import DeferredLogits, HeadCall, Step, materialised, replay
from ds_fused.modules.on_demand import WholeWeight, on_demand, sealed, with_steps
from ds_fused.ops import cross_entropy, linear_cross_entropy
from ds_fused.ops.slabs import WeightSlabs
from ds_fused.ops.stationary import VocabShard

log = logging.getLogger("ds_fused")


@functools.cache
def _say_once(line: str) -> None:
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        log.warning(line)


@dataclasses.dataclass(frozen=True)
class HeadWeight:
    """How the weight of a head is reached where ZeRO-3 has sharded it; as it stands here, where nothing has."""

    # the context of a read after the forward, in which the weight is whole
    whole: WholeWeight = nullcontext
    # for the loss over so many tokens, the weight in slabs of its own or the rows of it that stay here; None where the
    # loss is to be computed in the head's own call
    slabs: Callable[[nn.Module, int], WeightSlabs | VocabShard | None] = lambda head, n_tokens: None
    # whether there are those
    is_sharded: Callable[[nn.Module], bool] = lambda head: False
    # the bias beside them
    bias: Callable[[nn.Module], Tensor | None] = lambda head: head.bias


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
        if self._ds_fused_scope.armed() and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            return DeferredLogits(HeadCall(self, args[0]))
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            self._say_gathered()
        return nn.Module.__call__(self, *args, **kwargs)

    def _say_gathered(self) -> None:
        if self._ds_fused_scope.weight.is_sharded(self):
            _say_once(
                "ds_fused: the forward was given no labels, so the head computes real logits and its weight is "
                "gathered whole. Give it labels (with shift_labels, where a sequence is split over ranks) and take its "
                "loss, and the weight stays sharded"
            )

    def forward(
        self,
        input: Tensor,
        loss: LossArguments | None = None,
        slabs: WeightSlabs | VocabShard | None = None,
        later: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """With ``loss``: its value, and the logits on demand; with ``later`` those alone.

        ``slabs``: the weight, where it is not here whole.
        """
        scope = self._ds_fused_scope
        if later:
            return (sealed if scope.weight.is_sharded(self) else on_demand)(HeadCall(self, input), scope.weight.whole)
        if loss is None:
            return super().forward(input)
        # beside the loss, so that hooks which act on a layer's outputs (ZeRO-3's) see a gradient to the logits too
        logits = (on_demand if slabs is None else sealed)(HeadCall(self, input), scope.weight.whole)
        hidden, labels = replay(input, loss.rows).reshape(-1, input.shape[-1]), loss.labels
        # sharded, how many tokens a rank has is agreed on already
        if scope.masked and slabs is None and loss.reduction != "none":
            hidden, labels = _labelled(hidden, labels, loss.ignore_index)
        bias = self.bias if slabs is None else scope.weight.bias(self)
        if loss.bias is not None:
            bias = loss.bias if bias is None else bias + loss.bias
        value = linear_cross_entropy(
            hidden,
            self.weight if slabs is None else slabs,
            labels,
            bias=bias,
            class_weight=loss.class_weight,
            ignore_index=loss.ignore_index,
            reduction=loss.reduction,
            label_smoothing=loss.label_smoothing,
            softcap=loss.softcap,
            logit_scale=loss.logit_scale,
            **loss.options,
        )
        return value, logits

    @torch.compiler.disable
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
        """``torch.nn.functional.cross_entropy`` of this head's logits; None where the real ones have to go there."""
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
    if scope.linear is None or scope.stock() or shape is None or logits.is_real():
        return None
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
    call = logits.call
    slabs = scope.weight.slabs(head, labels.numel())
    if slabs is None:
        # the head's own call, past the one that postpones
        value, call.on_demand = nn.Module.__call__(head, call.hidden, loss=loss)
    else:
        # past the hooks, too: ZeRO-3's would gather the weight
        value, call.on_demand = head.forward(call.hidden, loss, slabs)
    scope.fused = True
    return value


class Scope:
    """Hooks on the model that owns the head: they arm it for a forward that was given labels, and see that forward out.

    ``labels_at``: position of ``labels`` in the forward's signature.
    ``logits``: "defer" computes logits that leave the forward when they are read, "keep" within the forward.
    ``eval``: "defer" treats the eval mode as training, "stock" leaves it alone.
    ``masked``: of a masked language model most tokens have no label, and only the others reach the head.
    """

    def __init__(
        self,
        labels_at: int | None,
        *,
        logits: str = "defer",
        eval: str = "defer",
        weight: HeadWeight = HeadWeight(),  # noqa: B008 (frozen)
        masked: bool = False,
    ) -> None:
        self.labels_at = labels_at
        self.masked = masked
        # options of linear_cross_entropy; None leaves that op off
        self.linear: Mapping[str, Any] | None = None
        self.logits = logits
        self.eval = eval
        self.weight = weight
        # somebody computes a loss of the logits that leave the forward, which is given no labels (smoother.py)
        self.loss_outside = False
        # those logits
        self.left: DeferredLogits | None = None
        # whether the forward that runs, or ran last, has had its loss fused
        self.fused = False
        # one for each forward that is running, innermost last: a forward may be called within another
        self._modes: list[str] = []
        self._handles: list[Any] = []

    def attach(self, owner: nn.Module) -> None:
        self._handles = [
            owner.register_forward_pre_hook(self.enter, with_kwargs=True),
            # always_call: a forward that raises must disarm the head as well. prepend: other hooks see tensors only
            owner.register_forward_hook(self.leave, with_kwargs=True, always_call=True, prepend=True),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def armed(self) -> bool:
        return bool(self._modes) and self._modes[-1] == "defer"

    def stock(self) -> bool:
        """Whether the forward that is running is to be left alone."""
        return bool(self._modes) and self._modes[-1] == "stock"

    def enter(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        labels = kwargs.get("labels")
        if labels is None and self.labels_at is not None and len(args) > self.labels_at:
            labels = args[self.labels_at]
        self.fused = False
        if not owner.training and self.eval == "stock":
            self._modes.append("stock")
        else:
            self._modes.append("plain" if labels is None and not self.loss_outside else "defer")

    def leave(self, owner: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._modes.pop() != "defer":
            return None
        # output None: the forward raised
        if not torch.compiler.is_compiling() and output is not None:
            self._say_unfused(owner)
        return self._settle(output)

    def _say_unfused(self, owner: nn.Module) -> None:
        if self.linear is not None and not self.fused and not self.loss_outside:
            _say_once(
                f"ds_fused: {type(owner).__name__} was given labels, but no cross entropy of logits that it had not "
                "computed; its loss is as without ds_fused. python -m ds_fused.doctor says what computes them"
            )

    def _can_leave(self, logits: DeferredLogits) -> bool:
        """Whether their loss can be computed behind the forward: not where only its hooks would gather the weight."""
        is_here = logits.head.weight.numel() > 0 or self.weight.is_sharded(logits.head)
        return is_here and self.linear is not None and self.logits == "defer" and not logits.is_real()

    def _settle(self, value: Any) -> Any:
        """The output with each ``DeferredLogits`` in it replaced by a tensor, at its place."""
        if isinstance(value, DeferredLogits):
            if self.loss_outside and self._can_leave(value):
                self.left = value
                value.call.on_demand = value.head.forward(value.call.hidden, later=True)
            if value.call.on_demand is not None and not value.is_real() and self.logits == "defer":
                return _steps_on_demand(value)
            return value.materialise()
        if isinstance(value, tuple):
            items = [self._settle(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, list):
            value[:] = [self._settle(item) for item in value]
        elif isinstance(value, dict):
            # also HF's ModelOutput, which keeps its attributes and its keys in step on assignment
            for key, item in list(value.items()):
                settled = self._settle(item)
                if settled is not item:
                    value[key] = settled
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            for field in dataclasses.fields(value):
                item = getattr(value, field.name, None)
                if isinstance(item, DeferredLogits):
                    object.__setattr__(value, field.name, self._settle(item))
        return value


# a tensor subclass without storage is nothing for a compiled graph: what leaves is made outside of it
@torch.compiler.disable
def _steps_on_demand(logits: DeferredLogits) -> Tensor:
    return with_steps(logits.call.on_demand, logits.steps, logits.shape, logits.dtype)


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

    # one break in a compiled graph, instead of several within the ops (checks of labels, choice of kernels)
    @torch.compiler.disable
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
            if not self.real:
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
