"""Norms: torch's own layers, and the many classes of transformers that compute one in their own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from ds_fused.modules.layers import norm
from ds_fused.modules.swap import fused_class
from ds_fused.policies.kinds.kind import Kind, Way, both, choose, mixed, one_argument, parameter_names, shape_of
from ds_fused.policies.proof import compare, randn, replica

# (where the normalised row is rounded, offset of the weight), in the order of how many classes have it
RMS_FORMS = (("before_weight", 0.0), ("after_weight", 1.0), ("after_weight", 0.0), ("before_weight", 1.0))
# written out in forwards that keep no epsilon (OLMo)
EPS_OF_NONE = 1e-5


def _recognises(module: nn.Module) -> bool:
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return True
    # a norm by the name of a class; whether it is one, and which, the proof decides. Buffers: a batch norm
    named = any("norm" in cls.__name__.lower() for cls in type(module).__mro__)
    return named and not module._modules and not module._buffers and set(module._parameters) <= {"weight", "bias"}


def _ways(module: nn.Module) -> Sequence[Way] | str:
    if isinstance(module, nn.GroupNorm):
        return one_argument(module) or (Way("group_norm", "group_norm", norm.GroupNorm),)
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            return f"it normalises {len(module.normalized_shape)} dimensions together"
        return one_argument(module) or _ways_of_layer_norm(module)
    if any(len(shape_of(parameter)) != 1 for parameter in parameters):
        return "its weight is no vector"
    eps = norm.eps_name(module)
    names = parameter_names(module)
    if names == ["hidden_states", "gate"]:
        return "it has not one epsilon" if eps is None else _ways_with_gate(module, eps)
    mixin = norm.PyTorchRMSNorm if type(module).forward is nn.RMSNorm.forward else norm.RMSNorm
    rms = [] if eps is None else [
        Way("rms_norm", "rms_norm", mixin, _state(eps=eps, cast=cast, offset=offset))
        for cast, offset in (RMS_FORMS if parameters else RMS_FORMS[:1])
    ]  # fmt: skip
    if rms and "weight" in module._parameters:
        rms.append(Way("rms_norm", "rms_norm", norm.RMSNormT5, rms[0].state))
    layer = Way("layer_norm", "layer_norm", norm.OwnLayerNorm, _state(eps=EPS_OF_NONE if eps is None else eps))
    return one_argument(module) or (*rms, layer)


def _ways_of_layer_norm(module: nn.LayerNorm) -> Sequence[Way]:
    if type(module).forward is nn.LayerNorm.forward:
        return (Way("layer_norm", "layer_norm", norm.LayerNorm),)
    return (
        Way("layer_norm", "layer_norm", norm.OwnLayerNorm, _state(eps="eps")),
        Way("layer_norm", "layer_norm", norm.LayerNorm1P),
    )


def _ways_with_gate(module: nn.Module, eps: str) -> Sequence[Way]:
    width = next((shape_of(p)[0] for p in module._parameters.values() if p is not None), None)
    groups = getattr(module, "n_groups", None)
    size = getattr(module, "group_size", None) or (width // groups if width and groups else None)
    act = getattr(module, "activation", "silu")
    forms = product(("norm_first", "gate_first"), ("before_weight", "after_weight"))
    return [
        Way(
            "gated_rms_norm",
            "gated_rms_norm",
            norm.GatedRMSNorm,
            _state(eps=eps, order=order, cast=cast, act="sigmoid" if act == "sigmoid" else "silu", group_size=size),
        )
        for order, cast in forms
    ]


def _state(**form: object) -> tuple[tuple[str, object], ...]:
    return tuple((f"fused_{name}", value) for name, value in form.items())


def _prove(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    width = next((shape_of(p)[0] for p in parameters.values()), 64)
    if hasattr(module, "normalized_shape"):
        width = module.normalized_shape[-1]
    shape = (3, 2, width)
    if isinstance(module, nn.GroupNorm):
        shape, width = (3, module.num_channels, 2, 3), module.num_channels
    # samples of three sizes: in the least, eps weighs as much as the values, so that a wrong eps shows
    sizes = torch.tensor([1.0, 1e-3, 30.0], dtype=torch.float64).view(3, *[1] * (len(shape) - 1))
    tensors = {"x": sizes * randn(1, *shape)}
    inputs = ["x"]
    if way.mixin is norm.GatedRMSNorm:
        tensors["gate"] = randn(2, *shape)
        inputs.append("gate")
    tensors |= {name: randn(3 + i, width) for i, name in enumerate(parameters)}

    runs = both(module, way, lambda layer, tensors: layer(*(tensors[name] for name in inputs)))
    for x_dtype, weights in mixed(dtype):
        dtypes = {name: x_dtype if name in inputs else weights for name in tensors}
        # torch's layer norm takes no two dtypes on a GPU
        differs = compare(*runs, tensors, dtypes, device, may_refuse=x_dtype != weights)
        if differs is not None:
            return differs
    return None


NORM = Kind(_recognises, _ways, _prove)


def rms_norms(layer: nn.Module) -> dict[str, nn.Module]:
    """The children that may be RMS norms."""
    return {name: child for name, child in layer._modules.items() if child is not None and _may_be_rms(child)}


def _may_be_rms(module: nn.Module) -> bool:
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) or not NORM.recognises(module):
        return False
    parameters = [(name, p) for name, p in module._parameters.items() if p is not None]
    return [name for name, _ in parameters] == ["weight"] and len(shape_of(parameters[0][1])) == 1


def form_of(child: nn.Module, dtype: torch.dtype) -> Way | str:
    """What a norm will become, or why it stays."""
    ways = NORM.ways(child)
    return ways if isinstance(ways, str) else choose(NORM, child, ways, torch.device("cpu"), dtype)


def norms_over(
    norms: Mapping[str, nn.Module], forms: Mapping[str, Way | str]
) -> Callable[[str, Mapping[str, Tensor]], nn.Module]:
    """What stands for a norm of a layer whose own code is run: given its name and the tensors of the run, its copy.

    ``forms``: what norms become; the others, and those that stay, compute as they do.
    """

    def norm_of(name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        child, form = norms[name], forms.get(name)
        given = {"x": tensors["x"], "weight": tensors[f"{name}.weight"]}
        if not isinstance(form, Way):
            return replica(child, type(child), given, {})
        return replica(child, fused_class(form.mixin, type(child), form.how), given, dict(form.state))

    return norm_of
