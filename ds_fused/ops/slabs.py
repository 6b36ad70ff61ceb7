"""A weight with a row for each word as slabs: groups of vocabulary rows that come and go one at a time.

linear_cross_entropy needs of a head only some rows and their vocabulary ids, whose order does not matter to
log-sum-exp; an embedding needs of its table the rows that its tokens ask for. So a weight may be whole (`WholeWeight`),
or sharded over ranks and gathered slab by slab.

Sizes: V vocabulary, H hidden, n rows of one slab.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class WeightSlabs(Protocol):
    """A weight [V, H], each of its rows in exactly one slab.

    An op takes the slabs in a forward from the first to the last, and in a backward, if it has one, back again, so that
    it may begin with the rows that it still has. It calls ``prefetch`` and ``gather`` of each (in a backward where it
    needs rows) and, where `requires_grad`, in a backward ``scatter`` of each, then ``finish()``; the same where there
    are no tokens at all. So the number and order of collectives depend on the weight and the op's options alone.
    """

    shape: tuple[int, int]  # V, H
    slab_rows: int  # the most rows that any slab has
    dtype: torch.dtype  # the weight's own: of gathered rows and of gradients
    device: torch.device
    requires_grad: bool
    # what a gradient is to be multiplied by before it is scattered: this rank's part of a mean over ranks
    share: float

    def __len__(self) -> int:
        """How many slabs."""
        ...

    def places(self, k: int) -> tuple[int, Tensor | int]:
        """How many rows slab k has, and their ids [n] (int64), or, where the ids just count up, the first of them."""
        ...

    def prefetch(self, k: int) -> None:
        """Have slab k, of the weight as it is now, on its way: the one that is gathered next."""
        ...

    def gather(self, k: int) -> Tensor:
        """Rows [n, H] of slab k, which was prefetched. Padding rows are left out."""
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
        self.grad: Tensor | None = None

    def __len__(self) -> int:
        return -(-self.shape[0] // self.slab_rows)

    def places(self, k: int) -> tuple[int, int]:
        start = k * self.slab_rows
        return min(self.slab_rows, self.shape[0] - start), start

    def prefetch(self, k: int) -> None:
        """Nothing to do: it is here."""

    def gather(self, k: int) -> Tensor:
        return self._rows(self.weight, k)

    def gradient(self, k: int) -> Tensor:
        if self.grad is None:
            self.grad = torch.empty_like(self.weight, memory_format=torch.contiguous_format)
        return self._rows(self.grad, k)

    def scatter(self, k: int, dw: Tensor) -> None:
        """Nothing to do: `dw` is a view of `grad`."""

    def finish(self) -> None:
        """Nothing to do: autograd carries `grad` on."""

    def _rows(self, whole: Tensor, k: int) -> Tensor:
        return whole[k * self.slab_rows : (k + 1) * self.slab_rows]


def columns_of(ids: Tensor, where: Tensor | int, n_rows: int, n_vocab: int) -> Tensor:
    """The place of each vocabulary id (int64) among a slab's rows, which are ``where`` (see `places`); -1 elsewhere."""
    if isinstance(where, int):
        column = ids - where
        return column.masked_fill((column < 0) | (column >= n_rows), -1)
    columns = torch.full((n_vocab,), -1, dtype=torch.int64, device=ids.device)
    columns[where] = torch.arange(n_rows, device=ids.device)
    return columns[ids.clamp(0, n_vocab - 1)]
