"""The experts of a mixture, as HuggingFace's models have them."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.nn._options import known, listed
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
        for name, n_out, n_in in (
            ("gate_up_proj", 2 * intermediate_size, hidden_size),
            ("down_proj", hidden_size, intermediate_size),
        ):
            weight = torch.empty(num_experts, n_out, n_in, device=device, dtype=dtype).uniform_(-1, 1)
            setattr(self, name, torch.nn.Parameter(weight * n_in**-0.5))
        self.options = known(self, experts, options)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts(hidden_states, self.gate_up_proj, self.down_proj, top_k_index, top_k_weights, **self.options)

    def extra_repr(self) -> str:
        num_experts, hidden_size, intermediate_size = self.down_proj.shape
        sizes = {"num_experts": num_experts, "hidden_size": hidden_size, "intermediate_size": intermediate_size}
        return listed(sizes | self.options)
