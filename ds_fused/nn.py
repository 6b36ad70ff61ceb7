"""The ops as modules, for whoever writes a model: arguments and names of parameters are those of PyTorch's modules.

A module that PyTorch has is a subclass of it, with its state dict, first values and representation. One that it hasn't
has the parameter names of HuggingFace's models. What they compute, and ask of their inputs, stands in ds_fused/ops.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ds_fused.ops import (
    add_layer_norm,
    add_rms_norm,
    cross_entropy,
    dyt,
    embedding,
    gated_rms_norm,
    glu,
    group_norm,
    jsd,
    kl_div,
    layer_norm,
    linear_cross_entropy,
    linear_jsd,
    linear_kl_div,
    modulated_rms_norm,
    poly_norm,
    rms_norm,
    softmax,
    sparsemax,
    tvd,
)

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "CrossEntropyLoss",
    "DyT",
    "Embedding",
    "GatedRMSNorm",
    "GeGLU",
    "GroupNorm",
    "JSDLoss",
    "KLDivLoss",
    "LayerNorm",
    "LinearCrossEntropyLoss",
    "LinearJSDLoss",
    "LinearKLDivLoss",
    "ModulatedRMSNorm",
    "PolyNorm",
    "RMSNorm",
    "Softmax",
    "Sparsemax",
    "SwiGLU",
    "TVDLoss",
]


def _as_rows(norm: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x [..., *shape] as [..., D]."""
    if x.ndim < len(shape) or tuple(x.shape[-len(shape) :]) != tuple(shape):
        raise ValueError(f"{norm}: x {tuple(x.shape)} must end in the normalized shape {tuple(shape)}")
    return x if len(shape) == 1 else x.flatten(-len(shape))


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.flatten()


class RMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm``; an eps of None is that of the dtype it computes in, fp32."""

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        rows = _as_rows("RMSNorm", x, self.normalized_shape)
        return rms_norm(rows, _flat(self.weight), eps=eps, cast="after_weight").view(x.shape)


class LayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm``"""

    def forward(self, x: Tensor) -> Tensor:
        rows = _as_rows("LayerNorm", x, self.normalized_shape)
        return layer_norm(rows, _flat(self.weight), _flat(self.bias), eps=self.eps).view(x.shape)


class AddRMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` of one dimension over a sum: (norm(x + residual), x + residual)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, elementwise_affine: bool = True, **place: object) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, **place)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, self.weight, eps=self.eps, cast="after_weight")


class AddLayerNorm(torch.nn.LayerNorm):
    """``torch.nn.LayerNorm`` of one dimension over a sum: (norm(x + residual), x + residual)."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, **options: object) -> None:
        super().__init__(hidden_size, eps, **options)

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
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.options = {"eps": eps, "order": order, "cast": cast, "act": act, "group_size": group_size}

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(x, gate, self.weight, **self.options)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, {_listed(self.options)}"


class ModulatedRMSNorm(torch.nn.RMSNorm):
    """``torch.nn.RMSNorm`` of one dimension, whose forward takes scale and shift: ``(1 + scale) * norm(x) + shift``."""

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        elementwise_affine: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, eps, elementwise_affine, device=device, dtype=dtype)

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
        return modulated_rms_norm(x, self.weight, scale, shift, eps=self.eps, cast="after_weight")


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
        self.alpha = torch.nn.Parameter(torch.full((1,), alpha_init_value, **place))
        self.weight = torch.nn.Parameter(torch.ones(num_features, **place))
        self.register_parameter("bias", torch.nn.Parameter(torch.zeros(num_features, **place)) if bias else None)

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
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.weight = torch.nn.Parameter(torch.full((3,), 1 / 3, **place))
        self.bias = torch.nn.Parameter(torch.zeros(1, **place))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return poly_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


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


class Softmax(torch.nn.Softmax):
    """``torch.nn.Softmax``, of a dimension that is named."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, input: Tensor) -> Tensor:
        return softmax(input, self.dim)


class Sparsemax(torch.nn.Module):
    """``sparsemax(x, dim)``"""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        return sparsemax(input, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class CrossEntropyLoss(torch.nn.CrossEntropyLoss):
    """``torch.nn.CrossEntropyLoss`` of class indices; the loss is fp32, whatever the logits are.

    ``options``: what ``ds_fused.cross_entropy`` takes besides, as ``z_loss`` or ``grad_in_forward``.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.options = _known(cross_entropy, options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, ...]:
        return cross_entropy(
            # PyTorch has the classes in the second dimension
            input.movedim(1, -1) if input.ndim > 2 else input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            **self.options,
        )

    def extra_repr(self) -> str:
        return _listed(self.options)


class LinearCrossEntropyLoss(torch.nn.Module):
    """A head and its loss, ``linear_cross_entropy(x, linear.weight, target)``, of class indices.

    Names and arguments are those of PyTorch 2.13's module of this name. ``options``: what
    ``ds_fused.linear_cross_entropy`` takes besides, as ``softcap`` or ``chunk_mb``.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **options: object,
    ) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", weight)
        self.options = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        self.options |= _known(linear_cross_entropy, options)

    def forward(self, input: Tensor, target: Tensor) -> Tensor | tuple[Tensor, ...]:
        head = self.linear
        return linear_cross_entropy(
            input, head.weight, target, bias=head.bias, class_weight=self.weight, **self.options
        )

    def extra_repr(self) -> str:
        return _listed(self.options)


class KLDivLoss(torch.nn.KLDivLoss):
    """``torch.nn.KLDivLoss``"""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return kl_div(input, target, log_target=self.log_target, reduction=self.reduction)


class _DivergenceLoss(torch.nn.Module):
    """``op(student_logits, teacher_logits, labels)``; ``options`` are the op's: temperature, reduction ..."""

    op: Callable[..., Tensor]

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = _known(self.op, options)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.op(student_logits, teacher_logits, labels, **self.options)

    def extra_repr(self) -> str:
        return _listed(self.options)


class JSDLoss(_DivergenceLoss):
    """``jsd``; ``beta`` is an option too."""

    op = staticmethod(jsd)


class TVDLoss(_DivergenceLoss):
    """``tvd``"""

    op = staticmethod(tvd)


class _HeadsLoss(_DivergenceLoss):
    """``op(student_x, student_weight, teacher_x, teacher_weight, labels)``; the teacher is frozen."""

    def forward(
        self,
        student_x: Tensor,
        student_weight: Tensor,
        teacher_x: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> Tensor:
        heads = student_x, student_weight, teacher_x, teacher_weight
        return self.op(*heads, labels, student_bias=student_bias, teacher_bias=teacher_bias, **self.options)


class LinearJSDLoss(_HeadsLoss):
    """``linear_jsd``; ``beta`` is an option too."""

    op = staticmethod(linear_jsd)


class LinearKLDivLoss(_HeadsLoss):
    """``linear_kl_div``; ``reverse`` is an option too."""

    op = staticmethod(linear_kl_div)


def _known(op: Callable[..., object], options: dict[str, object]) -> dict[str, object]:
    """The options, all of them the op's; else a TypeError now and not in the first forward."""
    inspect.signature(op).bind_partial(**options)
    return options


def _listed(options: dict[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())
