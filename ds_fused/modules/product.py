"""The product of an activation, postponed: ``act(gate) * up`` becomes one op inside forwards that nobody rewrites.

    gate, up = linear(x, self.gate_up_proj[i]).chunk(2, -1)
    y = linear(self.act_fn(gate) * up, self.down_proj[i])

The original's own code runs. Only what its activation returns is another thing: an ``Activated``, which does not
compute until it is multiplied, and is then ``glu``. Any other use of it is the activation's real output, by the real
activation.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ds_fused.modules.postponed import Postponed, computed
from ds_fused.ops import glu

# under which of these names layers keep their activation
ACT_NAMES = ("act_fn", "activation_fn", "act", "activation")


class Activated(Postponed):
    """``act(gate)``."""

    __slots__ = ("act", "fused_act", "gate")

    def __init__(self, act: Callable[[Tensor], Tensor], fused_act: str, gate: Tensor) -> None:
        self.act = act
        self.fused_act = fused_act
        self.gate = gate

    def real(self) -> Tensor:
        return self.act(self.gate)

    def times(self, up: object) -> Tensor:
        """``glu`` where up is a tensor like gate."""
        if isinstance(up, Tensor) and up.shape == self.gate.shape and up.dtype == self.gate.dtype:
            return glu(self.gate, up, self.fused_act)
        return self.real() * computed(up)


class Product:
    """The original forward, in which the product of the activation is fused."""

    fused_act: str

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module], act_name: str) -> dict[str, object]:
        """A property in front of the layer's activation."""
        return {act_name: property(lambda self: _activation(self, act_name))}


def _activation(layer: nn.Module, act_name: str) -> Callable[[Tensor], Activated]:
    act = layer._modules[act_name] if act_name in layer._modules else layer.__dict__[act_name]

    def activated(gate: Tensor) -> Activated:
        return Activated(act, layer.fused_act, gate)

    return activated
