"""Attention over neighbours, and what mixes the weights of attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.nn._options import listed
from ds_fused.ops import multi_token_attention, neighborhood_attention
from ds_fused.ops.attention.neighborhood_attention import check_window
from ds_fused.ops.common._options import check_numbers_or_none


class MultiTokenAttention(torch.nn.Conv2d):
    """``multi_token_attention`` of scores [B, in_channels, L, L]; arguments, names and first values are Liger's.

    Of ``torch.nn.Conv2d`` it has the rest; its bias begins with 0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        sparse: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        place = {"device": device, "dtype": dtype}
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, **place)
        self.sparse = sparse

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, scores: Tensor) -> Tensor:
        options = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        return multi_token_attention(scores, self.weight, self.bias, sparse=self.sparse, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, sparse={self.sparse}"


class NeighborhoodAttention(torch.nn.Module):
    """Projections of x [B, T, hidden_size] around ``neighborhood_attention``; names and arguments are Liger's.

    ``border`` is one more: "shift" has NATTEN's windows.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        kernel_size: int = 7,
        dilation: int = 1,
        bias: bool = True,
        dropout: float = 0.0,
        scale: float | None = None,
        *,
        border: str = "cut",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"NeighborhoodAttention: {num_heads} heads must divide hidden_size, which is {hidden_size}"
            )
        check_window("NeighborhoodAttention", kernel_size, dilation, border)
        check_numbers_or_none("NeighborhoodAttention", scale=scale)
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(hidden_size, hidden_size, **made)
        self.k_proj = torch.nn.Linear(hidden_size, hidden_size, **made)
        self.v_proj = torch.nn.Linear(hidden_size, hidden_size, **made)
        self.out_proj = torch.nn.Linear(hidden_size, hidden_size, **made)
        self.dropout = torch.nn.Dropout(dropout)
        self.num_heads = num_heads
        self.options = {"kernel_size": kernel_size, "dilation": dilation, "scale": scale, "border": border}

    def forward(self, x: Tensor) -> Tensor:
        heads = (project(x).unflatten(-1, (self.num_heads, -1)) for project in (self.q_proj, self.k_proj, self.v_proj))
        y = neighborhood_attention(*(each.transpose(1, 2) for each in heads), **self.options)
        return self.out_proj(self.dropout(y.transpose(1, 2).flatten(-2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, {listed(self.options)}"
