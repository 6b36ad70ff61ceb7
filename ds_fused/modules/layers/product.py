"""The product of an activation, postponed: ``act(gate) * up`` becomes one op inside forwards that nobody rewrites.

    gate, up = linear(x, self.gate_up_proj[i]).chunk(2, -1)
    y = linear(self.act_fn(gate) * up, self.down_proj[i])

The original's own code runs. Only what its activation returns is another thing: an ``Activated``, which does not
compute until it is multiplied, and is then ``glu``. Any other use of it is the activation's real output, by the real
activation, and so is everything of one that somebody has put there since, or hung hooks on.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ds_fused.modules.layers.mlp import activation_of, is_other
from ds_fused.modules.layers.postponed import Postponed, computed
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
    fused_activated: type[Activated] = Activated  # a proof has its own

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module], act_name: str) -> dict[str, object]:
        """A property in front of the layer's activation."""

        def exchange(layer: nn.Module, act: Callable) -> None:
            layer.__dict__[act_name] = act

        return {act_name: property(lambda layer: _activation(layer, act_name), exchange)}


def _activation(layer: Product, act_name: str) -> Callable:
    act = activation_of(layer, act_name)
    if is_other(act, layer.fused_act):
        return act

    def activated(gate: Tensor) -> Activated:
        return layer.fused_activated(act, layer.fused_act, gate)

    return activated
