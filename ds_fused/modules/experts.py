"""Experts of a mixture whose parameters are stacked in three dimensions, whichever implementation multiplies them.

transformers' implementations (grouped and batched products, and what else is registered) call ``_apply_gate`` between
the two products; the eager one has some classes' activation and product in its own loop. Both are fused, inside the
code that runs. Router, weights of experts and auxiliary loss are other layers' and stay as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from ds_fused.modules.mlp import Gate, gated
from ds_fused.modules.product import Product


class Experts(Product):
    """The original forward with a fused gate."""

    fused_gate: Gate

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module], act_name: str | None) -> dict[str, object]:
        """The loop of the eager implementation multiplies by ``act_name`` itself; None: it calls ``_apply_gate``."""
        return {} if act_name is None else Product._ds_fused_members(cls, act_name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return gated(self.fused_gate, gate_up)
