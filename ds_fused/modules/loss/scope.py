"""When a head's call may wait: in a forward of its model that is given labels, for as long as that runs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import sys
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from ds_fused.modules.layers.linear import is_linear_patched
from ds_fused.modules.loss.deferred import DeferredLogits
from ds_fused.modules.loss.head_weight import HeadWeight
from ds_fused.modules.loss.on_demand import leaving
from ds_fused.modules.loss.out_of_graph import out_of_graph
from ds_fused.modules.swap import home_of, hooks_of_all, is_class_patched, is_observed
from ds_fused.ops.common._say import say_once
from ds_fused.ops.common._triton import is_transformed


def in_backward() -> bool:
    """Whether autograd runs on this thread: a forward that runs then is one that a checkpoint repeats."""
    return torch._C._current_graph_task_id() != -1


def is_head_observed(head: nn.Module) -> bool:
    """Whether somebody expects the head's logits: one that gives a loss is no head."""
    if is_class_patched(head) or is_linear_patched():
        return True
    # in a compiled graph hooks of its own act between two; those of all modules act in it
    if torch.compiler.is_compiling():
        return bool(hooks_of_all())
    # the logits that a trace sees made are those that it holds
    if torch.jit.is_tracing():
        return True
    return is_observed(head, "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _Forward(NamedTuple):
    """One that is running."""

    mode: str
    trained: bool  # whether it began with gradients


class _Place(NamedTuple):
    """Where a forward runs. In a compiled graph both are 0."""

    thread: int
    call: int  # the id of its frame, its own for as long as it runs; the frame itself would keep those of all callers


def _is_module_call(frame: FrameType | None) -> bool:
    return frame is not None and frame.f_globals.get("__name__") == "torch.nn.modules.module"


def _call_of_hooks() -> int:
    """The outermost frame of the module's call whose hook this is: within it hooks of errors run as well."""
    frame = sys._getframe(1)
    while frame is not None and not _is_module_call(frame):
        frame = frame.f_back
    while frame is not None and _is_module_call(frame.f_back):
        frame = frame.f_back
    return 0 if frame is None else id(frame)


def _is_executing(call: int) -> bool:
    """Whether it has neither returned nor raised, on this thread; where there is no telling, it has not."""
    frame = sys._getframe(1)
    while call and frame is not None and id(frame) != call:
        frame = frame.f_back
    return frame is not None


# every scope of a process has another number, the same on all ranks
_NUMBERS = itertools.count()

# of all threads: what one of them looks at stays where it is meanwhile
_ONE_AT_A_TIME = threading.Lock()


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
        # the owner's loss_type, by which stock chose the loss that ours stands for; () where it has not asked for it
        self.chosen_by: tuple[str | None, ...] = ()
        # somebody computes a loss of the logits that leave the forward, which is given no labels (smoother.py)
        self.loss_outside = False
        # those logits, of each forward since they are asked for
        self.left: list[DeferredLogits] = []
        # whether the forward that runs, or ran last, has had its loss fused
        self.fused = False
        # of each forward that is running, innermost last: one may be called within another, and beside it in a thread.
        # Lists by themselves, since a graph guards all that it looks at
        self._modes: list[str] = []
        self._trained: list[bool] = []
        self._places: list[_Place] = []
        # whether the head's last call in such a forward waited: a checkpoint repeats it when the forward is over
        self._waited = False
        # such a call ran without gradients, as a reentrant checkpoint runs what it will repeat
        self._without_gradients = False
        self._handles: list[Any] = []
        self._said_unfused = False
        self._number, self._reads = next(_NUMBERS), 0

    def __deepcopy__(self, memo: dict) -> Scope:
        memo[id(self)] = twin = copy.copy(self)
        twin._modes, twin._trained, twin._places = list(self._modes), list(self._trained), list(self._places)
        twin.left = []
        twin._number = next(_NUMBERS)
        # with the head alone, as PEFT copies it, none of what else hangs on the model's hooks
        with_model = any(id(handle.hooks_dict_ref()) in memo for handle in self._handles)
        twin._handles = copy.deepcopy(self._handles, memo) if with_model else []
        return twin

    def __setstate__(self, state: dict) -> None:
        # of what is loaded nothing runs
        vars(self).update(state, left=[], _modes=[], _trained=[], _places=[], _number=next(_NUMBERS))

    def attach(self, owner: nn.Module) -> None:
        self._handles = [
            owner.register_forward_pre_hook(functools.partial(_enter, self), with_kwargs=True),
            # always_call: a forward that raises must disarm the head as well. prepend: other hooks see tensors only
            owner.register_forward_hook(
                functools.partial(_leave, self), with_kwargs=True, always_call=True, prepend=True
            ),
        ]

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def armed(self) -> bool:
        """Whether a call of the head may wait."""
        forward = self._innermost()
        defers = forward is not None and forward.mode == "defer"
        if torch.compiler.is_compiling():
            return defers
        if forward is None:
            return self._waited and in_backward()
        if forward.trained:
            # the loss may be outside of that checkpoint, and to hidden states without gradients it would pass none
            self._without_gradients = defers and not torch.is_grad_enabled()
            self._waited = defers = defers and not self._without_gradients
        return defers

    def name_of_read(self) -> str:
        """Of logits that somebody may read later; where that takes all ranks, they meet under it."""
        self._reads += 1
        return f"{self._number}.{self._reads}"

    def is_running(self) -> bool:
        """Whether a forward is."""
        return self._innermost() is not None

    def is_over(self) -> bool:
        """Whether none is, nor is one repeated by a checkpoint."""
        return not self.is_running() and not in_backward()

    def is_plain(self) -> bool:
        """Whether a forward is running that was given no labels, and could have been."""
        return self._runs("plain") and self.linear is not None

    def stock(self) -> bool:
        """Whether the forward that is running is to be left alone."""
        return self._runs("stock")

    def _runs(self, mode: str) -> bool:
        forward = self._innermost()
        return forward is not None and forward.mode == mode

    def _innermost(self, *, ends: bool = False) -> _Forward | None:
        """Of those that run on this thread. It is forgotten where it ends."""
        if torch.compiler.is_compiling():
            found = _Forward(self._modes[-1], self._trained[-1]) if self._modes else None
            if ends:
                self._modes.pop(), self._trained.pop(), self._places.pop()
            return found
        here = 0, threading.get_ident()
        with _ONE_AT_A_TIME:
            for i in reversed(range(len(self._places))):
                if self._places[i].thread not in here:
                    continue
                found = _Forward(self._modes[i], self._trained[i]) if _is_executing(self._places[i].call) else None
                # what was interrupted from the keyboard did not come to its hooks
                if ends or found is None:
                    del self._modes[i], self._trained[i], self._places[i]
                if found is not None:
                    return found
        return None

    def enter(self, owner: nn.Module, args: tuple, kwargs: dict) -> None:
        labels = kwargs.get("labels")
        if labels is None and self.labels_at is not None and len(args) > self.labels_at:
            labels = args[self.labels_at]
        self.fused = False
        self._drop_loss_of_another_type(owner)
        mode = "plain" if labels is None and not self.loss_outside else "defer"
        if not owner.training and self.eval == "stock":
            mode = "stock"
        if torch.compiler.is_compiling():
            self._begin(_Forward(mode, torch.is_grad_enabled()), _Place(0, 0))
            return
        # what was interrupted is forgotten
        self._innermost()
        with _ONE_AT_A_TIME:
            place = _Place(threading.get_ident(), _call_of_hooks())
            self._begin(_Forward(mode, torch.is_grad_enabled()), place)

    def _has_another_type(self, owner: nn.Module) -> bool:
        return bool(self.chosen_by) and getattr(owner, "loss_type", None) != self.chosen_by[0]

    def _drop_loss_of_another_type(self, owner: nn.Module) -> None:
        """A loss_type that was set since chooses the loss again, as it does where no loss_function is set."""
        if self._has_another_type(owner) and getattr(vars(owner).get("_loss_function"), "scope", None) is self:
            del owner._loss_function

    def _begin(self, forward: _Forward, place: _Place) -> None:
        self._modes.append(forward.mode)
        self._trained.append(forward.trained)
        self._places.append(place)

    def leave(self, owner: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        try:
            forward = self._innermost()
            if forward is None or forward.mode != "defer":
                return None
            # output None: the forward raised
            if not torch.compiler.is_compiling() and output is not None:
                self._say_unfused(owner)
                self._settle_kept(owner)
            return self._settle(output)
        finally:
            # not before: logits that are kept are computed in the forward, by the head's own call
            self._innermost(ends=True)

    def _settle_kept(self, owner: nn.Module) -> None:
        """The same for those that the forward has made attributes of its model."""
        kept = [name for name, value in vars(owner).items() if type(value) is DeferredLogits]
        n_left = len(self.left)
        for name in kept:
            vars(owner)[name] = self._settle(vars(owner)[name])
        # a loss outside is one of the output's
        del self.left[n_left:]

    def _say_unfused(self, owner: nn.Module) -> None:
        if self.linear is not None and not self.fused and not self.loss_outside and not self._said_unfused:
            self._said_unfused = True
            say_once(
                f"ds_fused: {type(owner).__name__} was given labels, but no cross entropy of logits that it had not "
                f"computed; its loss is as without ds_fused. {self._why_unfused(owner)}"
            )

    def _why_unfused(self, owner: nn.Module) -> str:
        """What stands in the way, most often something that was done to the model since."""
        if is_transformed():
            return (
                "It ran under a transform of torch.func or torch.autograd.forward_ad, which can't pass the fused loss"
            )
        if torch.jit.is_tracing():
            return "It ran under torch.jit.trace, whose graph holds PyTorch's operations"
        paths = [path for path, module in owner.named_modules() if vars(module).get("_ds_fused_scope") is self]
        if not paths:
            again = "ds_fused.restore(model) and then ds_fused.apply(model) fuse the new one"
            return f"Its head was exchanged since, as resize_token_embeddings does; {again}"
        around = owner.get_submodule(paths[0].rpartition(".")[0])
        if type(around).__module__.startswith("peft."):
            return f"PEFT has wrapped its head since ({type(around).__name__}), and the logits are computed"
        if is_head_observed(owner.get_submodule(paths[0])):
            return "Its head was given hooks or a forward of its own since, which expect the logits"
        if self._without_gradients:
            return (
                "Its head was called without gradients, as within a reentrant checkpoint, whose repetition would not "
                "know of a fused loss; within one with use_reentrant=False it is fused"
            )
        loss = vars(owner).get("_loss_function")
        if loss is not None and getattr(loss, "scope", None) is not self:
            return f"Its loss_function was exchanged since, and is now {getattr(loss, '__qualname__', loss)}"
        if self._has_another_type(owner):
            return f"Its loss_type was exchanged since, {self.chosen_by[0]} for {owner.loss_type}"
        if "forward" in vars(owner):
            return f"Its instance has a forward of its own, from {home_of(vars(owner)['forward'])}"
        return "python -m ds_fused.doctor says what computes them"

    def _can_leave(self, logits: DeferredLogits) -> bool:
        """Whether their loss can be computed behind the forward: not where only its hooks would gather the weight."""
        is_here = logits.head.weight.numel() > 0 or self.weight.is_sharded(logits.head)
        return is_here and self.linear is not None and self.logits == "defer" and not logits.is_real()

    def _settle(self, value: Any) -> Any:
        """The output with each ``DeferredLogits`` in it replaced by a tensor, at its place."""
        if isinstance(value, DeferredLogits):
            leaves = self.loss_outside and self._can_leave(value)
            if leaves:
                self.left.append(value)
            if (leaves or value.call.fused) and not value.is_real() and self.logits == "defer":
                if not torch.compiler.is_compiling():
                    return leaving(value)
                # is_exporting() is a constant of dynamo before torch 2.13: True, also where nothing is exported
                if not torch.compiler._is_exporting_flag:
                    return out_of_graph(value)
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


def has_hooks(head: nn.Module) -> bool:
    """Whether something acts on the head's calls, as ZeRO-3 does, which a compiled graph has to leave to it."""
    return bool(head._forward_pre_hooks or head._forward_hooks)


# torch.compile(model) calls the hooks of the model itself outside of the graph; where more than this model is compiled,
# they are part of it
@torch.compiler.disable
def _enter(scope: Scope, owner: nn.Module, args: tuple, kwargs: dict) -> None:
    scope.enter(owner, args, kwargs)


@torch.compiler.substitute_in_graph(_enter)
def _enter_in_graph(scope: Scope, owner: nn.Module, args: tuple, kwargs: dict) -> None:
    scope.enter(owner, args, kwargs)


@torch.compiler.disable
def _leave(scope: Scope, owner: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    return scope.leave(owner, args, kwargs, output)


@torch.compiler.substitute_in_graph(_leave)
def _leave_in_graph(scope: Scope, owner: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    return scope.leave(owner, args, kwargs, output)
