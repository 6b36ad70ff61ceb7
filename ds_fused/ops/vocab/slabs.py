"""A weight with a row for each word as slabs: groups of vocabulary rows that come and go one at a time.

linear_cross_entropy needs of a head only some rows and their vocabulary ids, whose order does not matter to
log-sum-exp; an embedding needs of its table the rows that its tokens ask for. So a weight may be whole (`WholeWeight`),
or sharded over ranks and gathered slab by slab. An op gives each word the place at which its row comes, once; from then
on places count up from slab to slab.

Sizes: V vocabulary, H hidden, n rows of one slab.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class WeightSlabs(Protocol):
    """A weight [V, H], each of its rows in exactly one slab.

    An op takes the slabs in a forward from the first to the last, and in a backward, if it has one, back again, so that
    it may begin with the rows that it still has. It calls ``prefetch`` and ``gather`` of each (in a backward of those
    whose rows it needs and has no more) and, where `requires_grad`, in a backward ``scatter`` of each, then
    ``finish()``; the same where there are no tokens at all. So the number and order of collectives depend on the weight
    and the op's options alone.
    """

    shape: tuple[int, int]  # V, H
    slab_rows: int  # the most rows that any slab has
    dtype: torch.dtype  # the weight's own: of gathered rows and of gradients
    device: torch.device
    requires_grad: bool
    # what a gradient is to be multiplied by before it is scattered: this rank's part of a mean over ranks
    share: float
    # [V] int64, of each row that comes its vocabulary id, and of each id its place among them; None where ids count up
    ids: Tensor | None
    places: Tensor | None

    def __len__(self) -> int:
        """How many slabs."""
        ...

    def span(self, k: int) -> slice:
        """The places of slab k's rows."""
        ...

    def prefetch(self, k: int) -> None:
        """Have slab k, of the weight as it is now, on its way: the one that is gathered next."""
        ...

    def gather(self, k: int) -> Tensor:
        """Rows [n, H] of slab k, which was prefetched; padding rows are left out.

        They stay until the next but one is prefetched. An op that keeps the last ones for its backward asks there
        which of them the weight still `holds`.
        """
        ...

    def holds(self, rows: Tensor) -> bool:
        """Whether rows that `gather` gave are still what they were: other losses over the same weight may have come."""
        ...

    def gradient(self, k: int) -> Tensor:
        """Room [n, H] for the gradient of slab k, in the weight's dtype; the op writes every element, then scatters."""
        ...

    def scatter(self, k: int, dw: Tensor) -> None:
        """``share`` times the gradient of slab k over all tokens of this rank, in the tensor that gradient(k) gave."""
        ...

    def finish(self) -> None:
        """All slabs are scattered: hand the gradient to its owner."""
        ...


class WholeWeight:
    """A weight that is all here, cut into slabs of neighbouring rows. Its gradient is `grad`.

    It is a view of the moment: made anew in forward and in backward, because under ZeRO-3 the storage of a parameter
    is exchanged between the two.
    """

    def __init__(self, weight: Tensor, slab_rows: int) -> None:
        self.weight = weight.detach()
        self.shape = tuple(weight.shape)
        self.slab_rows = slab_rows
        self.dtype = weight.dtype
        self.device = weight.device
        self.requires_grad = weight.requires_grad
        self.share = 1.0
        self.ids = self.places = None
        self.grad: Tensor | None = None

    def __len__(self) -> int:
        return -(-self.shape[0] // self.slab_rows)

    def span(self, k: int) -> slice:
        return slice(k * self.slab_rows, min((k + 1) * self.slab_rows, self.shape[0]))

    def prefetch(self, k: int) -> None:
        """Nothing to do: it is here."""

    def gather(self, k: int) -> Tensor:
        return self.weight[self.span(k)]

    def holds(self, rows: Tensor) -> bool:
        return True

    def gradient(self, k: int) -> Tensor:
        if self.grad is None:
            self.grad = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        return self.grad[self.span(k)]

    def scatter(self, k: int, dw: Tensor) -> None:
        """Nothing to do: `dw` is a view of `grad`."""

    def finish(self) -> None:
        """Nothing to do: autograd carries `grad` on."""


def in_order(vector: Tensor | None, slabs: WeightSlabs) -> Tensor | None:
    """What belongs to the words [V], in the order in which their rows come."""
    return vector if vector is None or slabs.ids is None else vector[slabs.ids]
