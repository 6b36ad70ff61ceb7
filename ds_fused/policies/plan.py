"""plan -> prove -> agree -> commit: which layer of a model becomes what, decided whole before anything changes."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ds_fused.modules import OPS
from ds_fused.modules.scope import HeadWeight
from ds_fused.modules.swap import fused_class, is_fused, patched_by, swap, unswap, why_not
from ds_fused.modules.tiled_mlp import TILED
from ds_fused.policies.bodies import Body
from ds_fused.policies.families import find
from ds_fused.policies.loss import claim_loss
from ds_fused.policies.report import Claim, Left, Report

# names of layers that a user would expect to be replaced: where the table has none for them, the report says so
_EXPECTED = re.compile(r"(RMSNorm|MLP|Experts)$")


@dataclass(frozen=True)
class Plan:
    claims: tuple[Claim, ...]
    left: tuple[Left, ...]


def apply(
    model: nn.Module,
    wanted: Mapping[str, object] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    strict: bool = False,
    logits: str = "defer",
    eval: str = "defer",
    weight: HeadWeight = HeadWeight(),  # noqa: B008 (frozen)
    tiles: int | None = None,
    agree: Callable[[dict], None] | None = None,
    **switches: object,
) -> Report:
    """Replace what fused kernels can do in ``model``, in place; ``report.restore()`` undoes it.

    ``wanted``: JSON key -> True, False or an object of options; only what it names is on. Without it everything is on.
    ``switches``: single keys on top: ``apply(model, rope=False, fused_linear_cross_entropy={"chunk_mb": 256})``.
    ``device``, ``dtype``: what the model will train in, where each replacement is compared with the original before it
    is used (``verify``); the first parameter's when not given.
    ``strict``: a requested kind that matches nothing is a ValueError.
    ``logits``: after a fused loss, "defer" computes them when they are read, "keep" in the forward as well.
    ``eval``: "defer" fuses the loss of an evaluation too, "stock" leaves evaluation alone.
    ``weight``: how the weight of a head is reached where it is sharded.
    ``tiles``: in how many tiles of tokens replaced MLPs run, computed again in backward; whole where not given.
    ``agree``: called with the decisions (a JSON-able dict) before anything changes; raises where ranks differ.
    """
    started = time.perf_counter()
    keys = _keys(wanted, switches)
    for name, value, known in (("logits", logits, ("defer", "keep")), ("eval", eval, ("defer", "stock"))):
        if value not in known:
            raise ValueError(f"apply: {name} is {value!r}; it can be {' or '.join(map(repr, known))}")
    if tiles is not None and (type(tiles) is not int or tiles < 1):
        raise ValueError(f"apply: tiles is {tiles!r}; it must be a whole number, at least 1")
    planned = plan(model, keys, logits=logits, eval=eval, weight=weight, tiles=tiles)

    device, dtype = _place(model, device, dtype)
    outcomes = [_outcome(claim, device, dtype) if verify else None for claim in planned.claims]
    claims = [claim for claim, differs in zip(planned.claims, outcomes, strict=True) if differs is None]
    left = list(planned.left)
    for claim, differs in zip(planned.claims, outcomes, strict=True):
        if differs is not None:
            left.append(Left(_short(claim.original), len(claim.paths), differs))

    if tiles is not None and not any(isinstance(claim, SwapClaim) and claim.tiles for claim in claims):
        left.append(Left("tiled_mlp", 1, "no gated MLP is replaced, and only such run in tiles"))

    if agree is not None:
        agree(_digest(planned, outcomes))
    if strict:
        _all_matched(keys, claims, left)
    _commit(claims)
    return Report(model, tuple(claims), tuple(left), time.perf_counter() - started)


def plan(
    model: nn.Module,
    wanted: Mapping[str, Mapping[str, object]],
    *,
    logits: str = "defer",
    eval: str = "defer",
    weight: HeadWeight = HeadWeight(),  # noqa: B008 (frozen)
    tiles: int | None = None,
) -> Plan:
    """All claims on a model and all that is left, with reasons. ``wanted``: JSON key that is on -> its options.

    Changes nothing. Two claims on one layer are a ValueError.
    """
    alike: dict[tuple, SwapClaim] = {}
    left: Counter[tuple[str, str]] = Counter()
    unknown: Counter[tuple[str, str]] = Counter()
    known = False
    for path, module in model.named_modules():
        body = find(type(module))
        if not path:
            continue  # the root keeps its class: its name goes into saved configs and sharding plans
        if body is None:
            if _EXPECTED.search(type(module).__name__):
                owner = patched_by(module)
                reason = f"{owner} has replaced it" if owner else "no family names this class"
                unknown[_shown(module), reason] += 1
            continue
        known = True
        if isinstance(body, tuple):
            key, reason = body
            if key in wanted:
                left[_shown(module), reason] += 1
            continue
        if not any(key in wanted for key in body.keys):
            continue
        reading = why_not(module) or body.read(module)
        if isinstance(reading, str):
            left[_shown(module), reading] += 1
        elif reading.key in wanted:
            kind = (reading.key, type(module), body.name, tuple(reading.state.items()), body.alike(module))
            if kind not in alike:
                alike[kind] = SwapClaim(reading.key, body, reading.state, model, tiles)
            alike[kind].add(path, module)

    loss, loss_left = claim_loss(model, wanted, logits=logits, eval=eval, weight=weight)
    claims = (*alike.values(), *loss)
    left_whole = [Left(what, count, reason) for (what, reason), count in left.items()]
    left_whole += _strangers(model, unknown, known, fused_loss=bool(loss))
    _no_conflict(claims)
    return Plan(claims, (*left_whole, *loss_left))


class SwapClaim:
    """Layers of one class, alike in all that the proof depends on, and the body they get."""

    def __init__(
        self, key: str, body: Body, state: Mapping[str, object], model: nn.Module, tiles: int | None = None
    ) -> None:
        self.key = key
        self.paths: tuple[str, ...] = ()
        self.original = ""
        self.replacement = body.name
        self._body, self._state, self._model = body, dict(state), model
        self.tiles = tiles if body.mixin in TILED else None
        self._mixin, self._committed = body.mixin, self._state
        if self.tiles is not None:
            self.replacement += f" in {tiles} tiles"
            self._mixin, self._committed = TILED[body.mixin], {**self._state, "fused_tiles": tiles}
        self._modules: list[nn.Module] = []

    def add(self, path: str, module: nn.Module) -> None:
        self.paths += (path,)
        self._modules.append(module)
        self._cls = type(module)
        self.original = f"{self._cls.__module__}.{self._cls.__qualname__}"

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        # what runs tile by tile is what is proven; its copies have stub children, whose weights no tile would know
        return self._body.prove(self._modules[0], self._body.mixin, self._state, device, dtype)

    def commit(self) -> None:
        try:
            for module in self._modules:
                swap(module, self._mixin, **self._committed)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        for module in self._modules:
            if is_fused(module):
                unswap(module)

    def in_place(self) -> bool:
        there = {id(module) for module in self._model.modules()}
        return all(
            is_fused(module) and "forward" not in vars(module) and id(module) in there for module in self._modules
        )

    def watched(self) -> tuple[type, ...]:
        return (fused_class(self._mixin, self._cls),)


def _keys(wanted: Mapping[str, object] | None, switches: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The JSON keys that are on, with their options; anything unknown is a ValueError that names the known."""
    options = {key: op.options for op in OPS for key in op.keys}
    asked = dict.fromkeys(options, True) if wanted is None else dict(wanted)
    asked.update(switches)
    on: dict[str, dict[str, object]] = {}
    for key, value in asked.items():
        if key not in options:
            raise ValueError(f"apply: there is no {key!r}; there are {', '.join(options)}")
        if not isinstance(value, (bool, Mapping)):
            raise ValueError(f"apply: {key} is {value!r}; it can be True, False or an object of options")
        if value is False:
            continue
        on[key] = {} if value is True else dict(value)
        for name, given in on[key].items():
            if name not in options[key]:
                known = ", ".join(options[key]) or "none"
                raise ValueError(f"apply: {key} has no option {name!r}; it has {known}")
            kind = options[key][name].type
            if type(given) is not kind:
                raise ValueError(f"apply: {key}.{name} is {given!r}; it takes {kind.__name__}")
            choices = options[key][name].choices
            if choices and given not in choices:
                raise ValueError(f"apply: {key}.{name} is {given!r}; it can be {', '.join(map(repr, choices))}")
    return on


def _place(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where and in what to prove: as asked, else as the first floating parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if device is None:
        device = "cpu" if first is None or first.device.type == "meta" else first.device
    if dtype is None:
        dtype = torch.float32 if first is None or first.dtype.itemsize == 1 else first.dtype
    return torch.device(device), dtype


def _outcome(claim: Claim, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        return claim.prove(device, dtype)
    except Exception as error:
        # whatever it was: a layer that can't be compared is a layer that stays as it is, and the report says why
        return f"it can't be compared: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _commit(claims: Sequence[Claim]) -> None:
    """All or none."""
    done: list[Claim] = []
    try:
        for claim in claims:
            claim.commit()
            done.append(claim)
    except BaseException:
        for claim in reversed(done):
            claim.restore()
        raise


def _strangers(model: nn.Module, unknown: Counter, known: bool, *, fused_loss: bool) -> list[Left]:
    """What no line of the table covers: class by class, or in one line where it covers nothing of the model."""
    types = sorted({str(t) for m in model.modules() if (t := getattr(getattr(m, "config", None), "model_type", None))})
    if known or not types or any("has replaced it" in reason for _, reason in unknown):
        return [Left(what, count, reason) for (what, reason), count in unknown.items()]
    loss = "; the loss is fused anyway" if fused_loss else ""
    reason = f"no family known for model_type {', '.join(types)}: norms, rope and mlps left{loss}"
    return [Left(type(model).__name__, 1, reason)]


def _no_conflict(claims: Sequence[Claim]) -> None:
    taken: dict[str, Claim] = {}
    for claim in claims:
        for path in claim.paths:
            other = taken.setdefault(path, claim)
            if other is not claim:
                both = f"{other.key} -> {other.replacement}, {claim.key} -> {claim.replacement}"
                raise ValueError(f"apply: {path} is claimed twice: {both}")


def _all_matched(keys: Mapping[str, object], claims: Sequence[Claim], left: Sequence[Left]) -> None:
    """``strict``: every op that is on has work. Its keys are alternatives (a model is swiglu or geglu), and so are the
    two ways to the loss."""
    families = {key: "loss" if "cross_entropy" in op.name else op.name for op in OPS for key in op.keys}
    matched = {families.get(claim.key, claim.key) for claim in claims}
    missed = [key for key in keys if families[key] not in matched]
    if missed:
        reasons = "".join(f"\n  {row.count} x {row.what}: {row.reason}" for row in left)
        raise ValueError(f"apply: strict, and nothing matched {', '.join(missed)}{reasons}")


def _digest(planned: Plan, outcomes: Sequence[str | None]) -> dict[str, object]:
    """The decisions, for comparison between ranks. By how much something differed is said with them, not compared."""
    claims = [
        {
            "key": c.key,
            "original": c.original,
            "replacement": c.replacement,
            "paths": list(c.paths),
            "proven": outcome is None,
            "why": None if outcome is None else f"{_short(c.original)}: {outcome}",
        }
        for c, outcome in zip(planned.claims, outcomes, strict=True)
    ]
    return {"claims": claims, "left": [[row.what, row.count, row.reason] for row in planned.left]}


def _shown(module: nn.Module) -> str:
    return type(module).__name__


def _short(name: str) -> str:
    return name.rpartition(".")[2]
