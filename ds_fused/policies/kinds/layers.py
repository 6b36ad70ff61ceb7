"""Layers that add what a child made to the residual stream and normalise the sum: decoder layers, and others like them.

The code that runs is the layer's own, so what has to be proven is that a sum of it does go into one of its norms, and
that nothing takes such a sum for something else. For that its other children are stand-ins, which need neither masks
nor positions; the norms are real.
"""

from __future__ import annotations

import dis
import inspect
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ds_fused.modules.layers import norm
from ds_fused.modules.layers.residual import Residual, names_in
from ds_fused.modules.swap import fused_class, why_not_swapped
from ds_fused.policies.kinds.kind import Kind, Way, mixed, shape_of
from ds_fused.policies.kinds.norms import form_of, norms_over, rms_norms
from ds_fused.policies.proof import Run, compare, facts, randn, replica, undisturbed

# of the proof: so many that no code takes a tensor for a tuple
ROWS = 5
# how many things a child with children may return, and how many such children there may be. 2 first: code that takes
# the first of several would take the first row of a tensor
RETURNS = (2, 1, 3)
MOST_CHILDREN = 4
LISTS = (nn.ModuleList, nn.ModuleDict)
CPU = torch.device("cpu")


def _others(layer: nn.Module) -> dict[str, nn.Module]:
    norms = rms_norms(layer)
    return {name: child for name, child in layer._modules.items() if child is not None and name not in norms}


def _recognises(module: nn.Module) -> bool:
    """Two norms and two children with children: an attention or what stands for it, and an MLP or experts."""
    if len(rms_norms(module)) < 2 or not isinstance(inspect.unwrap(type(module).forward), FunctionType):
        return False
    return sum(bool(child._modules) and not isinstance(child, LISTS) for child in _others(module).values()) >= 2


def _ways(module: nn.Module) -> Sequence[Way] | str:
    code = inspect.unwrap(type(module).forward).__code__
    if any(step.opname == "STORE_ATTR" for step in dis.get_instructions(code)):
        return "its forward keeps something"
    for name, child in rms_norms(module).items():
        reason = why_not_swapped(child)
        if reason is not None:
            return f"its {name} stays as it is: {reason}"
    lists = [name for name, child in _others(module).items() if isinstance(child, LISTS)]
    if lists:
        return f"its {lists[0]} is a list of layers"
    return (Way("add_rms_norm", "add_rms_norm", Residual),)


def _alike(module: nn.Module) -> Hashable:
    """A layer's number among its like is no difference, if its forward does not read it."""
    read = names_in(type(module).forward)
    own = tuple((name, value) for name, value in facts(module) if name != "layer_idx" or name in read)
    norms = rms_norms(module)
    children = tuple(
        (name, type(child), facts(child) if name in norms else None) for name, child in module._modules.items()
    )
    return own, children


class StandIn(nn.Module):
    """In the place of a child: what it is given, times a vector, as the first of so many results."""

    # to those who ask, it is of the child's class
    __class__ = property(lambda self: type(self.child))

    def __init__(self, child: nn.Module, vector: Tensor, returns: int) -> None:
        super().__init__()
        self.__dict__.update(child=child, vector=vector, returns=returns)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["child"], name)

    def forward(self, *args: Any, **named: Any) -> Any:
        given = [x for x in (*args, *named.values()) if isinstance(x, Tensor) and x.shape[-1:] == self.vector.shape]
        if not given:
            raise TypeError("a child is given nothing like the layer's input")
        y = given[0] * self.vector
        return y if self.returns == 1 else (y, *[None] * (self.returns - 1))


class CountingNorm(norm.RMSNorm, nn.Module):
    """In the place of a norm that could be ours: counts the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = 0

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return x
        self.sums += 1
        return x + residual, x + residual


def _call(layer: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Its forward, past a checkpoint around it, given as little as it takes; the tensors that it returns."""
    named = {}
    for name, parameter in list(inspect.signature(type(layer).forward).parameters.items())[2:]:
        if "position_embeddings" in name:
            named[name] = (x.new_ones(1), x.new_ones(1))
        elif parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            named[name] = None
    made = layer.forward(x, **named)
    return tuple(y for y in (made if isinstance(made, tuple) else (made,)) if isinstance(y, Tensor))


class Body:
    """A layer's code over stand-ins."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.norms = rms_norms(module)
        self.others = _others(module)
        width = shape_of(next(iter(self.norms.values())).weight)[0]
        own = {name: shape_of(p) for name, p in module._parameters.items() if p is not None}
        shapes = {"x": (ROWS, 3, width)} | own
        shapes |= dict.fromkeys((f"{name}.weight" for name in self.norms), (width,))
        shapes |= dict.fromkeys((f"{name}.vector" for name in self.others), (width,))
        self.tensors = {name: randn(1 + i, *shape) for i, (name, shape) in enumerate(shapes.items())}
        self.returns = self._returns()

    def run(self, cls: type[nn.Module], norm_of: Callable[[str, Mapping[str, Tensor]], nn.Module]) -> Run:
        """``norm_of``: what stands for a norm, over the tensors that it is run on."""
        return lambda tensors: self._called(cls, norm_of, self.returns, tensors)

    def _called(self, cls: type[nn.Module], norm_of: Callable, returns: Iterable[int], tensors: Mapping) -> tuple:
        children = {name: norm_of(name, tensors) for name in self.norms}
        for (name, child), count in zip(self.others.items(), returns, strict=True):
            children[name] = StandIn(child, tensors[f"{name}.vector"], count)
        return _call(replica(self.module, cls, tensors, {}, children), tensors["x"])

    def _returns(self) -> tuple[int, ...]:
        """How many things each child returns, as the layer's code takes them."""
        may = [RETURNS if child._modules else (1,) for child in self.others.values()]
        if sum(each is RETURNS for each in may) > MOST_CHILDREN:
            raise ValueError(f"more than {MOST_CHILDREN} of its children may return several things")
        why: dict[str, None] = {}
        for returns in itertools.product(*may):
            try:
                self._called(type(self.module), lambda *_: nn.Identity(), returns, self.tensors)
            except (TypeError, ValueError, AttributeError, RuntimeError) as error:
                why[str(error)] = None
                continue
            return returns
        raise ValueError("; ".join(why))


def _prove(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    built = fused_class(way.mixin, type(module), way.how)
    with undisturbed(CPU), torch.no_grad():
        body = Body(module)
        counters = {name: CountingNorm() for name in body.norms}
        body.run(built, lambda name, _: counters[name])(body.tensors)
    summed = [name for name, counter in counters.items() if counter.sums]
    if not summed:
        return "no sum of its own goes into one of its norms"
    forms = {name: form_of(child, dtype) for name, child in body.norms.items()}
    for name in summed:
        if isinstance(forms[name], str) or forms[name].mixin is not norm.RMSNorm:
            return f"its {name} is no norm that add_rms_norm computes"

    runs = (
        body.run(type(module), norms_over(body.norms, {})),
        body.run(built, norms_over(body.norms, forms)),
    )
    for x_dtype, weights in mixed(dtype):
        dtypes = {name: weights if name.endswith(".weight") else x_dtype for name in body.tensors}
        differs = compare(*runs, body.tensors, dtypes, device, may_refuse=x_dtype != weights)
        if differs is not None:
            return differs
    return None


LAYER = Kind(_recognises, _ways, _prove, _alike, certain=False, key="add_rms_norm")
