"""Gated MLPs of HuggingFace's models."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops import glu


class SwiGLU(torch.nn.Module):
    """The MLP of a Llama, ``down_proj(silu(gate_proj(x)) * up_proj(x))``."""

    act = "silu"

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.act))


class GeGLU(SwiGLU):
    """The MLP of a Gemma: SwiGLU with the tanh approximation of gelu."""

    act = "gelu_tanh"
