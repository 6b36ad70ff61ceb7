"""Which layers keep a part of their forward under gradient checkpointing, or have their inputs wait on the host: those
that transformers would checkpoint."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ds_fused.modules import Option, say
from ds_fused.modules.memory.allotment import Allotment, Auto, Fixed
from ds_fused.modules.memory.kept import Learnt
from ds_fused.modules.memory.offload import Offload
from ds_fused.modules.memory.recompute import FUNCTION, Recompute, may_be_checkpointed
from ds_fused.modules.swap import qualified_name, swap, unswap_all, why_not_swapped
from ds_fused.policies.arguments import near, shown
from ds_fused.policies.report import Left

KEY = "recompute"
OPTIONS: Mapping[str, Option] = {
    "level": Option(
        str,
        "full",
        'what is not computed again in backward: nothing, with "attention" its outputs, with "matmuls" those of '
        'products as well; "auto" keeps what there is memory for, and so does "fit"',
        # Trainer and Accelerate take every "auto" in the JSON for a placeholder of their own, and fail
        ("full", "attention", "matmuls", "auto", "fit"),
    ),
    "keep_mb": Option(
        int,
        None,
        'MiB that "auto" may keep in a forward; 0: nothing, but what nobody reads is not computed again; null: what '
        "the first steps find room for",
    ),
    "offload": Option(
        bool,
        False,
        "inputs of checkpointed layers, and what is kept of attention, wait in the host's memory; "
        '"auto" and "fit": where memory has no room for all that level "auto" would keep',
        (True, False, "auto", "fit"),
    ),
}
log = logging.getLogger("ds_fused")


@dataclass(frozen=True)
class Recomputing:
    """The key's value, found well-formed."""

    level: str = "full"
    keep_mb: int | None = None
    offload: bool | str = False  # or "auto"

    @property
    def is_stock(self) -> bool:
        return self.level == "full" and not self.offload

    @property
    def makes_room(self) -> bool:
        """Whether layers of one stack share the memory that there is."""
        return self.level == "auto" and self.keep_mb != 0


def recomputing(value: object, where: str = "recompute") -> Recomputing:
    """Of a level or an object of options; ValueError where it is neither. ``where`` is its name in the message."""
    given = {"level": value} if isinstance(value, str) else value
    levels = " or ".join(f'"{level}"' for level in OPTIONS["level"].choices)
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must be {levels} or an object of {', '.join(OPTIONS)}, got {shown(value)}")
    for name in given:
        if name not in OPTIONS:
            known = f"known keys: {', '.join(OPTIONS)}"
            raise ValueError(f"{where}: unknown key {name!r}{near(name, OPTIONS)}; {known}")
    keep_mb, offload = given.get("keep_mb"), given.get("offload", False)
    level = given.get("level", "full" if keep_mb is None else "auto")
    level = "auto" if level == "fit" else level
    if level not in OPTIONS["level"].choices:
        of_level = where if isinstance(value, str) else f"{where}.level"
        raise ValueError(f"{of_level} must be {levels}, got {shown(level)}")
    if keep_mb is not None and (type(keep_mb) is not int or keep_mb < 0):
        raise ValueError(f"{where}.keep_mb must be an integer, at least 0, got {shown(keep_mb)}")
    if keep_mb is not None and level != "auto":
        raise ValueError(f'{where}.keep_mb is for the level "auto", got it with {level!r}')
    if type(offload) is not bool and offload not in ("auto", "fit"):
        raise ValueError(f'{where}.offload must be true or false or "auto" or "fit", got {shown(offload)}')
    wanted = Recomputing(level, keep_mb, offload if type(offload) is bool else "auto")
    if wanted.offload == "auto" and not wanted.makes_room:
        beside = f"level {level!r}" if keep_mb is None else f"keep_mb {keep_mb}"
        raise ValueError(f'{where}.offload {offload!r} goes by the room that level "auto" finds, got it with {beside}')
    return wanted


@dataclass(eq=False)
class RecomputeClaim:
    """Layers of one class in one stack."""

    paths: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    places: tuple[int, ...]  # of each among the layers of its stack
    allotment: Allotment | None
    offload: Offload | None
    key: str = KEY

    @property
    def original(self) -> str:
        return qualified_name(type(self.modules[0]))

    @property
    def replacement(self) -> str:
        said = [] if self.allotment is None else [str(self.allotment)]
        if self.offload is not None and not isinstance(self.allotment, Auto):
            said.append("inputs, and what is kept of attention, wait in the host's memory")
        return f"under gradient checkpointing: {'; '.join(said)}"

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        # nothing is computed otherwise
        return None

    def commit(self) -> None:
        try:
            for module, place in zip(self.modules, self.places, strict=True):
                swap(
                    module, Recompute, fused_place=place, fused_learnt=Learnt(),
                    fused_allotment=self.allotment, fused_offload=self.offload,
                    fused_function=vars(module).get(FUNCTION),
                )  # fmt: skip
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        unswap_all(self.modules)

    def in_place(self) -> bool:
        return all(isinstance(module, Recompute) for module in self.modules)

    def watched(self) -> tuple[type, ...]:
        # whether layers are checkpointed is the user's choice
        return ()


def claim_recompute(
    model: nn.Module, wanted: Recomputing, taken: Collection[str]
) -> tuple[list[RecomputeClaim], list[Left]]:
    """What the layers of ``model`` become; ``taken`` are the paths of layers that something else replaces."""
    if wanted.is_stock:
        return [], []
    stacks: dict[str, list[tuple[str, nn.Module]]] = {}
    left: Counter[tuple[str, str]] = Counter()
    for path, module in _checkpointed(model):
        reason = why_not_swapped(module) or ("something else replaces it" if path in taken else None)
        if reason is not None:
            left[type(module).__name__, reason] += 1
        else:
            stacks.setdefault(path.rpartition(".")[0], []).append((path, module))
    if not stacks:
        left[KEY, "no layer of those that transformers would checkpoint"] += 1
    elif wanted.makes_room:
        # the room is one, and what a forward through one stack leaves of it for the next is not known beforehand
        largest = max(stacks, key=lambda stack: len(stacks[stack]))
        for _, module in (layer for stack in stacks.keys() - {largest} for layer in stacks[stack]):
            left[type(module).__name__, "room is made in the largest stack only"] += 1
        stacks = {largest: stacks[largest]}
    claims = [claim for layers in stacks.values() for claim in _claims(layers, wanted)]
    return claims, [Left(what, count, f"{KEY}: {reason}") for (what, reason), count in left.items()]


def _checkpointed(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and layer; of layers within one another the outermost."""
    within: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if may_be_checkpointed(type(module)) and not path.startswith(within):
            within = (*within, f"{path}.")
            yield path, module


def _claims(layers: Sequence[tuple[str, nn.Module]], wanted: Recomputing) -> list[RecomputeClaim]:
    """Of one stack, a claim for each class."""
    if wanted.makes_room:
        room = None if wanted.keep_mb is None else wanted.keep_mb * 2**20
        allotment = Auto(len(layers), room, _tell, on_host=None if wanted.offload == "auto" else wanted.offload)
    elif wanted.level == "full":
        allotment = None
    else:
        allotment = Fixed("full" if wanted.level == "auto" else wanted.level)
    offload = Offload() if wanted.offload else None
    places: dict[type, list[int]] = {}
    for place, (_, module) in enumerate(layers):
        places.setdefault(type(module), []).append(place)
    return [
        RecomputeClaim(
            paths=tuple(layers[place][0] for place in alike),
            modules=tuple(layers[place][1] for place in alike),
            places=tuple(alike),
            allotment=allotment,
            offload=offload,
        )
        for alike in places.values()
    ]


def _tell(line: str) -> None:
    # each rank decides for itself; the first one's is said
    say(f"ds_fused: recompute: {line}")
