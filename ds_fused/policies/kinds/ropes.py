"""Attention layers, by the rotary functions that their forwards call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn

from ds_fused.modules.code import Code
from ds_fused.modules.layers.attention import Rope, rotary_functions
from ds_fused.modules.layers.rotary import TURNS, Turn, fused_rotary, roles_of, takes
from ds_fused.modules.swap import owner_of
from ds_fused.policies.kinds.kind import Kind, Way, mixed
from ds_fused.policies.proof import accepts, compare, randn

# sizes of the proof: no two alike, so that dimensions can't be mistaken for each other
BATCH, TOKENS, HEADS, KEY_HEADS, WIDTH = 2, 5, 4, 3, 16


def _recognises(module: nn.Module) -> bool:
    return bool(rotary_functions(type(module)))


def _ways(module: nn.Module) -> Sequence[Way] | str:
    functions = rotary_functions(type(module))
    for name, stock in functions.items():
        owner = owner_of(stock)
        if owner is not None:
            return f"{owner} has replaced {name}"
        if roles_of(stock) is None:
            return f"its {name} takes {inspect.signature(stock)}"
    turns = [[turn for turn in TURNS if _fits(stock, turn)] for stock in functions.values()]
    return [Way("rope", "rope", Rope, how=tuple(zip(functions, each, strict=True))) for each in product(*turns)]


def _fits(stock: Callable, turn: Turn) -> bool:
    """Whether a function with these parameters could turn so."""
    roles = roles_of(stock).values()
    if "unsqueeze_dim" in roles and turn.heads_dim != 1:
        return False  # it is told where the heads are
    return ("angles" in roles) == (turn.angles == "complex")


def _prove(module: nn.Module, way: Way, device: torch.device, dtype: torch.dtype) -> str | None:
    """The forward's code is the original's own, so what has to be proven are the functions that were exchanged."""
    functions = rotary_functions(type(module))
    for name, turn in way.how:
        reason = differs(functions[name], turn, device, dtype)
        if reason is not None:
            return reason
    return None


def differs(stock: Callable, turn: Turn, device: torch.device, dtype: torch.dtype) -> str | None:
    """What a function computes otherwise than ``rope`` with this turn. Remembered until somebody patches its code."""
    return _differs(stock, turn, device, dtype, Code(stock))


# the ways of a layer that calls two functions are all pairs of theirs
@functools.cache
def _differs(stock: Callable, turn: Turn, device: torch.device, dtype: torch.dtype, code: Code) -> str | None:
    roles = roles_of(stock)
    all_dtypes = list(mixed(dtype))
    dtypes_of_case = all_dtypes
    for tensors, heads_dim in _cases(turn, single="k" not in roles.values(), told="unsqueeze_dim" in roles.values()):
        given = _laid_out(tensors, heads_dim)
        runs = [_caller(function, roles, heads_dim) for function in (stock, fused_rotary(stock, turn))]
        # where the original refuses, no such call can reach ours; what ours hands on to the original proves nothing
        if not takes(given["q"], given.get("k"), given["cos"], heads_dim) or not accepts(runs[0], tensors):
            continue
        for x_dtype, angle_dtype in dtypes_of_case:
            dtypes = {name: x_dtype if name in ("q", "k") else angle_dtype for name in tensors}
            turned = [name for name in ("q", "k") if name in tensors]
            reason = compare(*runs, tensors, dtypes, device, gradients=turned)
            if reason is not None:
                return reason
        # the dtype of a result and where it is rounded don't depend on shapes: once is enough
        dtypes_of_case = [(dtype, dtype)]
        if device.type != "cpu":
            break
    return None if dtypes_of_case is not all_dtypes else "it takes none of the shapes that rope does"


def _cases(turn: Turn, *, single: bool, told: bool) -> Iterator[tuple[dict[str, Tensor], int]]:
    """Inputs, and where their heads are. Angles are any numbers: what turns these turns all rotations."""
    batches, dims = ((BATCH, 1), (1, 2)) if told else ((BATCH, 1, None), (turn.heads_dim,))
    for rotary, batch, heads_dim in product((WIDTH, WIDTH // 2), batches, dims):
        columns = rotary // 2 if turn.angles in ("once", "complex") else rotary
        lead, angles = ([], []) if batch is None else ([BATCH], [batch])
        tensors = {
            # as projections leave them
            "q": randn(2, *lead, TOKENS, HEADS, WIDTH),
            "k": randn(3, *lead, TOKENS, KEY_HEADS, WIDTH),
            "cos": randn(4, *angles, TOKENS, columns),
            "sin": randn(5, *angles, TOKENS, columns),
        }
        if single:
            del tensors["k"]
        yield tensors, heads_dim


def _laid_out(tensors: Mapping[str, Tensor], heads_dim: int) -> dict[str, Tensor]:
    """q and k as attention makes them: views, with heads in front of tokens, or as projections leave them."""
    return {n: t.transpose(-3, -2) if n in ("q", "k") and heads_dim == 1 else t for n, t in tensors.items()}


def _caller(function: Callable, roles: Mapping[str, str], heads_dim: int) -> Callable:
    def run(tensors: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        cos, sin = tensors["cos"], tensors["sin"]
        wide = torch.promote_types(cos.dtype, torch.float32)
        given = _laid_out(tensors, heads_dim)
        given |= {"unsqueeze_dim": heads_dim, "angles": torch.complex(cos.to(wide), sin.to(wide))}
        return function(**{name: given[role] for name, role in roles.items() if role in given})

    return run


ROPE = Kind(_recognises, _ways, _prove, alike=lambda _: None, in_two=True)
