"""plan -> prove -> agree -> commit: which layer of a model becomes what, decided whole before anything changes."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from ds_fused.modules import NEEDS, OPS, switched
from ds_fused.modules.layers.tiled_mlp import Tiles
from ds_fused.modules.loss.head_weight import HeadWeight
from ds_fused.modules.swap import owner_of, why_not_swapped
from ds_fused.policies.arguments import check_choice, check_flags, check_model, check_wanted, place
from ds_fused.policies.kinds import ACTIVATION, ADAPTER, NORM, ROPE, Kind, Way, find, qk_norms, unproven
from ds_fused.policies.loss import claim_loss
from ds_fused.policies.recompute import Recomputing, claim_recompute, recomputing
from ds_fused.policies.report import Claim, Left, Report, counted
from ds_fused.policies.swap_claim import AttentionClaim, SwapClaim

# names of layers that a user would expect to be replaced: where they are of no kind that we know, the report says so
_EXPECTED = re.compile(r"(RMSNorm|LayerNorm|MLP|Experts)$")
TILED = "tiled_mlp"  # the JSON key of `tiles`
_NORMS = ("rms_norm", "add_rms_norm", "layer_norm", "group_norm", "gated_rms_norm")
_ROPES = ("rope", "rms_norm_rope")
_MLPS = ("glu", "relu2", "experts")
# op -> any of which `strict` is content with, where the op's key is on without being named
_ALTERNATIVES = {
    **dict.fromkeys(_NORMS, _NORMS),
    **dict.fromkeys(_ROPES, _ROPES),
    **dict.fromkeys(_MLPS, _MLPS),
    # not the other way round: a head whose logits are computed is what nobody wants to find out by its memory
    "cross_entropy": ("cross_entropy", "linear_cross_entropy"),
}


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
    tiles: int | tuple[int, int] | None = None,
    recompute: Recomputing | str | Mapping[str, object] = "full",
    agree: Callable[[dict], None] | None = None,
    **switches: object,
) -> Report:
    """Replace what fused kernels can do in ``model``, in place; ``report.restore()`` undoes it.

    ``wanted``: JSON key -> True, False or an object of options; only what it names is on. Without it those are
    on that a JSON block does not have to name.
    ``switches``: single keys on top: ``apply(model, rope=False, fused_linear_cross_entropy={"chunk_mb": 256})``.
    ``device``, ``dtype``: what the model will train in, where each replacement is compared with the original before it
    is used; the first parameter's when not given. Without ``verify`` that happens on the CPU, and only for layers that
    could be one of several forms.
    ``strict``: a key that is named and matches nothing is a ValueError; of those that are on without being named, a
    kind of layer of which none matches, unless one of its keys is named as off (adapters: where the model has some).
    ``logits``: after a fused loss, "defer" computes them when they are read, "keep" in the forward as well.
    ``eval``: "defer" fuses the loss of an evaluation too, "stock" leaves evaluation alone.
    ``weight``: how the weight of a head is reached where it is sharded.
    ``tiles``: in how many tiles of tokens replaced MLPs run, computed again in backward; whole where not given. A pair
    says also for how many tokens a tile is worth while: over fewer than two such, too, they run whole.
    ``recompute``: what layers keep under gradient checkpointing: "full", "attention", "matmuls", "auto", or an object,
    ``{"level": "auto", "keep_mb": 4096, "offload": True}``, the last for their inputs to wait in the host's memory
    (``"auto"``: where "keep_mb", or the memory, is too little for all that could be kept).
    ``agree``: called with the decisions (a JSON-able dict) before anything changes; raises where ranks differ.
    """
    started = time.perf_counter()
    check_model(model)
    check_wanted(wanted)
    check_flags(verify=verify, strict=strict)
    check_choice("logits", logits, ("defer", "keep"))
    check_choice("eval", eval, ("defer", "stock"))
    device, dtype = place(model, device, dtype)
    keys = _keys(wanted, switches)
    on, named = list(keys), {**(wanted or {}), **switches}
    tiles = _checked(tiles)
    if not isinstance(recompute, Recomputing):
        recompute = recomputing(recompute, "apply: recompute")
    # a layer has one class, and what is not computed again is worth more than a pass over its sum
    yields = not recompute.is_stock and keys.pop("add_rms_norm", None) is not None
    planned = plan(model, keys, logits=logits, eval=eval, weight=weight, tiles=tiles)

    outcomes = [_outcome(claim, device, dtype, verify) for claim in planned.claims]
    # what a layer turned out to be may be what nobody asked for
    claims = [c for c, differs in zip(planned.claims, outcomes, strict=True) if differs is None and c.key in keys]
    left = list(planned.left)
    for claim, differs in zip(planned.claims, outcomes, strict=True):
        if differs is not None:
            left.append(Left(_short(claim.original), len(claim.paths), differs))

    left += _left_apart(planned.claims)
    if yields:
        left.append(Left("add_rms_norm", 1, "recompute has the layers"))
    if tiles is not None and not any(isinstance(claim, SwapClaim) and claim.tiles for claim in claims):
        left.append(Left(TILED, 1, "no gated MLP is replaced, and only such run in tiles"))

    if agree is not None:
        agree(_digest(planned, outcomes))
    if strict:
        _all_matched(model, on, named, claims, left)
    kept, not_kept = claim_recompute(model, recompute, {path for claim in claims for path in claim.paths})
    claims, left = [*claims, *kept], [*left, *not_kept]
    _commit(claims)
    return Report(model, tuple(claims), tuple(left), time.perf_counter() - started)


def plan(
    model: nn.Module,
    wanted: Mapping[str, Mapping[str, object]],
    *,
    logits: str = "defer",
    eval: str = "defer",
    weight: HeadWeight = HeadWeight(),  # noqa: B008 (frozen)
    tiles: Tiles | None = None,
) -> Plan:
    """All claims on a model and all that is left, with reasons. ``wanted``: JSON key that is on -> its options.

    Changes nothing. Two claims on one layer are a ValueError.
    """
    alike: dict[tuple, SwapClaim] = {}
    left: Counter[tuple[str, str]] = Counter()
    inside: set[int] = set()  # activations that a claimed layer no longer calls, and what is no layer
    heads: set[int] = set()  # norms that a claimed layer may have wait
    off = _off(qk_norms.KEY, wanted)
    with_norms = qk_norms.KEY in wanted and not off
    if qk_norms.KEY in wanted and off:
        left[qk_norms.KEY, f"it needs {' and '.join(NEEDS[qk_norms.KEY])}, and {' and '.join(off)} is off"] += 1
    for path, module in model.named_modules():
        kind = find(module)
        if isinstance(module, torch.jit.ScriptModule):
            if _EXPECTED.search(module.original_name):
                left[module.original_name, why_not_swapped(module)] += 1
            continue
        if isinstance(module, ParametrizationList):
            # functions of a weight, whatever they are called
            inside.update(map(id, module.modules()))
        if not path or id(module) in inside:
            continue  # the root keeps its class: its name goes into saved configs and sharding plans
        ways = _ways(kind, module, wanted)
        if isinstance(ways, str):
            left[_class_name(module), ways] += 1
        elif ways:
            inside.update(
                id(child) for child in module._modules.values() if child is not None and find(child) is ACTIVATION
            )
            claim, alike_in = SwapClaim, kind.alike
            if with_norms and kind is ROPE and (norms := qk_norms.of_heads(module)):
                claim, alike_in = AttentionClaim, qk_norms.alike
                heads.update(map(id, norms))
            elif kind is NORM and id(module) in heads:
                ways = qk_norms.waiting(ways)
            what = (type(module), tuple(ways), alike_in(module))
            if what not in alike:
                alike[what] = claim(kind, ways, model, tiles)
            alike[what].add(path, module)

    loss, loss_left = claim_loss(model, wanted, logits=logits, eval=eval, weight=weight)
    claims = (*alike.values(), *loss)
    left_whole = counted(left)
    _no_conflict(claims)
    return Plan(claims, (*left_whole, *loss_left))


def _checked(tiles: int | tuple[int, int] | None) -> Tiles | None:
    if tiles is None:
        return None
    both = tiles if isinstance(tiles, tuple) else (tiles, 1)
    if len(both) != 2 or not all(type(number) is int and number >= 1 for number in both):
        raise ValueError(f"apply: tiles is {tiles!r}; it must be a whole number, at least 1, or a pair of such")
    return Tiles(*both)


def _ways(kind: Kind | None, module: nn.Module, wanted: Mapping[str, object]) -> Sequence[Way] | str:
    """The ways to replace a layer; or why it stays; () where none is wanted or nobody would expect one."""
    if kind is not None and kind.key is not None:
        if kind.key not in wanted:
            return ()
        off = _off(kind.key, wanted)
        if off:
            return f"{kind.key} needs {' and '.join(off)}, which is off"
    if kind is None:
        # what holds layers that we know is no layer itself
        expected = any(_EXPECTED.search(cls.__name__) for cls in type(module).__mro__)
        if not expected or any(find(child) for child in module.modules()):
            return ()
    owner = owner_of(type(module))
    if owner is not None:
        return f"{owner} has replaced it"
    if kind is None:
        return "it is of no form that an op could replace"
    ways = why_not_swapped(module) or kind.ways(module)
    if not isinstance(ways, str):
        ways = [way for way in ways if way.key in wanted or not way.asked]
    # all of them, if any is wanted: which it is decides the comparison, not the switch
    return ways if isinstance(ways, str) or any(way.key in wanted for way in ways) else ()


def _off(key: str, wanted: Mapping[str, object]) -> list[str]:
    """Of what it needs, that which is off."""
    return [need for need in NEEDS[key] if need not in wanted]


def _left_apart(claims: Sequence[Claim]) -> list[Left]:
    """Layers that became less than a key of its own asked for (experts in one op, norms of q and k with their
    rotation), one row for each reason."""
    rows: Counter[tuple[str, str]] = Counter()
    for claim in claims:
        if isinstance(claim, SwapClaim) and claim.apart is not None:
            rows[_short(claim.original), ": ".join(claim.apart)] += len(claim.paths)
    return counted(rows)


def _keys(wanted: Mapping[str, object] | None, switches: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The JSON keys that are on, with their options; anything unknown is a ValueError that names the known."""
    options = {key: op.options for op in OPS for key in op.keys}
    asked = switched(switches) if wanted is None else dict(wanted)
    asked.update(switches)
    on: dict[str, dict[str, object]] = {}
    for key, value in asked.items():
        if key not in options:
            hint = " (here it is tiles=, a number of tiles)" if key == TILED else ""
            raise ValueError(f"apply: there is no {key!r}{hint}; there are {', '.join(options)}")
        if not isinstance(value, (bool, Mapping)):
            raise ValueError(f"apply: {key} is {value!r}; it can be True, False or an object of options")
        if value is False:
            continue
        on[key] = {} if value is True else dict(value)
        for name, given in on[key].items():
            if name not in options[key]:
                known = ", ".join(options[key]) or "none"
                raise ValueError(f"apply: {key} has no option {name!r}; it has {known}")
            kind, least = options[key][name].type, options[key][name].least
            if type(given) is not kind:
                raise ValueError(f"apply: {key}.{name} is {given!r}; it takes {kind.__name__}")
            if kind is int and given < least:
                raise ValueError(f"apply: {key}.{name} is {given!r}; it must be at least {least}")
            choices = options[key][name].choices
            if choices and given not in choices:
                raise ValueError(f"apply: {key}.{name} is {given!r}; it can be {', '.join(map(repr, choices))}")
    return on


def _outcome(claim: Claim, device: torch.device, dtype: torch.dtype, verify: bool) -> str | None:
    if not verify:
        if not isinstance(claim, SwapClaim) or claim.certain:
            return None
        device = torch.device("cpu")  # which of the forms it is has to be found out anyway
    try:
        # whatever the caller's default device: what is made for a proof is drawn on the CPU
        with torch.device("cpu"):
            return claim.prove(device, dtype)
    except Exception as error:
        return unproven(error)


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


def _no_conflict(claims: Sequence[Claim]) -> None:
    taken: dict[str, Claim] = {}
    for claim in claims:
        for path in claim.paths:
            other = taken.setdefault(path, claim)
            if other is not claim:
                both = f"{other.key} -> {other.replacement}, {claim.key} -> {claim.replacement}"
                raise ValueError(f"apply: {path} is claimed twice: {both}")


def _all_matched(
    model: nn.Module, on: Sequence[str], named: Mapping[str, object], claims: Sequence[Claim], left: Sequence[Left]
) -> None:
    """``strict``: every key that is named has work. Of those that are on without being named, keys of one op are
    alternatives (a model is swiglu or geglu), and so are norms, MLPs with and without a gate, and rotations with and
    without norms: where one is named as off, the others may well have no work. A head's loss has no alternative.
    Adapters are no part of most models."""
    # what does the work of two is work of both
    matched = {key for claim in claims for key in (claim.key, *NEEDS[claim.key])}
    matched |= {claim.instead_of for claim in claims if isinstance(claim, SwapClaim)}
    will_do = matched | {key for key, value in named.items() if value is False}
    if not any(map(ADAPTER.recognises, model.modules())):
        will_do.add(ADAPTER.key)
    missed = [key for key in on if (key not in matched if key in named else will_do.isdisjoint(_alternatives(key)))]
    if missed:
        reasons = "".join(f"\n  {row.count} x {row.what}: {row.reason}" for row in left)
        raise ValueError(f"apply: strict, and nothing matched {', '.join(missed)}{reasons}")


def _alternatives(key: str) -> list[str]:
    """The keys any of which will do, itself among them."""
    name = next(op.name for op in OPS if key in op.keys)
    return [other for op in OPS if op.name in _ALTERNATIVES.get(name, (name,)) for other in op.keys]


def _digest(planned: Plan, outcomes: Sequence[str | None]) -> dict[str, object]:
    """The decisions, for comparison between ranks. By how much something differed is said with them, not compared."""
    claims = [
        {
            "key": c.key,
            "original": c.original,
            "replacement": c.replacement,
            # of several forms of one op
            "form": repr(c.way) if isinstance(c, SwapClaim) else None,
            "paths": list(c.paths),
            "proven": outcome is None,
            "why": None if outcome is None else f"{_short(c.original)}: {outcome}",
        }
        for c, outcome in zip(planned.claims, outcomes, strict=True)
    ]
    return {"claims": claims, "left": [[row.what, row.count, row.reason] for row in planned.left]}


def _class_name(module: nn.Module) -> str:
    return type(module).__name__


def _short(name: str) -> str:
    return name.rpartition(".")[2]
