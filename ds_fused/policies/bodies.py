"""The named computations that layers of many families share: what each becomes, and how that is proven.

A body reads one live layer (which JSON key does it belong to, what does the mix-in have to know?) or says why it can't
be read; the proof then decides whether the layer really computes what its class name promises.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ds_fused.modules import attention, mlp, norm
from ds_fused.modules.swap import fused_class, owner_of
from ds_fused.policies.proof import compare, facts, randn, replica


@dataclass(frozen=True)
class Reading:
    """One live layer, read."""

    key: str  # the JSON key that switches its replacement
    state: Mapping[str, object] = field(default_factory=dict)  # what the mix-in is given


@dataclass(frozen=True)
class Body:
    name: str  # the word in the report
    keys: tuple[str, ...]  # the JSON keys it can belong to
    mixin: type
    read: Callable[[nn.Module], Reading | str]  # or the reason why not
    prove: Callable[[nn.Module, type, Mapping[str, object], torch.device, torch.dtype], str | None]
    alike: Callable[[nn.Module], Hashable] = facts  # layers of one class for which it is equal share one proof


def _one_argument(module: nn.Module) -> str | None:
    """Why not, where a forward takes more than its input: the replacement would refuse the rest."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return None if len(names) == 1 else f"its forward takes ({', '.join(names)}), not one tensor"


def _read_norm(module: nn.Module) -> Reading | str:
    eps = norm.eps_name(module)
    if eps is None:
        return "it has not one epsilon, as variance_epsilon or eps"
    weight = module._parameters.get("weight")
    # ds_shape: the whole shape of a parameter that zero.Init has split
    if weight is None or len(getattr(weight, "ds_shape", weight.shape)) != 1:
        return "it has no weight vector"
    return _one_argument(module) or Reading("rms_norm", {"fused_eps": eps})


def _dtypes(dtype: torch.dtype) -> Iterable[tuple[torch.dtype, torch.dtype]]:
    """Of activations and of what meets them, to be tried for a model of ``dtype``.

    fp32 tells formulas apart that 16 bits would round together. Under autocast, or where some parameters stay in fp32,
    the two differ, which decides the dtype of a result.
    """
    return dict.fromkeys(((torch.float32, torch.float32), (dtype, dtype), (dtype, torch.float32)))


def _prove_norm(
    module: nn.Module, mixin: type, state: Mapping[str, object], device: torch.device, dtype: torch.dtype
) -> str | None:
    width = 64
    # rows of three sizes: in the least, eps weighs as much as the values, so that a wrong eps shows
    x = randn(1, 3, 2, width) * torch.tensor([1.0, 1e-3, 30.0], dtype=torch.float64).view(3, 1, 1)
    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    tensors = {"x": x} | {name: randn(2 + i, width) for i, name in enumerate(names)}
    for x_dtype, weights in _dtypes(dtype):
        dtypes = dict.fromkeys(tensors, weights) | {"x": x_dtype}
        differs = compare(*_layers(module, mixin, state), tensors, dtypes, device)
        if differs is not None:
            return differs
    return None


def _read_mlp(act: str, *children: str) -> Callable[[nn.Module], Reading | str]:
    """``act``: the name of the layer's activation; ``children``: its projections."""

    def read(module: nn.Module) -> Reading | str:
        for name in children:
            if not isinstance(module._modules.get(name), nn.Module):
                return f"it has no child {name}"
        function = getattr(module, act, None)
        fused_act = mlp.act_of(function)
        if fused_act is None:
            kind = getattr(function, "__name__", type(function).__name__)
            return f"its activation {kind} is neither a silu nor a gelu"
        if isinstance(function, nn.Module) and (function._forward_hooks or function._forward_pre_hooks):
            return "its activation carries hooks, which a fused one would not call"
        key = "swiglu" if fused_act == "silu" else "geglu"
        return _one_argument(module) or Reading(key, {"fused_act": fused_act})

    return read


def _prove_mlp(**widths: tuple[int, int]) -> Callable[..., str | None]:
    """``widths``: [out, in] of each projection in the copy."""

    def prove(
        module: nn.Module, mixin: type, state: Mapping[str, object], device: torch.device, dtype: torch.dtype
    ) -> str | None:
        # 2: gates of several units, where one activation is told from another
        tensors = {"x": 2 * randn(1, 2, 3, 32)}
        for i, (name, (n_out, n_in)) in enumerate(widths.items()):
            tensors[f"{name}.weight"] = randn(2 + i, n_out, n_in) / n_in**0.5
        for each in dict.fromkeys((torch.float32, dtype)):
            differs = compare(*_layers(module, mixin, state), tensors, dict.fromkeys(tensors, each), device)
            if differs is not None:
                return differs
        return None

    return prove


def _layers(module: nn.Module, mixin: type, state: Mapping[str, object]) -> tuple[Callable, Callable]:
    """Copies of the layer, stock and fused, as functions of their tensors."""
    cls = type(module)
    return (
        lambda tensors: replica(module, cls, tensors, {})(tensors["x"]),
        lambda tensors: replica(module, fused_class(mixin, cls), tensors, state)(tensors["x"]),
    )


def _read_rope(module: nn.Module) -> Reading | str:
    stock = attention.stock_rope(type(module))
    if stock is None:
        return f"its forward calls no {attention.NAME} that could be exchanged"
    owner = owner_of(stock)
    if owner is not None:
        return f"{owner} has replaced {attention.NAME}"
    if not attention.same_arguments(stock):
        return f"its {attention.NAME} takes {inspect.signature(stock)}"
    return Reading("rope")


def _prove_rope(
    module: nn.Module, mixin: type, state: Mapping[str, object], device: torch.device, dtype: torch.dtype
) -> str | None:
    """The forward's code is the original's own, so what has to be proven is the one function that was exchanged."""
    stock = attention.stock_rope(type(module))
    n_batch, n_tokens, width = 2, 5, 16
    for rotary, n_angles, unsqueeze_dim in ((width, n_batch, 1), (width, 1, 1), (width, 1, 2), (width // 2, 1, 1)):
        angles = randn(1, n_angles, n_tokens, rotary // 2).repeat(1, 1, 2)
        tensors = {
            # 4 heads and 2, laid out as a projection leaves them
            "q": randn(2, n_batch, n_tokens, 4, width),
            "k": randn(3, n_batch, n_tokens, 2, width),
            "cos": angles.cos(),
            "sin": angles.sin(),
        }

        def run(function: Callable, tensors: Mapping[str, Tensor], dim: int = unsqueeze_dim) -> tuple[Tensor, Tensor]:
            q, k = (tensors[name] if dim == 2 else tensors[name].transpose(1, 2) for name in ("q", "k"))
            return function(q, k, tensors["cos"], tensors["sin"], unsqueeze_dim=dim)

        def run_stock(tensors: Mapping[str, Tensor], run: Callable = run) -> tuple[Tensor, Tensor]:
            return run(stock, tensors)

        def run_fused(tensors: Mapping[str, Tensor], run: Callable = run) -> tuple[Tensor, Tensor]:
            return run(attention.apply_rotary_pos_emb, tensors)

        if rotary < width and not _runs(run_stock, tensors):
            continue  # only some rotate a part of the columns; the others refuse, so no such call can reach ours
        for x_dtype, angle_dtype in _dtypes(dtype):
            dtypes = {"q": x_dtype, "k": x_dtype, "cos": angle_dtype, "sin": angle_dtype}
            differs = compare(run_stock, run_fused, tensors, dtypes, device, gradients=("q", "k"))
            if differs is not None:
                return differs
    return None


def _runs(run: Callable, tensors: Mapping[str, Tensor]) -> bool:
    try:
        run(tensors)
    except RuntimeError:
        return False
    return True


RMS_NORM_LLAMA = Body("rms_norm", ("rms_norm",), norm.RMSNormLlama, _read_norm, _prove_norm)
RMS_NORM_GEMMA = Body("rms_norm", ("rms_norm",), norm.RMSNormGemma, _read_norm, _prove_norm)
GATED_MLP = Body(
    "glu",
    ("swiglu", "geglu"),
    mlp.GatedMLP,
    _read_mlp("act_fn", "gate_proj", "up_proj", "down_proj"),
    _prove_mlp(gate_proj=(48, 32), up_proj=(48, 32), down_proj=(32, 48)),
)
PACKED_MLP = Body(
    "glu",
    ("swiglu", "geglu"),
    mlp.PackedMLP,
    _read_mlp("activation_fn", "gate_up_proj", "down_proj"),
    _prove_mlp(gate_up_proj=(96, 32), down_proj=(32, 48)),
)
ROPE_HALF = Body("rope", ("rope",), attention.RopeHalf, _read_rope, _prove_rope, alike=lambda _: None)
