"""How many slabs of a weight and of its gradient are there at once, in a forward and its backward."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor

from ds_fused.ops.common import _tiles
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy

N_SLABS, ROWS, H = 9, 16, 8


class Counted:
    """A weight in slabs, each counted for as long as anybody holds its memory."""

    share, requires_grad, dtype, device = 0.5, True, torch.float32, torch.device("cpu")
    shape, slab_rows, ids, places = (N_SLABS * ROWS, H), ROWS, None, None

    def __init__(self) -> None:
        self.there = self.most = 0
        self.coming: Tensor | None = None
        self.leaving: Tensor | None = None

    def __len__(self) -> int:
        return N_SLABS

    def span(self, k: int) -> slice:
        return slice(k * ROWS, (k + 1) * ROWS)

    def prefetch(self, k: int) -> None:
        self.coming = self.gradient(k).fill_(0.1)

    def gather(self, k: int) -> Tensor:
        rows, self.coming = self.coming, None
        return rows

    def holds(self, rows: Tensor) -> bool:
        return True

    def gradient(self, k: int) -> Tensor:
        memory = torch.empty(ROWS, H)
        weakref.finalize(memory.untyped_storage(), self._gone)
        self.there += 1
        self.most = max(self.most, self.there)
        return memory

    def _gone(self) -> None:
        self.there -= 1

    def scatter(self, k: int, dw: Tensor) -> None:
        self.leaving = dw

    def finish(self) -> None:
        self.leaving = None


@pytest.mark.parametrize("keep_mb", [0, 1])
@pytest.mark.parametrize(("kept", "most"), [(1, 4), (_tiles.KEPT_SLABS, 4), (_tiles.KEPT_SLABS + 1, 5)])
def test_slabs_that_are_kept_take_no_more_than_what_comes_later(kept, most, keep_mb, monkeypatch):
    monkeypatch.setattr(_tiles, "KEPT_SLABS", kept)
    slabs, x = Counted(), torch.randn(6, H, requires_grad=True)
    loss = linear_cross_entropy(x, slabs, torch.arange(6), keep_mb=keep_mb)
    assert slabs.there == kept
    loss.backward()
    assert (slabs.there, slabs.most) == (0, most)


def test_without_gradients_none_is_kept():
    slabs = Counted()
    with torch.no_grad():
        loss = linear_cross_entropy(torch.randn(6, H), slabs, torch.arange(6))
    assert loss.isfinite() and slabs.there == 0
