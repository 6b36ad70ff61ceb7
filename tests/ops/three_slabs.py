"""A weight that comes in slabs, without a rank anywhere."""

from __future__ import annotations

import torch
from torch import Tensor


class ThreeSlabs:
    """The weight as ZeRO-3 might bring it: rows in another order, in uneven parts.

    As on two ranks of which the other one has no tokens: the mean is half of this one's gradient, `owner` gets all.
    """

    share = 0.5

    def __init__(self, weight: Tensor, requires_grad: bool = True) -> None:
        self.ids = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0)).to(weight.device)
        self.places = self.ids.argsort()
        self.owner = weight
        self.weight, self.slabs = weight.detach(), torch.tensor_split(self.ids, [9, 20])
        self.shape, self.dtype, self.device = tuple(weight.shape), weight.dtype, weight.device
        self.slab_rows, self.requires_grad = max(len(ids) for ids in self.slabs), requires_grad
        self.grad, self.calls = torch.full_like(self.weight, float("nan")), []
        self.coming = None

    def __len__(self) -> int:
        return 3

    def span(self, k: int) -> slice:
        return slice(*[(0, 9), (9, 20), (20, len(self.ids))][k])

    def prefetch(self, k: int) -> None:
        self.calls.append(f"prefetch {k}")
        self.coming = k, self.weight[self.slabs[k]]

    def gather(self, k: int) -> Tensor:
        self.calls.append(f"gather {k}")
        (coming, rows), self.coming = self.coming, None
        assert coming == k
        return rows

    def holds(self, rows: Tensor) -> bool:
        return True

    def gradient(self, k: int) -> Tensor:
        return torch.full_like(self.weight[self.slabs[k]], float("nan"))

    def scatter(self, k: int, dw: Tensor) -> None:
        self.calls.append(f"scatter {k}")
        self.grad[self.slabs[k]] = dw / self.share

    def finish(self) -> None:
        self.calls.append("finish")
        self.owner.grad = self.grad
