"""Memory in which copy engines (copy_engines.py) move what they move."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ds_fused.ops.common._parts import sum_parts
from ds_fused.ops.common._tiles import wide

if TYPE_CHECKING:
    from torch.distributed import Work

    from ds_fused.engine.zero3.copy_engines import CopyEngines, Passed

# windows of weight, and of its gradient
TURNS = 2
# how much more of memory takes the place of a window that is too small: the smaller ones stay, and with it they are no
# more than twice the last one together, however slowly batches grow
GROWTH = 1.5


class Flight(NamedTuple):
    """A collective under way and what it writes."""

    work: Work | Passed
    result: Tensor

    def land(self) -> Tensor:
        self.work.wait()
        return self.result


class SlabWindows:
    """Where the slabs of one weight and of its gradient lie: made when they are first asked for, by all ranks alike.

    Slabs take turns: on either way the next one never comes to where the one before still is, and a backward finds the
    last two of its forward. A rank's own part of a gradient goes by a kernel of NCCL's, which waits for the end of a
    product that has begun; so the gradient of a slab has until the end of the next one to leave.
    """

    def __init__(self, engines: CopyEngines, n_elements: int, dtype: torch.dtype) -> None:
        self.engines, self._elements, self._dtype = engines, n_elements, dtype
        self._weights: list[Tensor] = []
        self._gradients: list[Tensor] = []
        self._received: list[Tensor] = []
        self._given: dict[int, Tensor] = {}
        self._leaving: dict[int, Work] = {}

    def close(self) -> None:
        """Let go of the memory."""
        for there in (self._weights, self._gradients, self._received, self._given, self._leaving):
            there.clear()

    @property
    def n_bytes(self) -> int:
        n = len(self._weights) + len(self._gradients) + len(self._received)
        return n * self._elements * self._dtype.itemsize

    def _made(self, there: list[Tensor], n: int) -> list[Tensor]:
        if not there:
            there += [self.engines.window(self._elements, self._dtype) for _ in range(n)]
        return there

    def room(self, k: int, n_elements: int) -> Tensor:
        """Of slab k's window; what lies there is lost."""
        self._given.pop(k % TURNS, None)
        return self._made(self._weights, TURNS)[k % TURNS][:n_elements]

    def gave(self, k: int, rows: Tensor) -> None:
        self._given[k % TURNS] = rows

    def holds(self, rows: Tensor) -> bool:
        return any(rows is given for given in self._given.values())

    def parts(self, k: int, n_elements: int) -> Tensor:
        """Room for slab k's gradient, which is to be sent from there; that of two slabs before has left."""
        leaving = self._leaving.pop(k % TURNS, None)
        if leaving is not None:
            leaving.wait()
        return self._made(self._gradients, TURNS)[k % TURNS][:n_elements]

    def sent(self, k: int, work: Work) -> None:
        """Slab k's gradient is on its way."""
        self._leaving[k % TURNS] = work

    def join(self) -> None:
        """The current stream waits for all that is on its way here."""
        self.engines.join()
        # NCCL's works must not outlive its communicator
        self._leaving.clear()

    def received(self, n_elements: int) -> Tensor:
        return self._made(self._received, 1)[0][:n_elements]


class TokenWindows:
    """The `Carrier` of one weight's tokens. Windows are made when they are first asked for, by all ranks alike, and
    anew, by half as large again at least, where one is not large enough.
    """

    def __init__(self, engines: CopyEngines, ranks: int, rank: int) -> None:
        self._engines, self._ranks, self._rank = engines, ranks, rank
        self._made: dict[tuple[str, torch.dtype], Tensor] = {}
        # too small, and not let go of while the communicator lives
        self._small: list[Tensor] = []

    def close(self) -> None:
        """Let go of the memory."""
        self._made.clear()
        self._small.clear()

    @property
    def n_bytes(self) -> int:
        return sum(window.nbytes for window in (*self._made.values(), *self._small))

    def room(self, n: int, like: Tensor) -> Tensor:
        columns = like.shape[1]
        return self._window("tokens", n * columns, like.dtype).view(n, columns)

    def bring(self, mine: Tensor, everyones: Tensor) -> Flight:
        everyones[self._rank] = mine
        return Flight(self._engines.gather(everyones), everyones)

    def parts(self, n: int, like: Tensor) -> Tensor:
        columns = like.shape[1]
        return self._window("leaving", n * columns, wide(like)).view(n, columns)

    def send_home(self, parts: Tensor, out: Tensor) -> Flight:
        come = self._window("come", parts.numel(), parts.dtype)
        with self._engines.beside():
            self._engines.exchange(come, parts.view(-1)).wait()
            sum_parts(come.view(self._ranks, -1)[:, : out.numel()], out.view(-1), adds=False, beside=True)
        return Flight(self._engines.passed(), out)

    def _window(self, what: str, n_elements: int, dtype: torch.dtype) -> Tensor:
        """What lies there is lost."""
        window = self._made.get((what, dtype))
        if window is None or window.numel() < n_elements:
            least = 0
            if window is not None:
                self._small.append(window)
                least = int(GROWTH * window.numel())
            window = self._made[what, dtype] = self._engines.window(max(n_elements, least), dtype)
        return window[:n_elements]
