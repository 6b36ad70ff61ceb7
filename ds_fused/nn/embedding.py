"""A table of words."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops import embedding


class Embedding(torch.nn.Embedding):
    """``torch.nn.Embedding``, without max_norm, scale_grad_by_freq and sparse gradients."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        # what from_pretrained gives
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if max_norm is not None or scale_grad_by_freq or sparse:
            raise ValueError(
                f"Embedding: max_norm={max_norm}, scale_grad_by_freq={scale_grad_by_freq}, sparse={sparse}; "
                "there is none of them here: take torch.nn.Embedding"
            )
        super().__init__(
            num_embeddings, embedding_dim, padding_idx, norm_type=norm_type, _weight=_weight, _freeze=_freeze,
            device=device, dtype=dtype,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight, self.padding_idx)
