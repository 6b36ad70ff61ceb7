"""Norms: each mix-in is one op, told by its state in which of the op's forms its layer computes.

What is called ``variance_epsilon`` in one class and ``eps`` in another is read at each call, under the name that
``eps_name`` found.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ds_fused.modules.swap import hooks_of_all, is_class_patched
from ds_fused.ops import add_rms_norm, gated_rms_norm, group_norm, layer_norm, rms_norm
from ds_fused.ops.common._say import say_once
from ds_fused.ops.common._triton import rms_norm_dtype
from ds_fused.ops.norms._norms import NotPerColumnError

EPS_NAMES = ("variance_epsilon", "eps", "norm_eps", "epsilon", "layer_norm_eps")


def say_as_it_is(module: nn.Module, error: NotPerColumnError) -> None:
    """That a norm's own forward runs: it multiplies by any weight that PyTorch spreads over x, such as a number.

    That is no question asked at each call: where the weight is one value per column, the op never raises.
    """
    if not torch.compiler.is_compiling():
        say_once(f"ds_fused: a {type(module).__name__} runs as it is: {error}")


class RMSNorm:
    """``(offset + weight) * x / rms(x)``, rounded before the weight (Llama) or once behind it (Gemma, OLMo 2).

    With a residual (see ``takes_more``) it returns two: the norm of the sum, and the sum.
    """

    fused_eps: str
    fused_offset: float
    fused_cast: str

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, *residual = (*args, *named.values())  # hidden_states to some, x to others
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        eps = getattr(self, self.fused_eps)
        try:
            if residual:
                return add_rms_norm(x, *residual, weight, eps=eps, offset=self.fused_offset, cast=self.fused_cast)
            return rms_norm(x, weight, bias=bias, eps=eps, offset=self.fused_offset, cast=self.fused_cast)
        except NotPerColumnError as error:
            say_as_it_is(self, error)
        if residual:
            total = x + residual[0]
            return super().forward(total), total
        return super().forward(x)


def _is_real(x: Tensor) -> bool:
    """Whether a norm of PyTorch's is what its op computes. Of others (integers, complex numbers, nested tensors) it has
    its own to say."""
    return x.is_floating_point() and not x.is_nested


class PyTorchRMSNorm(RMSNorm):
    """``torch.nn.RMSNorm``, which under a GPU's autocast computes and returns fp32 where this PyTorch does."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x, *residual = (*args, *named.values())
        if not _is_real(x):
            return nn.RMSNorm.forward(self, x, *residual)
        if residual:
            y, total = super().forward(x, *residual)
            return y.to(rms_norm_dtype(x, y.dtype)), total
        return super().forward(x.to(rms_norm_dtype(x, x.dtype)))


class RMSNormT5(RMSNorm):
    """T5's: rounded to the dtype of the weight, and not at all before a weight in fp32."""

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        dtype = self.weight.dtype
        if dtype in (torch.float16, torch.bfloat16) and dtype != x.dtype:
            return self.weight * rms_norm(x, None, eps=getattr(self, self.fused_eps)).to(dtype)
        return super().forward(x.to(dtype))


class LayerNorm:
    """``torch.nn.LayerNorm`` over the last dimension."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    eps: float

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        if not _is_real(x):
            return super().forward(x)
        return layer_norm(x, self.weight, self.bias, eps=self.eps)


class OwnLayerNorm:
    """A family's own layer norm (Cohere's), whose result has the dtype of x under autocast, too."""

    fused_eps: str | float  # the epsilon itself where its forward has it as a number (OLMo)

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        eps = getattr(self, self.fused_eps) if isinstance(self.fused_eps, str) else self.fused_eps
        try:
            return layer_norm(x, weight, bias, eps=eps).to(x.dtype)
        except NotPerColumnError as error:
            say_as_it_is(self, error)
        return super().forward(x)


class LayerNorm1P:
    """Nemotron's: the weight is stored as its distance from 1, and under autocast everything is cast first."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    eps: float

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        weight, bias = self.weight + 1.0, self.bias
        kind = x.device.type
        # as the original asks, which no autocast of a CPU answers
        if torch.is_autocast_enabled():
            dtype = torch.get_autocast_dtype(kind)
            x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
        with torch.autocast(kind, enabled=False):
            return layer_norm(x, weight, bias, eps=self.eps)


class GatedRMSNorm:
    """A norm with a gate before or behind it; without a gate it is the original's."""

    fused_eps: str
    fused_order: str
    fused_cast: str
    fused_act: str
    fused_group_size: int | None

    def forward(self, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        if gate is None:
            return super().forward(hidden_states, None)
        try:
            return gated_rms_norm(
                hidden_states,
                gate,
                getattr(self, "weight", None),
                eps=getattr(self, self.fused_eps),
                order=self.fused_order,
                cast=self.fused_cast,
                act=self.fused_act,
                group_size=self.fused_group_size,
            )
        except NotPerColumnError as error:
            say_as_it_is(self, error)
        return super().forward(hidden_states, gate)


class GroupNorm:
    """``torch.nn.GroupNorm``."""

    num_groups: int
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    eps: float

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        if not _is_real(x):
            return super().forward(x)
        return group_norm(x, self.num_groups, self.weight, self.bias, eps=self.eps)


def takes_more(module: nn.Module) -> bool:
    """Whether a layer is a norm that may be called with more than its input.

    Not one with hooks of others than DeepSpeed, which expect one tensor in and one out.
    """
    ours = isinstance(module, RMSNorm) and not isinstance(module, RMSNormT5) and "forward" not in vars(module)
    if not ours or getattr(module, "bias", None) is not None or is_class_patched(module):
        return False
    own = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    for hook in [*(hook for hooks in own for hook in hooks.values()), *hooks_of_all()]:
        # what decorators keep: ZeRO-3's are wrapped by torch.compiler.disable
        source = getattr(hook, "__module__", None) or type(hook).__module__
        if not source.startswith("deepspeed."):
            if not torch.compiler.is_compiling():
                say_once(f"ds_fused: a {type(module).__name__} has a hook of {source}, so it is fused with nothing")
            return False
    return True


def eps_name(module: nn.Module) -> str | None:
    """The attribute that holds the layer's epsilon; None when there is none, or more than one with different values."""
    found = [name for name in EPS_NAMES if isinstance(getattr(module, name, None), float)]
    if not found or len({getattr(module, name) for name in found}) > 1:
        return None
    return found[0]
