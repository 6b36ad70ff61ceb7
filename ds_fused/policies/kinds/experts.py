"""Experts of a mixture: all their weights in two parameters of three dimensions, gate and up in one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ds_fused.modules.layers.experts import Experts, WholeExperts
from ds_fused.modules.layers.product import Product
from ds_fused.policies.kinds.kind import Kind, Way, both, compared, parameter_names, shape_of
from ds_fused.policies.kinds.mlps import KEYS, act_name, fused_act, gates, product_of
from ds_fused.policies.proof import randn

KEY = "experts"  # of all in one op
# of the copy in the proof
N_EXPERTS, TOP_K, TOKENS, HIDDEN, INTERMEDIATE = 3, 2, 5, 32, 48
# where all of it runs: so many that a weight's gradient is a sum of 27 terms. Of a few, or of some 20 times as large as
# others, what rounding makes of a row is chance, in the original as in the replacement, and either may be the worse
ROUTED_TOKENS = 40
SIZES = {
    "num_experts": N_EXPERTS,
    "hidden_size": HIDDEN,
    "hidden_dim": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "intermediate_dim": INTERMEDIATE,
    "expert_dim": INTERMEDIATE,
}


class _Eager:
    """All that the dispatch to an implementation asks of a configuration."""

    _experts_implementation = "eager"


# what the forward takes
ROUTED = ["hidden_states", "top_k_index", "top_k_weights"]
# attributes of the copy
GIVEN = {**SIZES, "config": _Eager()}


def _recognises(module: nn.Module) -> bool:
    packed = module._parameters.get("gate_up_proj")
    return packed is not None and len(shape_of(packed)) == 3 and "down_proj" in module._parameters


def _ways(module: nn.Module) -> Sequence[Way] | str:
    name = act_name(module)
    act = "silu" if name is None else fused_act(module, name)
    if act not in KEYS:
        return act
    key = KEYS[act]
    if not hasattr(module, "_apply_gate"):
        # experts that every token visits (Llama 4's), in one batched product
        if name is None or len(parameter_names(module)) != 1:
            return "its experts have neither an _apply_gate nor an activation that could be fused"
        return [Way(key, "glu", Product, (("fused_act", act),), (name,))]
    inside = [
        # with the product in the eager loop, or with _apply_gate there
        Way(key, "glu", Experts, (("fused_gate", gate), ("fused_act", act), ("fused_act_name", name)), (how,))
        for gate in gates(module, act)
        for how in dict.fromkeys((name, None))
    ]
    return [*_whole(module, act, name), *inside]


def _whole(module: nn.Module, act: str, name: str | None) -> list[Way]:
    """In one op, without biases."""
    if {*module._parameters} != {"gate_up_proj", "down_proj"} or parameter_names(module) != ROUTED:
        return []
    transposed = getattr(module, "is_transposed", False)
    return [
        Way(
            KEY, "experts", WholeExperts,
            (("fused_gate", gate), ("fused_act_name", name), ("fused_transposed", transposed)), asked=True,
        )
        for gate in gates(module, act)
    ]  # fmt: skip


def _prove(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    weights = _weights(module, getattr(module, "is_transposed", way.mixin is Product))
    if isinstance(weights, str):
        return weights
    prove = _prove_batched if way.mixin is Product else _prove_routed
    given = {name: value for name, value in GIVEN.items() if name in vars(module)}
    return prove(module, way, weights, given, device, dtype)


def _weights(module: nn.Module, transposed: bool) -> dict[str, Tensor] | str:
    """Small ones in the place of its parameters; or why not."""
    shapes = {"gate_up_proj": (2 * INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}
    made = {}
    for i, name in enumerate(module._parameters):
        stem = name.removesuffix("_bias")
        if stem not in shapes:
            return f"it has a parameter {name!r} beside gate_up_proj, down_proj and their biases"
        n_out, n_in = shapes[stem]
        if stem == name:
            made[name] = randn(2 + i, N_EXPERTS, *((n_in, n_out) if transposed else (n_out, n_in))) / n_in**0.5
        else:
            made[name] = randn(2 + i, N_EXPERTS, n_out)
    return made


def _prove_batched(
    module: nn.Module,
    way: Way,
    weights: Mapping[str, Tensor],
    given: Mapping[str, object],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """As many tokens for each expert."""
    call = product_of(lambda layer, tensors: layer(tensors["x"]))
    tensors = {**weights, "x": 2 * randn(1, N_EXPERTS * TOKENS, HIDDEN)}
    return compared(both(module, way, call, **given), tensors, device, dtype)


def _prove_routed(
    module: nn.Module,
    way: Way,
    weights: Mapping[str, Tensor],
    given: Mapping[str, object],
    device: torch.device,
    dtype: torch.dtype,
) -> str | None:
    """What every other implementation calls between its two products, and the whole eager one."""
    runs = both(module, way, lambda layer, tensors: layer._apply_gate(tensors["x"]))
    # rows that give gates of several units, and rows that go beyond the bounds of a clamp
    packed = randn(1, TOKENS, 2 * INTERMEDIATE)
    differs = compared(runs, {**weights, "x": torch.cat((2 * packed, 20 * packed))}, device, dtype)
    if differs is not None or (device.type != "cpu" and way.mixin is Experts):
        return differs
    top_k = torch.arange(ROUTED_TOKENS * TOP_K).view(-1, TOP_K) % N_EXPERTS

    def call(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        return layer(tensors["x"], top_k.to(tensors["x"].device), tensors["top_k_weights"])

    x = randn(1, ROUTED_TOKENS, HIDDEN)
    tensors = {**weights, "x": x, "top_k_weights": randn(9, ROUTED_TOKENS, TOP_K).sigmoid()}
    return compared(both(module, way, call, **given), tensors, device, dtype)


EXPERTS = Kind(_recognises, _ways, _prove, given=frozenset(GIVEN), in_two=True)
