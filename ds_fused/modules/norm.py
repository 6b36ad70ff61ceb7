"""RMSNorm layers: the two bodies that nearly all of them share.

    Llama:  weight * (x / rms(x)).to(x.dtype)
    Gemma:  ((x / rms(x)) * (1 + weight.float())).to(x.dtype)

What is called ``variance_epsilon`` in one and ``eps`` in the other is read at each call, under the name that
``eps_name`` found.
"""

from __future__ import annotations

from torch import Tensor, nn

from ds_fused.ops import rms_norm


class RMSNormLlama:
    """Rounds before the weight."""

    weight: nn.Parameter
    fused_eps: str

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())  # hidden_states to some, x to others
        return rms_norm(x, self.weight, eps=getattr(self, self.fused_eps))


class RMSNormGemma:
    """Rounds once, after the weight, which is stored as its distance from 1."""

    weight: nn.Parameter
    fused_eps: str

    def forward(self, *args: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*args, *named.values())
        return rms_norm(x, self.weight, eps=getattr(self, self.fused_eps), offset=1.0, cast="after_weight")


def eps_name(module: nn.Module) -> str | None:
    """The attribute that holds the layer's epsilon; None when there is none, or more than one with different values."""
    found = [name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)]
    if not found or len({getattr(module, name) for name in found}) > 1:
        return None
    return found[0]
