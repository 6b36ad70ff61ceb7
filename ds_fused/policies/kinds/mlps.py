"""Gated MLPs: the layouts that many families share, and any other whose activation is multiplied by something."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_fused.modules.layers.mlp import Gate, GatedMLP, PackedMLP, act_of
from ds_fused.modules.layers.postponed import is_number
from ds_fused.modules.layers.product import ACT_NAMES, Activated, Product
from ds_fused.modules.swap import is_gathering
from ds_fused.policies.kinds.kind import Kind, Way, both, compared, one_argument, shape_of
from ds_fused.policies.kinds.norms import rms_norms
from ds_fused.policies.proof import randn

# the JSON key of a gate's activation
KEYS = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu", "relu": "reglu", "relu2": "reglu"}


class Layout(NamedTuple):
    """Which children an MLP has, and where its activation is; without a name it is a silu in its forward."""

    mixin: type
    children: tuple[str, ...]
    act: str | None


LAYOUTS = (
    Layout(GatedMLP, ("gate_proj", "up_proj", "down_proj"), "act_fn"),  # Llama and 120 more
    Layout(PackedMLP, ("gate_up_proj", "down_proj"), "activation_fn"),  # Phi3, GLM4
    Layout(PackedMLP, ("input_linear", "output_linear"), "activation"),  # Granite's shared MLP
    Layout(PackedMLP, ("weights_in", "weights_out"), None),  # DINOv2
    Layout(GatedMLP, ("w1", "w3", "w2"), None),  # LFM2
)
_NAMED = re.compile("MLP|Mlp|FeedForward|FFN")
# what the bounds of a clamped gate are called
LIMITS = ("swiglu_limit", "limit")


def _recognises(module: nn.Module) -> bool:
    if _layout_of(module) is not None:
        return True
    # projections, an activation, perhaps a dropout
    if act_name(module) is None or len(_projections(module)) < 2 or one_argument(module) is not None:
        return False
    # one without a gate is of interest where somebody would expect it to be replaced
    return not _is_plain(module) or _NAMED.search(type(module).__name__) is not None


def _ways(module: nn.Module) -> Sequence[Way] | str:
    reason = one_argument(module)
    if reason is not None:
        return reason
    layout, name = _layout_of(module), act_name(module)
    if layout is None and _is_plain(module):
        # nothing to say where the activation is an op by itself
        return () if act_of(getattr(module, name)) == "relu2" else "it has no gate, and its activation alone is no op"
    if name is not None:
        act = fused_act(module, name)
        if act not in KEYS:
            return act
    else:
        act = "silu"
    whole = [] if layout is None else [
        Way(
            KEYS[act], "glu", layout.mixin,
            (("fused_gate", gate), ("fused_children", layout.children), ("fused_act_name", layout.act)),
        )
        for gate in gates(module, act)
    ]  # fmt: skip
    return whole if name is None else [*whole, Way(KEYS[act], "glu", Product, (("fused_act", act),), (name,))]


def _layout_of(module: nn.Module) -> Layout | None:
    # what it does between the product and the last projection, the original's own forward does alone (T5Gemma)
    if any(isinstance(child, nn.Dropout) for child in module._modules.values()):
        return None
    for layout in LAYOUTS:
        if all(isinstance(module._modules.get(name), nn.Module) for name in layout.children) and (
            layout.act is None or hasattr(module, layout.act)
        ):
            return layout
    return None


def _is_plain(module: nn.Module) -> bool:
    """Whether one projection goes right into the other."""
    first, *_, last = _projections(module).values()
    return len(_projections(module)) == 2 and first.out_features == last.in_features


def act_name(module: nn.Module) -> str | None:
    """Under which name the layer keeps its activation."""
    return next((name for name in ACT_NAMES if callable(getattr(module, name, None))), None)


def fused_act(module: nn.Module, name: str) -> str:
    """The activation as ``glu`` knows it, or why not."""
    function = getattr(module, name)
    act = act_of(function)
    if act is None:
        kind = getattr(function, "__name__", type(function).__name__)
        return f"its activation {kind} is none that glu has"
    if isinstance(function, nn.Module):
        # those of an engine over the same layers that nobody destroyed find no weights here to gather
        hooks = *function._forward_hooks.values(), *function._forward_pre_hooks.values()
        if not all(map(is_gathering, hooks)):
            return "its activation carries hooks, which a fused one would not call"
    return act


def gates(module: nn.Module, act: str) -> Iterable[Gate]:
    """The forms that a gate of this layer may have, by the numbers that it keeps."""
    yield Gate(act)
    limit = next((float(getattr(module, name)) for name in LIMITS if is_number(getattr(module, name, None))), None)
    if limit is None:
        return
    yield Gate(act, limit=limit)
    alpha = next((getattr(module, name) for name in ("swiglu_alpha", "alpha") if hasattr(module, name)), None)
    if act == "silu" and is_number(alpha):
        for interleaved in (True, False):
            yield Gate(act, interleaved, float(alpha), limit, 1.0)


def _projections(module: nn.Module) -> dict[str, nn.Module]:
    """Children by name that look like a linear layer, adapters and quantised ones too."""
    return {
        name: child
        for name, child in module._modules.items()
        if child is not None and isinstance(getattr(child, "in_features", None), int)
    }


def _small(projections: Mapping[str, nn.Module]) -> dict[int, int]:
    """A size of the layer -> in the copy: as few columns as tell its sizes apart."""
    sizes = sorted({n for child in projections.values() for n in (child.in_features, child.out_features)})
    small: dict[int, int] = {}
    for n in sizes:
        # halves of a packed projection stay halves
        half = small.get(n // 2) if n % 2 == 0 else None
        small[n] = 1 if n == 1 else 32 + 16 * len(small) if half is None else 2 * half
    return small


def _prove(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    state = dict(way.state)
    if way.mixin is PackedMLP:
        widths = dict(zip(state["fused_children"], ((96, 32), (32, 48)), strict=True))
    elif way.mixin is GatedMLP:
        widths = dict(zip(state["fused_children"], ((48, 32), (48, 32), (32, 48)), strict=True))
    else:
        small = _small(_projections(module))
        widths = {name: (small[c.out_features], small[c.in_features]) for name, c in _projections(module).items()}
    # 2: gates of several units, where one activation is told from another; 20: beyond the bounds of a clamp
    x = randn(1, 2, 3, next(iter(widths.values()))[1])
    tensors = {"x": torch.cat((2 * x, 20 * x))}
    for i, (name, (n_out, n_in)) in enumerate(widths.items()):
        tensors[f"{name}.weight"] = randn(2 + i, n_out, n_in) / n_in**0.5
    if way.mixin is Product:
        tensors |= _beside(module, small)

    def call(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        return layer(tensors["x"])

    runs = both(module, way, product_of(call) if way.mixin is Product else call)
    try:
        return compared(runs, tensors, device, dtype)
    except ActsAloneError:
        return "its activation multiplies nothing, and glu is a product"


def _beside(module: nn.Module, small: Mapping[int, int]) -> dict[str, Tensor]:
    """For norms within a layer whose own code runs, and for parameters of its own."""
    shapes = {f"{name}.vector": shape_of(child.weight) for name, child in rms_norms(module).items()}
    layer_norms = {name: child for name, child in module._modules.items() if isinstance(child, nn.LayerNorm)}
    shapes |= {f"{name}.vector": child.normalized_shape for name, child in layer_norms.items()}
    shapes |= {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
    return {name: randn(31 + i, *(small.get(n, n) for n in shape)) for i, (name, shape) in enumerate(shapes.items())}


class ActsAloneError(Exception):
    """An activation was asked for its output."""


class _Multiplies(Activated):
    """An activation that has no output of its own."""

    def real(self) -> Tensor:
        raise ActsAloneError


def product_of(call: Callable[[nn.Module, Mapping[str, Tensor]], Tensor]) -> Callable[..., Tensor]:
    """``call`` for ``Product``: without random numbers, as the code that draws them is one, and by a product only."""

    def run(layer: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
        layer.eval()
        if isinstance(layer, Product):
            layer.__dict__["fused_activated"] = _Multiplies
        return call(layer, tensors)

    return run


MLP = Kind(_recognises, _ways, _prove)
