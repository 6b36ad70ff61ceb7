"""Residual connections."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.nn._options import known, listed, nothing
from ds_fused.ops import mhc_in, mhc_post_res


class HyperConnection(torch.nn.Module):
    """A layer [..., C] -> [..., C] between residual streams: ``res x + post layer(pre x)`` for x [..., N, C] (mHC).

    fn, base and scale have the names and first values of transformers' DeepSeek-V4, whose res is the transposed one.
    ``layer`` is called with what comes after x as well. Options are those of ``mhc_coefficients``.
    """

    def __init__(
        self,
        layer: torch.nn.Module,
        num_streams: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        coefficients = num_streams * (num_streams + 2)
        self.options = known(self, mhc_in, options)
        parameters = nothing(coefficients, num_streams), nothing(coefficients), nothing(3)
        mhc_in(nothing(0, num_streams, 1), *parameters, **options)
        self.layer = layer
        self.fn = torch.nn.Parameter(torch.empty(coefficients, num_streams * hidden_size, **place))
        self.base = torch.nn.Parameter(torch.empty(coefficients, **place))
        self.scale = torch.nn.Parameter(torch.empty(3, **place))
        self.reset_parameters()
        self.num_streams, self.hidden_size = num_streams, hidden_size

    def reset_parameters(self) -> None:
        """Of this module; the layer has its own."""
        torch.nn.init.normal_(self.fn, std=0.02)
        torch.nn.init.zeros_(self.base)
        torch.nn.init.ones_(self.scale)

    def forward(self, x: Tensor, *more: object, **named: object) -> Tensor:
        y, post, res, x = mhc_in(x, self.fn, self.base, self.scale, **self.options)
        return mhc_post_res(x, self.layer(y, *more, **named), post, res)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (f"{self.num_streams}, {self.hidden_size}", listed(self.options))))
