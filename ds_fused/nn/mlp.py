"""Gated MLPs of HuggingFace's models, and an activation without a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.modules.layers.mlp import Gate
from ds_fused.modules.layers.sliced_mlp import Projections
from ds_fused.modules.layers.tiled_mlp import check_tiles, tiled
from ds_fused.ops import glu, relu2

# PyTorch's word for a gelu, and the op's
GELU = {"tanh": "gelu_tanh", "none": "gelu"}


class SwiGLU(torch.nn.Module):
    """The MLP of a Llama, ``down_proj(silu(gate_proj(x)) * up_proj(x))``, for x [..., hidden_size].

    ``tiles``: tokens go through it in so many parts, one after the other, each computed again in backward, so that
    what lies between x and the result exists for one of them at a time. x is [..., tokens, hidden_size] then, and
    parameters get their gradients by ``.backward()``, not by ``torch.autograd.grad``. Where x has fewer elements than
    the weights, backward goes by parts of the intermediate width. Under ZeRO-3 it should be a leaf module
    (``deepspeed.utils.set_z3_leaf_modules``), whose weights are gathered once for all parts.
    """

    act = "silu"

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool = False,
        tiles: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_tiles(type(self).__name__, tiles)
        self.tiles = tiles
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.up_proj = torch.nn.Linear(hidden_size, intermediate_size, **options)
        self.down_proj = torch.nn.Linear(intermediate_size, hidden_size, **options)

    def forward(self, x: Tensor) -> Tensor:
        if self.tiles == 1:
            return self._whole(x)
        projections = Projections(Gate(self.act), self.gate_proj, self.up_proj, self.down_proj)
        return tiled(self._whole, x, self.tiles, self.parameters(), projections)

    def extra_repr(self) -> str:
        return f"tiles={self.tiles}" if self.tiles > 1 else ""

    def _whole(self, x: Tensor) -> Tensor:
        return self.down_proj(glu(self.gate_proj(x), self.up_proj(x), self.act))


class GeGLU(SwiGLU):
    """The MLP of a Gemma: SwiGLU with gelu, as ``torch.nn.GELU(approximate)``: by tanh, or with "none" by erf."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, approximate: str = "tanh", **options) -> None:
        if approximate not in GELU:
            raise ValueError(f"GeGLU: approximate is {approximate!r}; known are {', '.join(GELU)}")
        super().__init__(hidden_size, intermediate_size, **options)
        self.act = GELU[approximate]


class ReGLU(SwiGLU):
    """SwiGLU with relu."""

    act = "relu"


class ReLU2(torch.nn.Module):
    """``relu(x)^2``, Nemotron's activation, for x of any shape."""

    def forward(self, x: Tensor) -> Tensor:
        return relu2(x)
