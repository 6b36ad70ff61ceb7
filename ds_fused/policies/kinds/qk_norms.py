"""Attention layers whose norms of q and k are fused with the rotation behind them.

The code that runs is the layer's own, so what has to be proven is that two of its norms do meet in its rotary function,
and that nothing takes their results for something else before its attention is called. For that its projections are
stand-ins, and the attention is never computed: what it is given is the result. The norms are real.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.modules.layers import norm
from ds_fused.modules.layers.attention import NormedRope, exchanged, fused_functions, rotary_functions
from ds_fused.modules.layers.postponed import computed
from ds_fused.modules.layers.qk_norm import HeadNorm, Normed, Waiting, with_waiting_norms
from ds_fused.modules.layers.residual import names_in
from ds_fused.modules.layers.rotary import Turn, roles_of, turns_with_norms
from ds_fused.modules.swap import why_not_swapped
from ds_fused.policies.kinds.kind import Way, mixed, shape_of
from ds_fused.policies.kinds.norms import form_of, norms_over, rms_norms
from ds_fused.policies.proof import Run, accepts, compare, facts, randn, replica, undisturbed

KEY = "qk_norm_rope"
# where transformers' layers find the function that computes their attention
TABLE = "ALL_ATTENTION_FUNCTIONS"
BATCH, TOKENS = 2, 5
# of two samples: in the smaller one eps weighs as much as the values
SIZES = torch.tensor([1.0, 1e-3], dtype=torch.float64).view(BATCH, 1, 1)


def waiting(ways: Sequence[Way]) -> list[Way]:
    """The ways to replace a norm of heads: as any norm's, and its layer can have it wait."""
    return [
        dataclasses.replace(way, mixin=HeadNorm, state=(*way.state, ("fused_waits", False)))
        if way.mixin is norm.RMSNorm
        else way
        for way in ways
    ]


def of_heads(module: nn.Module) -> list[nn.Module]:
    """Children that may be norms of q and k: at least two of one size, or none. Norms of latents differ in theirs."""
    sizes: dict[tuple[int, ...], list[nn.Module]] = {}
    for child in rms_norms(module).values():
        sizes.setdefault(shape_of(child.weight), []).append(child)
    return [child for children in sizes.values() if len(children) > 1 for child in children]


def alike(module: nn.Module) -> Hashable:
    """Of layers for which one proof is enough. Their number is none of it: code that computes with it is refused."""
    own = tuple((name, value) for name, value in facts(module) if name != "layer_idx")
    norms = rms_norms(module)
    return own, tuple((name, type(c), facts(c) if name in norms else None) for name, c in module._modules.items())


def with_norms(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> Way | str:
    """A way of its rotary functions that norms wait for, given the way without; or what speaks against it."""
    norms = rms_norms(module)
    for name, child in norms.items():
        reason = why_not_swapped(child)
        if reason is not None:
            return f"its {name} stays as it is: {reason}"
    body = AttentionBody(module, way.how)
    met = body.norms_that_meet()
    if isinstance(met, str):
        return met
    forms = {name: form_of(child, dtype) for name, child in norms.items()}
    for name in met:
        if isinstance(forms[name], str) or forms[name].mixin is not norm.RMSNorm:
            return f"its {name} is no norm that rms_norm_rope computes"
    first, second = (_form(norms[name], forms[name]) for name in met)
    if first != second:
        return f"its {met[0]} and its {met[1]} are norms of different forms"
    differs = body.differs(met, forms, device, dtype)
    return Way(KEY, "rms_norm_rope", NormedRope, how=(met, *way.how)) if differs is None else differs


def _form(module: nn.Module, way: Way) -> dict[str, object]:
    """Of a norm all that has to be equal to another's."""
    state = dict(way.state)
    return state | {"eps": getattr(module, state["fused_eps"])}


class MetError(Exception):
    """A rotary function was called: its q and k."""


class ArrivedError(Exception):
    """The function of the attention was called: its q and k."""


class Marker(nn.Module):
    """In the place of a norm: its result waits."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor, *within: Callable) -> Normed | Tensor:
        x = computed(x)
        return x if within else Normed(Waiting(self, x), x)


class Projection(nn.Module):
    """In the place of one: its result, whatever it is given."""

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        self.__dict__["y"] = y

    def forward(self, x: Tensor) -> Tensor:
        return self.y


class Table:
    """In the place of the functions that compute attention."""

    @staticmethod
    def get_interface(*_: Any) -> Callable:
        def arrive(layer: nn.Module, q: Tensor, k: Tensor, *rest: Any, **named: Any) -> None:
            raise ArrivedError(q, k)

        return arrive

    def __class_getitem__(cls, name: str) -> Callable:
        # as transformers 5.0 asks
        return cls.get_interface()


TABLE_OF_PROOF = {TABLE: Table}


def arrived(run: Callable[[Mapping[str, Tensor]], None]) -> Run:
    """What the attention is given in a run of a layer's code."""

    def given(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        try:
            run(tensors)
        except ArrivedError as there:
            q, k = there.args
        else:
            raise TypeError(f"no function of {TABLE} is called")
        if not isinstance(q, Tensor) or not isinstance(k, Tensor):
            raise TypeError("its attention is given what is not computed")
        return q, k

    return given


class AttentionBody:
    """An attention layer's code over stand-ins."""

    def __init__(self, module: nn.Module, turns: Sequence[tuple[str, Turn]]) -> None:
        self._module, self._cls, self._turns = module, type(module), tuple(turns)
        self._norms = rms_norms(module)
        self._width = shape_of(next(iter(self._norms.values())).weight)[0]
        children = module._modules.items()
        self._projections = [name for name, c in children if isinstance(getattr(c, "out_features", None), int)]
        own = {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
        own |= {f"{name}.weight": shape_of(child.weight) for name, child in self._norms.items()}
        self._tensors = {name: randn(1 + i, *shape) for i, (name, shape) in enumerate(own.items())}
        for i, name in enumerate(self._projections):
            self._tensors[f"{name}.y"] = SIZES * randn(31 + i, BATCH, TOKENS, module._modules[name].out_features)
        self._tensors["x"] = randn(61, BATCH, TOKENS, 4)

    def norms_that_meet(self) -> tuple[str, str] | str:
        """The names of the two whose results the first call of a rotary function is given; or what it is given."""

        def meet(name: str, *args: Any, **named: Any) -> None:
            roles = roles_of(rotary_functions(self._cls)[name])
            given = dict(zip(roles.values(), args, strict=False)) | {roles[each]: x for each, x in named.items()}
            raise MetError(name, given["q"], given.get("k"))

        def recorder(name: str) -> Callable:
            return lambda *args, **named: meet(name, *args, **named)

        forward = exchanged(self._cls.forward, {name: recorder(name) for name, _ in self._turns} | TABLE_OF_PROOF)
        run = self._run(forward, lambda name, _: Marker(name))
        try:
            with undisturbed(torch.device("cpu")), torch.no_grad():
                run(self._tensors | self._angles(self._width))
        except MetError as met:
            name, *both = met.args
        except ArrivedError:
            return "its rotary function is not called"
        else:
            return f"it calls its attention otherwise than by {TABLE}"
        if not all(isinstance(x, Normed) for x in both):
            return "its rotary function is given no results of two norms"
        if any(x.waiting.y is not None for x in both):
            return "the results of its norms are read before they turn"
        if not turns_with_norms(dict(self._turns)[name]):
            return f"rms_norm_rope does not turn as its {name} does"
        names = tuple(x.waiting.norm.name for x in both)
        return names if names[0] != names[1] else f"its {names[0]} is the norm of q and of k"

    def differs(
        self, names: tuple[str, str], forms: Mapping[str, Way | str], device: torch.device, dtype: torch.dtype
    ) -> str | None:
        """What the attention of the replaced layer, whose norms of these names wait, is given otherwise."""
        if TABLE not in names_in(self._cls.forward):
            return f"it calls its attention otherwise than by {TABLE}"
        stock = exchanged(self._cls.forward, TABLE_OF_PROOF)
        fused = exchanged(self._cls.forward, fused_functions(self._cls, self._turns) | TABLE_OF_PROOF)
        fused = with_waiting_norms(fused, self._cls.forward, names)

        waits = {name: form if isinstance(form, str) else waiting([form])[0] for name, form in forms.items()}
        runs = (
            arrived(self._run(stock, norms_over(self._norms, {}))),
            arrived(self._run(fused, norms_over(self._norms, waits))),
        )
        found = []
        # of a layer that turns a part of a head, or all of it
        for rotated in (self._width, self._width // 2):
            tensors = self._tensors | self._angles(rotated)
            if accepts(runs[0], tensors):
                found.append(self._compared(runs, tensors, device, dtype))
        if not found:
            return "it takes none of the angles that rms_norm_rope does"
        return next((differs for differs in found if differs is not None), None)

    def _compared(
        self, runs: tuple[Run, Run], tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
    ) -> str | None:
        gradients = [name for name in tensors if name not in ("x", "cos", "sin")]
        for x_dtype, weights in mixed(dtype):
            dtypes = {name: weights if name.endswith(".weight") else x_dtype for name in tensors}
            differs = compare(*runs, tensors, dtypes, device, gradients, may_refuse=x_dtype != weights)
            if differs is not None:
                return differs
        return None

    def _angles(self, rotated: int) -> dict[str, Tensor]:
        """cos and sin for so many columns: any numbers, since what turns these turns all rotations."""
        once = any(turn.angles == "once" for _, turn in self._turns)
        shape = (1, TOKENS, rotated // 2 if once else rotated)
        return {"cos": randn(4, *shape), "sin": randn(5, *shape)}

    def _run(
        self, forward: Callable, norm_of: Callable[[str, Mapping[str, Tensor]], nn.Module]
    ) -> Callable[[Mapping[str, Tensor]], None]:
        """The layer's code. ``norm_of``: what stands for a norm, over the tensors that it is run on."""
        parameters = list(inspect.signature(self._cls.forward).parameters.values())[2:]
        needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]

        def run(tensors: Mapping[str, Tensor]) -> None:
            children = {name: norm_of(name, tensors) for name in self._norms}
            children |= {name: Projection(tensors[f"{name}.y"]) for name in self._projections}
            # what computes with the layer's number fails, and is not proven
            layer = replica(self._module, self._cls, tensors, {"layer_idx": object()}, children)
            named = dict.fromkeys(needed) | {"position_embeddings": (tensors["cos"], tensors["sin"])}
            forward(layer, tensors["x"], **named)

        return run
