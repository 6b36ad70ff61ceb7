"""The way of a gradient that no autograd hook of DeepSpeed sees into ZeRO-3's optimizer."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from ds_fused.modules.swap import library_of
from ds_fused.ops.common._parts import sum_parts

if TYPE_CHECKING:
    from deepspeed.runtime.engine import DeepSpeedEngine

# where ZeRO-3's optimizer keeps gradients until the step: ds_id -> this rank's part
KEPT_GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"
# what is asked of that optimizer; another version may not have it
NEEDED = (
    KEPT_GRADIENTS,
    "get_param_comm_dtype",
    "gradient_accumulation_dtype",
    "is_gradient_accumulation_boundary",
    "micro_step_id",
    "partition_grads",
    "queue_post_backward_callback",
    "reduce_and_partition_stream",
    "zero_grad",
)


def gradient_hooks(param: nn.Parameter) -> list[str]:
    """Those which anybody but DeepSpeed has hung on a weight's gradient; autograd calls them."""
    every = (hooks.values() for hooks in (param._backward_hooks, param._post_accumulate_grad_hooks) if hooks)
    others = (hook for hooks in every for hook in hooks if library_of(hook) != "deepspeed")
    return [getattr(hook, "__qualname__", type(hook).__name__) for hook in others]


class Place(NamedTuple):
    """The optimizer's own memory for this rank's part of a gradient."""

    kept: Tensor  # [P]
    adds: bool  # to what is there, or writes over it

    def put(self, where: slice, part: Tensor, factor: float = 1.0) -> None:
        sum_parts(part[None], self.kept[where], adds=self.adds, factor=factor)

    def put_sum(self, where: slice, parts: Tensor) -> None:
        """``put`` of the sum of parts [W, n], beside whatever else the device computes."""
        sum_parts(parts, self.kept[where], adds=self.adds, beside=True)


class Bystander(NamedTuple):
    """In place of a `Delivery`, where a weight's rates are measured and its gradient goes DeepSpeed's own way."""

    param: nn.Parameter

    @property
    def requires_grad(self) -> bool:
        return self.param.requires_grad


class Delivery:
    """Hands the optimizer this rank's part of a weight's gradient, beside what it gets for that weight by itself.

    The optimizer counts on one gradient for each parameter: it copies it to its place in the first micro step of an
    accumulation. A weight in slabs may get several: the head's, that of an embedding tied to it, and, by autograd, that
    of logits which were kept. They are added up here.
    """

    def __init__(self, param: nn.Parameter, engine: DeepSpeedEngine) -> None:
        self.param = param
        self.engine = engine
        self._is_optimized = param.ds_id in getattr(engine.optimizer, KEPT_GRADIENTS)
        self._given_at: tuple[int, int, int] | None = None
        self._held: Tensor | None = None
        self._original = engine.optimizer.partition_grads
        self._zero_grad = engine.optimizer.zero_grad
        # what stood on the optimizer itself, of an earlier delivery or of somebody else, before ours do
        self._ours = {"partition_grads": self._partition_grads, "zero_grad": self._forget}
        self._before = {name: vars(engine.optimizer).get(name) for name in self._ours}
        vars(engine.optimizer).update(self._ours)

    def __deepcopy__(self, memo: dict) -> Delivery:
        """Of a copied model, whose gradients go to no optimizer."""
        memo[id(self)] = twin = copy.copy(self)
        twin.engine = None
        return twin

    def restore(self) -> None:
        """The optimizer's methods are its own again, but where somebody has wrapped ours since."""
        optimizer = getattr(self.engine, "optimizer", None)
        # none: of an engine that is gone
        standing = {} if optimizer is None else vars(optimizer)
        for name, ours in self._ours.items():
            if standing.get(name) != ours:
                continue
            if self._before[name] is None:
                del standing[name]
            else:
                standing[name] = self._before[name]

    @property
    def requires_grad(self) -> bool:
        """Whether its gradient is wanted: not of a weight that was frozen when the optimizer was made.

        That does not train it when it is unfrozen later, and has no place for a gradient.
        """
        return self._is_optimized and self.param.requires_grad

    def refuse_hooks(self) -> None:
        """Of hooks that came after the engine was made: nobody would call them, since autograd is not on this way."""
        if not (self.requires_grad and torch.is_grad_enabled()):
            return
        hooks = gradient_hooks(self.param)
        if hooks:
            name = next(name for name, param in self.engine.module.named_parameters() if param is self.param)
            raise RuntimeError(
                f"ds_fused: {name} was given hooks on its gradient after deepspeed.initialize ({', '.join(hooks)}), "
                "which would not be called, since that gradient is never whole; hang them on it before, or set "
                '"fused_linear_cross_entropy": {"mode": "gather"}, "embedding": false'
            )

    def open(self) -> Place | None:
        """Where the optimizer keeps this rank's part, to be written to instead of giving it; None where it is not here.

        To be closed when all of it is written.
        """
        optimizer, accelerator = self.engine.optimizer, get_accelerator()
        if optimizer.offload_optimizer:
            return None
        kept = getattr(optimizer, KEPT_GRADIENTS)[self.param.ds_id]
        if not accelerator.resolves_data_dependency():
            accelerator.current_stream().wait_stream(optimizer.reduce_and_partition_stream)
        adds = optimizer.micro_step_id > 0 or self._now() == self._given_at
        if not adds:
            # padding at the end of the last shard takes part in norms
            rank = dist.get_rank(self.param.ds_process_group)
            kept[max(0, self.param.ds_numel - rank * kept.numel()) :] = 0
        return Place(kept, adds)

    def close(self) -> None:
        """All of the open place is written."""
        optimizer, accelerator = self.engine.optimizer, get_accelerator()
        self._given_at = self._now()
        if not accelerator.resolves_data_dependency():
            optimizer.reduce_and_partition_stream.wait_stream(accelerator.current_stream())
        optimizer.queue_post_backward_callback()

    def _now(self) -> tuple[int, int, int]:
        return self.engine.global_steps, self.engine.micro_steps, self.engine.optimizer.micro_step_id

    def give(self, partition: Tensor) -> None:
        """On the stream that the optimizer's epilogue waits for."""
        optimizer, accelerator = self.engine.optimizer, get_accelerator()
        stream = optimizer.reduce_and_partition_stream
        if not accelerator.resolves_data_dependency():
            stream.wait_stream(accelerator.current_stream())
        with torch.no_grad(), accelerator.stream(stream):
            if self.param.grad is None:
                optimizer.partition_grads([self.param], [partition])
            else:
                # autograd's own is in a bucket and will come; the optimizer would let go of it if it were handed ours
                self._held = partition if self._held is None else self._held + partition
            if not accelerator.is_synchronized_device():
                partition.record_stream(accelerator.current_stream())
        # where nothing else of the model is trained no other gradient would bring the epilogue about
        optimizer.queue_post_backward_callback()

    def _forget(self, *args: Any, **kwargs: Any) -> None:
        """Stands where the optimizer's zero_grad stood, after which gradients are copied again."""
        self._given_at = self._held = None
        self._zero_grad(*args, **kwargs)

    def _partition_grads(self, params: list[nn.Parameter], parts: list[Tensor]) -> list[Tensor]:
        """Stands where the optimizer's stood."""
        if any(param is self.param for param in params):
            parts = [self._added(part) if p is self.param else part for p, part in zip(params, parts, strict=True)]
        return self._original(params, parts)

    def _added(self, part: Tensor) -> Tensor:
        optimizer = self.engine.optimizer
        now = self._now()
        if now == self._given_at and optimizer.micro_step_id == 0:
            # this one will be copied over what is there
            there = getattr(optimizer, KEPT_GRADIENTS)[self.param.ds_id]
            part = part + there[: part.numel()].to(part.device).view_as(part)
        if self._held is not None:
            part, self._held = part + self._held.view_as(part), None
        self._given_at = now
        return part
