"""A table of words."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops import embedding


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding``, without max_norm, scale_grad_by_freq and sparse gradients."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.max_norm is not None or self.scale_grad_by_freq or self.sparse:
            raise ValueError(
                f"Embedding: max_norm={self.max_norm}, scale_grad_by_freq={self.scale_grad_by_freq}, "
                f"sparse={self.sparse}; there is none of them here: take torch.nn.Embedding"
            )

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight, self.padding_idx)
