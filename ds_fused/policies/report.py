"""What was replaced, what was left and why: the outcome of ``apply``, printed once and kept for undoing it."""

from __future__ import annotations

import copy
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from ds_fused.modules.loss.head import CausalLMLoss
from ds_fused.modules.loss.scope import Scope
from ds_fused.modules.memory.recompute import may_be_checkpointed
from ds_fused.modules.swap import unswap
from ds_fused.policies.arguments import check_model

log = logging.getLogger("ds_fused")


class Claim(Protocol):
    """One decision: these layers, all of one class, get this replacement. Nothing changes before ``commit``."""

    key: str  # the JSON key that asked for it
    paths: tuple[str, ...]  # the layers' names in the model
    original: str  # qualified name of their class
    replacement: str  # what they become, in a word

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """None when the replacement computes what the original does, else what differed. Changes nothing."""

    def commit(self) -> None: ...

    def restore(self) -> None: ...

    def in_place(self) -> bool:
        """Whether every layer of the claim still has what ``commit`` gave it."""

    def watched(self) -> tuple[type, ...]:
        """The classes whose forward the first step has to call, if the claim is live; () when there are none."""


@dataclass(frozen=True)
class Left:
    """Layers that stay stock, and the reason."""

    what: str
    count: int
    reason: str


def counted(left: Mapping[tuple[str, str], int]) -> list[Left]:
    """Of (what, reason) -> how many layers."""
    return [Left(what, count, reason) for (what, reason), count in left.items()]


@dataclass(frozen=True)
class Replaced:
    key: str
    original: str
    replacement: str
    count: int


# the attribute of a model that holds the reports of what was applied to it, last applied last
REPORTS = "_ds_fused_reports"


class _Reports(list):
    """Copied with the model, and no part of its pickle: a loaded model has nothing to undo."""

    def __deepcopy__(self, memo: dict) -> _Reports:
        return _Reports(copy.deepcopy(list(self), memo))

    def __reduce__(self) -> tuple:
        return _Reports, ()


def restore(model: nn.Module) -> None:
    """Undo every ``apply`` to ``model`` and to models within it, last first; nothing happens where there was none.

    What no report knows is undone too: copies of single layers, as PEFT makes them of those that are to be saved, and
    models that were loaded from a pickle.
    """
    check_model(model, "restore")
    reports = [report for module in model.modules() for report in reversed(vars(module).get(REPORTS, []))]
    _, errors = _undone(reports[::-1], lambda report: report.restore())
    for module in list(model.modules()):
        loss, scope = vars(module).get("_loss_function"), vars(module).get("_ds_fused_scope")
        if isinstance(loss, CausalLMLoss):
            del module._loss_function
            if not loss.scope.chosen_by:
                module.loss_function = loss.original
        if isinstance(scope, Scope):
            scope.detach()
        if "_ds_fused_original" in vars(type(module)):
            unswap(module)
    if errors:
        raise errors[0]


@dataclass(eq=False)
class Report:
    """The outcome of one ``apply`` on one model."""

    model: nn.Module
    claims: Sequence[Claim]  # those that were committed
    left: Sequence[Left]
    seconds: float
    watch: Watch = field(init=False)
    settings: Sequence[str] = ()  # what was set beside the layers, a line each
    undoing: Sequence[Callable[[], None]] = ()  # of what was done beside the claims, behind them
    found_in: weakref.WeakSet[Report] | None = None  # copies are, too

    def __post_init__(self) -> None:
        self.watch = Watch(self.model, self.claims)
        # a plain attribute of the model, so that restore() finds it and both go together
        self.model.__dict__.setdefault(REPORTS, _Reports()).append(self)

    def __deepcopy__(self, memo: dict) -> Report:
        """Of a copied model; claims that are an engine's have no copy."""
        memo[id(self)] = twin = copy.copy(self)
        state = {name: value for name, value in vars(self).items() if name != "found_in"}
        vars(twin).update(copy.deepcopy(state, memo))
        twin.claims = [claim for claim in twin.claims if claim is not None]
        if twin.found_in is not None:
            twin.found_in.add(twin)
        return twin

    @property
    def replaced(self) -> tuple[Replaced, ...]:
        """One row for each kind of layer, in the order of the plan."""
        rows = Counter()
        for claim in self.claims:
            rows[claim.key, claim.original, claim.replacement] += len(claim.paths)
        return tuple(Replaced(*row, count) for row, count in rows.items())

    def restore(self) -> None:
        """Undo everything, last first; the model is stock again, and a second call finds nothing to do.

        What can't be undone, as where another class was built over ours, is raised when all else is done, and a second
        call tries it again.
        """
        self.watch.stop()
        self.claims, errors = _undone(self.claims, lambda claim: claim.restore())
        self.undoing, more = _undone(self.undoing, lambda undo: undo())
        if errors or more:
            raise [*errors, *more][0]
        reports = vars(self.model).get(REPORTS, [])
        if self in reports:
            reports.remove(self)
        if not reports:
            vars(self.model).pop(REPORTS, None)

    def recheck(self) -> list[Claim]:
        """The claims that somebody undid since the commit, by another class or by a forward on the instance."""
        return [claim for claim in self.claims if not claim.in_place()]

    def verify_live(self) -> list[Claim]:
        """The claims whose replacement the model's first forward was not seen to call. [] while there was none yet.

        Every model checks itself when its first forward ends; this is for who wants the answer.
        """
        return list(self.watch.silent)

    def __str__(self) -> str:
        lines = [f"ds_fused: {sum(row.count for row in self.replaced)} layers replaced in {self.seconds:.1f} s"]
        table = [
            (f"{row.count} x", row.key, row.original.rpartition(".")[2], f"-> {row.replacement}")
            for row in self.replaced
        ]
        widths = [max(len(row[i]) for row in table) for i in range(3)] if table else ()
        lines += [
            "  " + " ".join((row[0].rjust(widths[0]), row[1].ljust(widths[1]), row[2].ljust(widths[2]), row[3]))
            for row in table
        ]
        lines += [f"  {line}" for line in self.settings]
        lines += [f"  left {row.count} x {row.what}: {row.reason}" for row in self.left]
        return "\n".join(lines)


def _undone(things: Sequence[object], undo: Callable[[object], None]) -> tuple[list[object], list[Exception]]:
    """What of these could not be undone, last first, in their order; and why, the first that was met first."""
    kept, errors = [], []
    for thing in reversed(things):
        try:
            undo(thing)
        except Exception as error:
            kept.insert(0, thing)
            errors.append(error)
    return kept, errors


class Watch:
    """Whether the replacements ran in the first forward: a swap that nobody calls would be silent.

    The counters exist during that one forward only, so that neither later steps nor a compiled graph sees them.
    """

    def __init__(self, model: nn.Module, claims: Sequence[Claim]) -> None:
        self.silent: list[Claim] = []
        self._claims = [claim for claim in claims if claim.watched()]
        self._called: set[type] = set()
        # class, "forward" or "__call__", its own such or None where it inherits it
        self._counted: list[tuple[type, str, object]] = []
        self._hooks = []
        if self._claims:
            self._hooks = [
                model.register_forward_pre_hook(self._start),
                model.register_forward_hook(self._end, always_call=True),
            ]

    def __deepcopy__(self, memo: dict) -> Watch:
        memo[id(self)] = twin = Watch.__new__(Watch)
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def __reduce__(self) -> tuple:
        # it is about the first forward in this process
        return _no_watch, ()

    def stop(self) -> None:
        """Take hooks and counters out, verdict or not."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._uncount()

    def _uncount(self) -> None:
        for cls, name, own in reversed(self._counted):
            if own is None:
                delattr(cls, name)
            else:
                setattr(cls, name, own)
        self._counted = []

    def _start(self, model: nn.Module, args: tuple) -> None:
        if torch.compiler.is_compiling() or _compiled(model):
            return  # counters would be traced into the graph, and taking them out would compile it again
        for cls in {cls for claim in self._claims for cls in claim.watched()}:
            # transformers (5.24) checkpoints a layer in the forward that it knows for the class's own
            name = "__call__" if may_be_checkpointed(cls) else "forward"
            self._counted.append((cls, name, cls.__dict__.get(name)))
            setattr(cls, name, _counting(cls, getattr(cls, name), self._called))

    def _end(self, model: nn.Module, args: tuple, output: object) -> None:
        if torch.compiler.is_compiling() or not self._counted:
            return
        self._uncount()
        if output is None or sys.exc_info()[1] is not None:
            # it raised, or a hook behind it, which says nothing about the swap: the next one is the first. And PyTorch
            # is going through the hooks, of which none may be taken away: it would raise another error
            return
        self.stop()
        self.silent = [claim for claim in self._claims if not self._called.intersection(claim.watched())]
        # a forward that an instance was given may call ours, as it found it before the counters came
        behind = {type(module) for module in model.modules() if "forward" in vars(module)}
        hidden = [claim for claim in self.silent if behind.intersection(claim.watched())]
        if hidden:
            log.warning(
                "ds_fused: replaced, but behind a forward that instances were given since: %s; it may call ours or not",
                _kinds(hidden),
            )
        unseen = [claim for claim in self.silent if claim not in hidden]
        if unseen:
            log.warning(
                "ds_fused: replaced, but not called in the first forward: %s; they ran unfused or not at all",
                _kinds(unseen),
            )


def _kinds(claims: Sequence[Claim]) -> str:
    return ", ".join(f"{claim.original.rpartition('.')[2]} ({claim.key})" for claim in claims)


def _no_watch() -> Watch:
    return Watch(nn.Module(), ())


def _counting(cls: type, call: Callable, called: set[type]) -> Callable:
    def counting(self, *args, **named):
        called.add(cls)
        return call(self, *args, **named)

    return counting


def _compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
