"""What a kind of layer is: how one is recognised, the ways to replace it, and the choice between them.

No name of a class or file is trusted, and no table of families is kept. A kind recognises a layer by what it has (its
parameters, children, arguments), and lists the ways in which an op could do its work. Which of them does, the proof
finds: the first whose outputs and gradients are the layer's on random data. So a new family needs no line here, a new
body is one more way, and a layer that no way fits stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ds_fused.modules.swap import fused_class
from ds_fused.policies.proof import Run, compare, facts, replica


@dataclass(frozen=True)
class Way:
    """One way to replace a layer."""

    key: str  # the JSON key that switches it
    op: str  # the word in the report
    mixin: type
    state: tuple[tuple[str, object], ...] = ()  # what the mix-in finds on the layer: name, value
    how: tuple = ()  # what it is built with
    asked: bool = False  # whether it is one only where its own key is on


Proof = Callable[[nn.Module, Way, torch.device, torch.dtype], "str | None"]


@dataclass(frozen=True)
class Kind:
    recognises: Callable[[nn.Module], bool]  # by its looks
    ways: Callable[[nn.Module], Sequence[Way] | str]  # the likelier first; or the reason why there are none
    prove: Proof  # what a replacement would compute otherwise; None where nothing
    alike: Callable[[nn.Module], Hashable] = facts  # layers of one class for which it is equal share one proof
    given: frozenset[str] = frozenset()  # attributes that the proof gives its copies, whatever the layer holds
    # whether all that is to be compared is compared on the CPU, and on the device what shows its kernels alone: there
    # each operation costs ten times as much of the host
    in_two: bool = False
    certain: bool = True  # whether a single way needs no proof where nobody asks for one
    key: str | None = None  # the JSON key without which such layers are of no interest


def choose(kind: Kind, module: nn.Module, ways: Sequence[Way], device: torch.device, dtype: torch.dtype) -> Way | str:
    """The first way that computes what the layer does, or what differed."""
    cpu = torch.device("cpu")
    # of several, the wrong ones fall out on the CPU, where no kernel has to be compiled for them
    places = (device,) if len(ways) == 1 and not kind.in_two else dict.fromkeys((cpu, device))
    reasons = []
    for way in ways:
        differs = next((reason for place in places if (reason := _differs(kind, module, way, place, dtype))), None)
        if differs is None:
            return way
        reasons.append(differs)
    if len(ways) == 1:
        return reasons[0]
    # of the way that layers of this kind mostly are, unless nothing can be said of that one
    compared = [reason for reason in reasons if not reason.startswith(_UNPROVEN)]
    first = "the first" if compared[:1] in ([], reasons[:1]) else "the first that can be compared"
    return f"none of {len(ways)} known forms fits; of {first}, {(compared or reasons)[0]}"


def _differs(kind: Kind, module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        return kind.prove(module, way, device, dtype)
    except Exception as error:
        return unproven(error)


_UNPROVEN = "it can't be compared"


def unproven(error: Exception) -> str:
    """Whatever it was: a layer that can't be compared is a layer that stays as it is, and the report says why."""
    return f"{_UNPROVEN}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def both(
    module: nn.Module, way: Way, call: Callable[[nn.Module, Mapping[str, Tensor]], Tensor], **given: object
) -> tuple[Run, Run]:
    """``call`` of a copy of the layer over the tensors that it is run on: stock, and replaced.

    ``given``: attributes of both copies.
    """
    cls = type(module)
    built = fused_class(way.mixin, cls, way.how)
    return (
        lambda tensors: call(replica(module, cls, tensors, given), tensors),
        lambda tensors: call(replica(module, built, tensors, {**given, **dict(way.state)}), tensors),
    )


def parameter_names(module: nn.Module) -> list[str]:
    """Of the forward, self left out."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def one_argument(module: nn.Module) -> str | None:
    """Why not, where a forward takes more than its input: the replacement would refuse the rest."""
    names = parameter_names(module)
    return None if len(names) == 1 else f"its forward takes ({', '.join(names)}), not one tensor"


def shape_of(parameter: Tensor) -> tuple[int, ...]:
    """The whole shape, also of a parameter that zero.Init has split."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def mixed(dtype: torch.dtype) -> Iterable[tuple[torch.dtype, torch.dtype]]:
    """Of activations and of what meets them, to be tried for a model of ``dtype``.

    fp32 tells formulas apart that 16 bits would round together. Under autocast, or where some parameters stay in fp32,
    the two differ, which decides the dtype of a result; a model in fp32 can come under autocast at any time.
    """
    low = torch.bfloat16 if dtype == torch.float32 else dtype
    return dict.fromkeys(((torch.float32, torch.float32), (dtype, dtype), (low, torch.float32)))


def compared(
    runs: tuple[Run, Run], tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype
) -> str | None:
    """What differs in fp32, or in ``dtype``."""
    for each in dict.fromkeys((torch.float32, dtype)):
        differs = compare(*runs, tensors, dict.fromkeys(tensors, each), device)
        if differs is not None:
            return differs
    return None
