"""Experts of a mixture whose parameters are stacked in three dimensions, whichever implementation multiplies them.

transformers' implementations (grouped and batched products, and what else is registered) call ``_apply_gate`` between
the two products; the eager one has some classes' activation and product in its own loop. Both are fused, inside the
code that runs. Or the whole of it is one op, in the place of whichever implementation. Router, weights of experts and
auxiliary loss are other layers' and stay as they are.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from ds_fused.modules.counted import counted_as
from ds_fused.modules.layers.mlp import Gate, gated, is_patched
from ds_fused.modules.layers.product import Product
from ds_fused.modules.memory.kept import postponable
from ds_fused.ops.common._triton import autocast_dtype, is_fake
from ds_fused.ops.mlp.experts import experts_by

_KEPT = partial(postponable, is_kept=True)


class Experts(Product):
    """The original forward with a fused gate."""

    fused_gate: Gate
    fused_act_name: str | None = None  # None: a function in its code

    @staticmethod
    def _ds_fused_members(cls: type[nn.Module], act_name: str | None) -> dict[str, object]:
        """The loop of the eager implementation multiplies by ``act_name`` itself; None: it calls ``_apply_gate``."""
        return {} if act_name is None else Product._ds_fused_members(cls, act_name)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if is_patched(self):
            return super()._apply_gate(gate_up)
        return gated(self.fused_gate, gate_up)


class WholeExperts:
    """``experts`` over both parameters; another implementation would multiply, with ``_apply_gate`` in between.

    Under a layer's checkpoint h, of which the gates are made, is kept as the result of a product is (``kept.py``), and
    so is y, unless the repetition can do without.
    """

    fused_gate: Gate
    fused_act_name: str | None = None
    fused_transposed: bool  # whether they are stored [E, H, 2I] and [E, I, H]

    gate_up_proj: Tensor
    down_proj: Tensor

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        weights = self.gate_up_proj, self.down_proj
        # tokens of another dtype are for the implementation to cast
        is_mixed = autocast_dtype(hidden_states) is None and any(w.dtype != hidden_states.dtype for w in weights)
        # a router may give more than one weight for each choice (Phimoe's, of transformers 5.0): which counts is theirs
        is_other = top_k_weights.shape != top_k_index.shape
        # without kernels the op reads how many tokens each expert has, which fake ones don't tell
        if is_mixed or is_other or is_patched(self) or is_fake(hidden_states):
            return super().forward(hidden_states, top_k_index, top_k_weights)
        if self.fused_transposed:
            weights = [weight.transpose(1, 2) for weight in weights]
        gate = self.fused_gate._asdict()
        with counted_as(top_k_index.numel() * sum(weight[0].numel() for weight in weights)):
            return experts_by(_KEPT, hidden_states, *weights, top_k_index, top_k_weights, **gate)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if is_patched(self):
            return super()._apply_gate(gate_up)
        return gated(self.fused_gate, gate_up)
