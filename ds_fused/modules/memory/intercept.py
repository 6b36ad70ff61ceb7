"""Products and attention of a stretch of code, each call intercepted: handed to whoever runs the stretch.

    with Some(Run):                          # called(kind, function, args, named) stands in for the functions in PLACES
        y = layer(x)

Functions of ours stand in the modules for as long as any thread is in such a stretch. They see to it that other
threads' calls go to the function itself.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

ATTENTION, MATMUL = "attention", "matmul"
# module, function in it, what it computes; in modules that nobody has imported there is nothing to intercept
PLACES = (
    ("torch.nn.functional", "linear", MATMUL),
    ("torch.nn.functional", "grouped_mm", MATMUL),
    ("torch", "_grouped_mm", MATMUL),
    ("torch", "addmm", MATMUL),
    ("torch.nn.functional", "scaled_dot_product_attention", ATTENTION),
    ("transformers.modeling_flash_attention_utils", "_flash_fn", ATTENTION),
    ("transformers.modeling_flash_attention_utils", "_flash_varlen_fn", ATTENTION),
)


class Run:
    """A stretch in which calls to the functions in PLACES come here."""

    def __enter__(self) -> None:
        self._outer, _local.run = _local.run, self
        _interception.enter()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        _interception.leave()
        _local.run = self._outer

    def called(self, kind: str, function: Callable, args: tuple, named: dict) -> Any:
        raise NotImplementedError

    def unseen(self, function: Callable, *args: Any, **named: Any) -> Any:
        """The function's result, with the calls within it not handed to anybody."""
        _local.run = None
        try:
            return function(*args, **named)
        finally:
            _local.run = self


def current_run() -> Run | None:
    """Of this thread."""
    return _local.run


class _Local(threading.local):
    run: Run | None = None


_local = _Local()


class _Interception:
    """Functions of ours in the place of those in PLACES, for as long as any thread has a stretch running."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._done: list[tuple[Any, str, Callable, Callable]] = []

    def enter(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth > 1:
                return
            for home, name, kind in PLACES:
                module = sys.modules.get(home)
                stock = getattr(module, name, None)
                if stock is not None:
                    ours = _calling(stock, kind)
                    setattr(module, name, ours)
                    self._done.append((module, name, stock, ours))

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth:
                return
            for module, name, stock, ours in self._done:
                if getattr(module, name) is ours:
                    setattr(module, name, stock)
            self._done = []


_interception = _Interception()


@functools.lru_cache(maxsize=64)
def _calling(stock: Callable, kind: str) -> Callable:
    def call(*args: Any, **named: Any) -> Any:
        # a compiled part is left as it is
        if torch.compiler.is_compiling() or _local.run is None:
            return stock(*args, **named)
        return _local.run.called(kind, stock, args, named)

    return functools.update_wrapper(call, stock, updated=())
