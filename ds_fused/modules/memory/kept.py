"""Gradient checkpointing that keeps a part: products and attention that are dear to compute again.

    def forward(x):                          # under torch.utils.checkpoint, which keeps x alone
        y = linear(x, w)                     # kept; in the repetition it is taken from there
        z = silu(y)                          # computed again

While a layer runs under its checkpoint, products and attention are exchanged, for this thread, for functions that see
what is computed within them (``intercept.py``). What they see is kept by the layer's forward, and handed out in the
order of the forward by its repetition. That happens below autograd: nodes, what they save and the order in which they
do are those of a repetition that computes everything, and so are hooks of modules (ZeRO-3's gather the same weights at
the same places) and random numbers. Gradients are bit for bit the same.

Kept per token: the output of each ``linear`` or grouped product and of the attention, with its log-sum-exp; freed when
the repetition has passed them. What was changed in place since is computed again, and so is everything in a second
backward over the same graph.

The layer's last product is special. A checkpoint stops its repetition when the last tensor is saved, which may be
before that product (autograd's own linear) or behind it (DeepSpeed's linear under ZeRO-3, a dropout). How far the first
repetition of a layer came is remembered: what it did not reach is not kept any more, and a product whose result it did
not live to use is put off until somebody does, so that it is never computed. A call of many products may be such a one
too, if it presents itself as one (``postponable``); put off, hooks within it do not run.

The dispatcher is watched within the intercepted calls only. Selective checkpointing of PyTorch watches a whole layer,
which costs a call into Python for each of its operators.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_fused.modules.memory.intercept import ATTENTION, MATMUL, Run, current_run
from ds_fused.modules.memory.offload import Group, taken, those_on_host
from ds_fused.modules.memory.operators import ADD, PRODUCTS, Watch, is_dear, writes

# makes the result of nothing, uninitialised
Empty = Callable[[], Tensor]
Make = Callable[[Empty | None], Tensor]

# level -> what is kept; "full" computes everything again
LEVELS = {"full": frozenset(), "attention": frozenset({ATTENTION}), "matmuls": frozenset({ATTENTION, MATMUL})}


class Entry(NamedTuple):
    """One result within a call, as it was at the call's end: with what was added to it in place, as a bias is.

    op None: the result of a call that presented itself as one.
    """

    op: Any
    value: Any


class Call(NamedTuple):
    """What is kept of one call."""

    entries: list[Entry]
    # what the call returned, where it is of the memory of what is kept, and its version then
    returned: list[tuple[Tensor, int]]

    def is_unchanged(self) -> bool:
        on_host = (x for entry in self.entries for x in those_on_host(entry.value))
        is_here_unchanged = all(tensor._version == version for tensor, version in self.returned)
        return is_here_unchanged and not any(x.is_spoilt for x in on_host)


def tensors_of(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        return (value,)
    return tuple(x for x in value if isinstance(x, Tensor)) if isinstance(value, (tuple, list)) else ()


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return type(value)(map(_detached, value)) if isinstance(value, (tuple, list)) else value


@dataclass
class Learnt:
    """What repetitions of a layer have shown."""

    # how many of its last calls they do not need, and whether they end within the first of these
    unread: int = 0
    ends_within: bool = False
    # calls whose result is that of the one product in them -> this product
    plain: dict[tuple, Any] = field(default_factory=dict)


class Recording:
    """One forward of a layer, and what it leaves for its repetition.

    ``kinds``: what is kept. ``counts``: the bytes of all kinds are counted, kept or not.
    ``ended``: called when a repetition has ended.
    """

    def __init__(
        self,
        learnt: Learnt,
        kinds: frozenset[str],
        *,
        counts: bool = False,
        ended: Callable[[], None] | None = None,
    ) -> None:
        self.learnt, self.kinds, self.ended = learnt, kinds, ended
        # where attention waits; None: on the device
        self.host: Group | None = None
        self.calls: list[Call | None] = []
        # place among the calls of one that is many -> an empty result of its
        self.empties: dict[int, Empty] = {}
        # bytes of each call, and its kind
        self.sizes: list[tuple[str, int]] | None = [] if counts else None

    def contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """For ``checkpoint(context_fn=...)``."""
        return _Forward(self), _Repetition(self)

    def kept_bytes(self) -> int:
        """On the device."""
        entries = [entry for call in self.calls if call is not None for entry in call.entries]
        return sum(x.nbytes for entry in entries for x in tensors_of(entry.value))


def needed_bytes(sizes: list[tuple[str, int]], learnt: Learnt, kind: str) -> int:
    """Of what was counted of one kind, that which a repetition needs."""
    return sum(size for found, size in sizes[: len(sizes) - learnt.unread] if found == kind)


def postponable(make: Make, value: Callable[[], Tensor] | None = None, *, is_kept: bool = False) -> Tensor:
    """``make(None)``, as one call of a layer under its checkpoint, however many products are computed within.

    ``make(empty)`` is the same node around the result ``empty()``, into which nothing was computed: a repetition that
    is expected to end within the call asks for it. ``value()`` is what should stand in the result, where the repetition
    lives to see it; None: what ``make(None)`` makes. ``is_kept``: the result is kept where those of products are, and
    handed out by ``empty``.
    """
    run = current_run()
    return run.whole(make, value, is_kept) if isinstance(run, _Run) else make(None)


class _Run(Run):
    def __init__(self, recording: Recording) -> None:
        self._recording = recording

    def whole(self, make: Make, value: Callable[[], Tensor] | None, is_kept: bool) -> Tensor:
        """See ``postponable``."""
        raise NotImplementedError

    def watched(self, handle: Callable, function: Callable, args: tuple, named: dict) -> Any:
        with Watch(handle):
            # a call within the call is part of it
            return self.unseen(function, *args, **named)


class _Forward(_Run):
    def whole(self, make: Make, value: Callable[[], Tensor] | None, is_kept: bool) -> Tensor:
        recording = self._recording
        y = self.unseen(make, None)
        empty = functools.partial(torch.empty, y.shape, dtype=y.dtype, device=y.device)
        recording.empties[len(recording.calls)] = empty
        is_kept = is_kept and torch.is_grad_enabled()
        recording.calls.append(_as_it_came(None, y) if is_kept and MATMUL in recording.kinds else None)
        if recording.sizes is not None:
            recording.sizes.append((MATMUL, y.nbytes if is_kept else 0))
        return y

    def called(self, kind: str, function: Callable, args: tuple, named: dict) -> Any:
        recording = self._recording
        # within another function's forward nothing is known of what its backward repeats
        wanted = torch.is_grad_enabled() and (kind in recording.kinds or recording.sizes is not None)
        if not wanted:
            recording.calls.append(None)
            if recording.sizes is not None:
                recording.sizes.append((kind, 0))
            return function(*args, **named)
        likeness = _likeness(function, args, named) if kind == MATMUL else None
        op = recording.learnt.plain.get(likeness)
        if op is not None:
            # nothing to watch: what comes out is what is kept
            y = function(*args, **named)
            recording.calls.append(_as_it_came(op, y) if kind in recording.kinds else None)
            if recording.sizes is not None:
                recording.sizes.append((kind, y.nbytes))
            return y
        made: list[Entry] = []
        is_spoilt = False

        def handle(op: Any, args: tuple, named: dict) -> Any:
            nonlocal is_spoilt
            out = op(*args, **named)
            if is_dear(op, args, named, kind):
                made.append(Entry(op, out))
            elif made and writes(op) and _memory(args[0]) in _memories(made):
                # DeepSpeed's linear adds its bias so; anything else would be done twice
                is_spoilt |= op is not ADD
            return out

        y = self.watched(handle, function, args, named)
        if likeness is not None and not is_spoilt and _is_plain(made, y):
            recording.learnt.plain[likeness] = made[0].op
        is_kept = kind in recording.kinds and made and not is_spoilt
        host = recording.host if kind == ATTENTION else None
        recording.calls.append(_kept(made, y, host) if is_kept else None)
        if recording.sizes is not None:
            recording.sizes.append((kind, sum(x.nbytes for entry in made for x in tensors_of(entry.value))))
        return y

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        calls = self._recording.calls
        for i in range(max(0, len(calls) - self._recording.learnt.unread), len(calls)):
            calls[i] = None


def _likeness(function: Callable, args: tuple, named: dict) -> tuple | None:
    """Calls of one likeness run the same operators; None: nothing is known of the call's."""
    if named or not args or not isinstance(args[0], Tensor):
        return None
    return function, args[0].ndim, args[0].dtype, *map(type, args)


def _is_plain(made: list[Entry], y: Any) -> bool:
    """Whether y is the only product's result, in another shape at most."""
    if len(made) != 1 or made[0].op not in PRODUCTS or not isinstance(y, Tensor):
        return False
    out = made[0].value
    is_alike = y.is_contiguous() and out.numel() == y.numel() > 0 and out.dtype == y.dtype
    return is_alike and out.data_ptr() == y.data_ptr()


def _as_it_came(op: Any, y: Tensor) -> Call:
    """A call of which nothing but its result is kept."""
    value = y.detach()
    return Call([Entry(op, value)], [(value, y._version)])


def _kept(made: list[Entry], y: Any, host: Group | None) -> Call:
    # detached here and not within the watch: autograd's own detach has one version with what it detaches
    memories = _memories(made)
    returned = [(x.detach(), x._version) for x in tensors_of(y) if _memory(x) in memories]
    if host is not None:
        return Call([Entry(op, host.sent(value, returned)) for op, value in made], [])
    return Call([Entry(op, _detached(value)) for op, value in made], returned)


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _memories(made: list[Entry]) -> set[int]:
    return {_memory(x) for entry in made for x in tensors_of(entry.value)}


class _Repetition(_Run):
    def __enter__(self) -> None:
        self._reached, self._ended_within = 0, False
        super().__enter__()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        recording = self._recording
        recording.learnt.unread = max(0, len(recording.calls) - self._reached + self._ended_within)
        recording.learnt.ends_within = self._ended_within
        if recording.ended is not None:
            recording.ended()

    @contextlib.contextmanager
    def _next(self) -> Iterator[int]:
        """A call; its place among the layer's."""
        self._reached += 1
        try:
            yield self._reached - 1
        except BaseException:
            # the checkpoint has all that it needs
            self._ended_within = True
            raise

    def _ends_within(self, at: int) -> bool:
        """Whether that is expected of the call there."""
        learnt = self._recording.learnt
        return learnt.ends_within and at == len(self._recording.calls) - learnt.unread

    def _take(self, at: int) -> Call | None:
        """What is kept of the call there, if it still is what the call returned."""
        calls = self._recording.calls
        if at >= len(calls):
            return None
        call, calls[at] = calls[at], None
        return call if call is not None and call.is_unchanged() else None

    def whole(self, make: Make, value: Callable[[], Tensor] | None, is_kept: bool) -> Tensor:
        with self._next() as at:
            call = self._take(at)
            if call is not None:
                return self.unseen(make, call.entries[0].value.detach)
            empty = self._recording.empties.get(at) if self._ends_within(at) else None
            y = self.unseen(make, empty)
            if empty is not None:
                with torch.no_grad():
                    # past the version: for autograd this is the value that was there from the start
                    y.data.copy_(self.unseen(make, None) if value is None else self.unseen(value))
            return y

    def called(self, kind: str, function: Callable, args: tuple, named: dict) -> Any:
        with self._next() as at:
            call = self._take(at)
            if call is not None:
                return self._handed_out(call.entries, kind, function, args, named)
            if kind == MATMUL and self._ends_within(at):
                return self._put_off(function, args, named)
            return function(*args, **named)

    def _handed_out(self, entries: list[Entry], kind: str, function: Callable, args: tuple, named: dict) -> Any:
        entries.reverse()
        handed_out: set[int] = set()

        def handle(op: Any, args: tuple, named: dict) -> Any:
            if op is ADD and _memory(args[0]) in handed_out:
                return args[0]
            if entries and op is entries[-1].op:
                value = taken(entries.pop().value)
                handed_out.update(map(_memory, tensors_of(value)))
                # without what autograd knew of it; the node that it belongs to now is made above
                return value.detach().view(_shape(args)) if op in PRODUCTS else _detached(value)
            if is_dear(op, args, named, kind):
                kept = f"{entries[-1].op} was kept" if entries else "nothing more was kept"
                raise RuntimeError(f"recompute: the repetition of a layer came to {op} where {kept} by its forward")
            return op(*args, **named)

        return self.watched(handle, function, args, named)

    def _put_off(self, function: Callable, args: tuple, named: dict) -> Any:
        """The call with its product computed at its end, which the repetition is not expected to live to see."""
        waiting: list[tuple[Any, tuple, dict, Tensor]] = []

        def compute() -> None:
            with torch.no_grad():
                for op, given, others, into in waiting:
                    # past the version: for autograd this is the value that was there from the start
                    if op is ADD:
                        op(into.data, *given[1:], **others)
                    else:
                        into.data.copy_(op(*given, **others))
            waiting.clear()

        def handle(op: Any, args: tuple, named: dict) -> Any:
            memories = {_memory(into) for *_, into in waiting}
            read = [any(_memory(x) in memories for x in tensors_of(given)) for given in args]
            if op in PRODUCTS and not any(read):
                y = args[-1].new_empty(_shape(args))
                waiting.append((op, args, named, y))
                return y
            if op is ADD and read == [True, False]:
                waiting.append((op, args, named, args[0]))
                return args[0]
            if any(read) and not (op is torch.ops.aten._unsafe_view.default or getattr(op, "is_view", False)):
                compute()
            return op(*args, **named)

        y = self.watched(handle, function, args, named)
        compute()
        return y


def _shape(args: tuple) -> tuple[int, ...]:
    """Of a product's result."""
    a, b = args[-2:]
    return *a.shape[:-1], b.shape[-1]
