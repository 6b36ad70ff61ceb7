"""Norms, norms over a sum, and what stands in a norm's place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_fused.nn._options import listed
from ds_fused.ops import (
    add_layer_norm,
    add_rms_norm,
    dyt,
    gated_rms_norm,
    group_norm,
    layer_norm,
    modulated_rms_norm,
    poly_norm,
    rms_norm,
)
from ds_fused.ops.common._options import check_numbers
from ds_fused.ops.common._triton import rms_norm_dtype
from ds_fused.ops.norms._norms import check_cast
from ds_fused.ops.norms.gated_rms_norm import check_form


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm``; an eps of None is that of the dtype it computes in, fp32.

    ``offset`` is added to the weight, and both together begin as 1: Gemma's norms have an offset of 1. ``cast`` says
    when a row is rounded to its dtype: "after_weight", as PyTorch and Gemma do, or "before_weight", as Llama.
    """

    offset = 0.0

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        offset: float = 0.0,
        cast: str = "after_weight",
    ) -> None:
        check_cast(type(self).__name__, cast)
        check_numbers(type(self).__name__, eps=_eps(eps), offset=offset)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self.offset, self.cast = offset, cast
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.constant_(self.weight, 1.0 - self.offset)

    def extra_repr(self) -> str:
        # of what PyTorch's has not
        more = {"offset": self.offset} if self.offset else {}
        more |= {"cast": self.cast} if self.cast != "after_weight" else {}
        return ", ".join([super().extra_repr(), listed(more)] if more else [super().extra_repr()])

    def forward(self, x: Tensor) -> Tensor:
        rows = _as_rows("RMSNorm", x, self.normalized_shape)
        if self.cast == "after_weight":
            # PyTorch's
            rows = rows.to(rms_norm_dtype(x, x.dtype))
        options = {"eps": _eps(self.eps, x), "offset": self.offset, "cast": self.cast}
        return rms_norm(rows, _flat(self.weight), **options).view(x.shape)


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm``"""

    def forward(self, x: Tensor) -> Tensor:
        rows = _as_rows("LayerNorm", x, self.normalized_shape)
        return layer_norm(rows, _flat(self.weight), _flat(self.bias), eps=self.eps).view(x.shape)


class AddRMSNorm(RMSNorm):
    """``RMSNorm`` of one dimension over a sum: (norm(x + residual), x + residual)."""

    def __init__(self, hidden_size: int, eps: float | None = 1e-6, elementwise_affine: bool = True, **options) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, **options)
        _check_one_dimension(self)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        # the sum has the dtype of both
        eps = _eps(self.eps, x, residual)
        return add_rms_norm(x, residual, self.weight, eps=eps, offset=self.offset, cast=self.cast)


class AddLayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` of one dimension over a sum: (norm(x + residual), x + residual)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, **options: object) -> None:
        super().__init__(hidden_size, eps, **options)
        _check_one_dimension(self)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(x, residual, self.weight, self.bias, eps=self.eps)


class GroupNorm(torch.nn.GroupNorm):
    """``torch.nn.GroupNorm``"""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps)


class GatedRMSNorm(torch.nn.Module):
    """``gated_rms_norm(x, gate)``: order "norm_first" as Qwen3-Next's, "gate_first" as Mamba 2's."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        *,
        order: str = "norm_first",
        cast: str = "before_weight",
        act: str = "silu",
        group_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_form("GatedRMSNorm", hidden_size, order, cast, act, group_size, eps)
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.reset_parameters()
        self.options = {"eps": eps, "order": order, "cast": cast, "act": act, "group_size": group_size}

    def reset_parameters(self) -> None:
        torch.nn.init.ones_(self.weight)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, **self.options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {listed(self.options)}"


class ModulatedRMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` of one dimension, whose forward takes scale and shift: ``(1 + scale) * norm(x) + shift``."""

    def __init__(
        self,
        hidden_size: int,
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, device=device, dtype=dtype)
        _check_one_dimension(self)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        return modulated_rms_norm(x, self.weight, scale, shift, eps=_eps(self.eps, x), cast="after_weight")


class DyT(torch.nn.Module):
    """``dyt(x)``: "Transformers without Normalization" (Zhu et al. 2025), with that paper's names and first values."""

    def __init__(
        self,
        num_features: int,
        alpha_init_value: float = 0.5,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.alpha_init_value = alpha_init_value
        self.alpha = torch.nn.Parameter(torch.empty(1, **place))
        self.weight = torch.nn.Parameter(torch.empty(num_features, **place))
        self.register_parameter("bias", torch.nn.Parameter(torch.empty(num_features, **place)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.alpha, self.alpha_init_value)
        torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return dyt(x, self.alpha, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, bias={self.bias is not None}"


class PolyNorm(torch.nn.Module):
    """``poly_norm(x)``: the activation of PolyCom (Zhuo et al. 2024), with its authors' names and first values.

    Liger's begins with a bias of 1, without a dimension.
    """

    def __init__(
        self, eps: float = 1e-6, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        check_numbers("PolyNorm", eps=eps)
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.empty(3, **place))
        self.bias = torch.nn.Parameter(torch.empty(1, **place))
        self.reset_parameters()
        self.eps = eps

    def reset_parameters(self) -> None:
        torch.nn.init.constant_(self.weight, 1 / 3)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return poly_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


def _eps(eps: float | None, *inputs: Tensor) -> float:
    """None: that of the dtype in which such inputs are normalised, fp32 or wider."""
    if eps is not None:
        return eps
    dtype = torch.float32
    for x in inputs:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.finfo(dtype).eps


def _check_one_dimension(norm: torch.nn.RMSNorm | torch.nn.LayerNorm) -> None:
    if len(norm.normalized_shape) != 1:
        shape = tuple(norm.normalized_shape)
        raise ValueError(f"{type(norm).__name__}: hidden_size is {shape}; it must be one number, the columns of x")


def _as_rows(norm: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x [..., *shape] as [..., D]."""
    if x.ndim < len(shape) or tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(f"{norm}: x {tuple(x.shape)} must end in the normalized shape {tuple(shape)}")
    return x if len(shape) == 1 else x.flatten(-len(shape))


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()
