"""Softmax and sparsemax of a dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops import softmax, sparsemax
from ds_fused.ops.common._options import check_whole


class Softmax(torch.nn.Softmax):
    """``torch.nn.Softmax``, of a dimension that is named."""

    def __init__(self, dim: int) -> None:
        check_whole("Softmax", dim=dim)
        super().__init__(dim)

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim)


class Sparsemax(torch.nn.Module):
    """``sparsemax(x, dim)``"""

    def __init__(self, dim: int = -1) -> None:
        check_whole("Sparsemax", dim=dim)
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return sparsemax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"
