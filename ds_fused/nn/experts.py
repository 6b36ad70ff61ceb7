"""The experts of a mixture, as HuggingFace's models have them."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.nn._options import known, listed, nothing
from ds_fused.ops import experts


class Experts(torch.nn.Module):
    """``experts(x, gate_up_proj, down_proj, ids, weights)``: all experts in two parameters, without a router.

    Names, shapes and the call are those of transformers' experts (Mixtral's, Qwen3-MoE's). ``options``: what
    ``ds_fused.experts`` takes besides, as ``act`` or ``limit``. First values are those of ``torch.nn.Linear``.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.gate_up_proj = torch.nn.Parameter(torch.empty(num_experts, 2 * intermediate_size, hidden_size, **place))
        self.down_proj = torch.nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size, **place))
        self.reset_parameters()
        self.options = known(self, experts, options)
        weights = nothing(1, 2, 1), nothing(1, 1, 1)
        experts(nothing(0, 1), *weights, nothing(0, 1, dtype=torch.int64), nothing(0, 1), **options)

    def reset_parameters(self) -> None:
        for weight in (self.gate_up_proj, self.down_proj):
            most = weight.shape[-1] ** -0.5
            torch.nn.init.uniform_(weight, -most, most)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights, **self.options)

    def extra_repr(self) -> str:
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        return listed(sizes | self.options)
