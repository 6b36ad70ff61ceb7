"""The rotary functions of transformers' modelling files, each as one call of ``rope``.

They differ in which columns are a pair, in how cos and sin name a pair's angle, and in little more; a ``Turn`` says it.
The names of functions and files say nothing: Cohere's ``apply_rotary_pos_emb`` turns neighbours, nanochat's the other
way round. Each form is exact for any cos and sin, also for such as no rotation has.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ds_fused.modules.layers.postponed import computed
from ds_fused.modules.layers.qk_norm import Normed, turned_together
from ds_fused.ops import rope

# what the parameters of the functions are called -> what they are
ROLES = {
    **dict.fromkeys(("q", "xq", "query", "query_states", "x", "tensor", "hidden_states"), "q"),
    **dict.fromkeys(("k", "xk", "key", "key_states"), "k"),
    **dict.fromkeys(("freqs_cis", "freqs_ci"), "angles"),
    **{name: name for name in ("cos", "sin", "unsqueeze_dim", "position_ids")},
}


class Turn(NamedTuple):
    """How a function turns."""

    neighbours: bool = False  # pairs are columns 2i and 2i + 1, not i and i + R/2
    # where column c's angle is: "column" c; of pair p: "pair" p, in the first half of cos (its second is not read);
    # "once": p, and cos has but R/2 columns; "complex": p, cos and sin in one number
    angles: str = "column"
    halves: bool = False  # neighbours come out as i and i + R/2
    opposite: bool = False  # by -theta
    last: bool = False  # the last R columns turn, not the first
    keep_dtype: bool = False  # results have the dtype of q and k, whatever that of cos
    heads_dim: int = 1  # where the heads are in [B, H, T, D], if no argument says it


# in the order in which they are tried; of how many functions of transformers 5.17, which has 212
TURNS = (
    Turn(),  # Llama, 130
    Turn(keep_dtype=True, heads_dim=2),  # vision towers of Qwen2-VL, 22
    Turn(neighbours=True, angles="pair", halves=True),  # DeepSeek-V3, 9
    Turn(keep_dtype=True),  # OLMo 2, 10
    Turn(neighbours=True, keep_dtype=True),  # Cohere, 9
    Turn(neighbours=True, angles="pair"),  # GLM, 8
    Turn(neighbours=True, angles="pair", keep_dtype=True),  # Ernie 4.5, 2
    Turn(neighbours=True),  # GLM-4V, 3
    Turn(angles="once"),  # GPT-OSS, 2
    Turn(neighbours=True, angles="once"),  # GPT-OSS's privacy filter, 2
    Turn(neighbours=True, angles="once", heads_dim=2),  # GPT-J, 2
    Turn(neighbours=True, angles="once", last=True, keep_dtype=True),  # DeepSeek-V4, 1
    Turn(neighbours=True, angles="complex", keep_dtype=True, heads_dim=2),  # Llama 4, 1
    Turn(neighbours=True, angles="complex", keep_dtype=True),  # DeepSeek-V2, 1
    Turn(opposite=True),  # nanochat, 1
)


def roles_of(stock: Callable) -> dict[str, str] | None:
    """Parameter -> what it is, in order; None where one is unknown, or q or the angles are missing."""
    parameters = inspect.signature(stock).parameters.values()
    roles = {p.name: ROLES.get(p.name) for p in parameters}
    found = set(roles.values())
    complete = "q" in found and ("angles" in found or {"cos", "sin"} <= found) and len(found) == len(roles)
    plain = all(p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for p in parameters)
    return roles if complete and plain and None not in found else None


@functools.cache
def fused_rotary(stock: Callable, turn: Turn) -> Callable:
    """What stands where ``stock`` stood: called as it is, it turns by ``rope``."""
    roles = roles_of(stock)
    names = tuple(roles.values())
    default = inspect.signature(stock).parameters.get("unsqueeze_dim")
    heads_dim = turn.heads_dim if default is None else default.default

    def apply_rotary(*args: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        given = dict(zip(names[: len(args)], args, strict=True))
        for name, value in named.items():
            given[roles[name]] = value
        q, k, where = given["q"], given.get("k"), given.get("unsqueeze_dim", heads_dim)
        cos, sin = (given["angles"], None) if "angles" in given else (given["cos"], given["sin"])
        if where == 0 and cos.ndim == 2:
            where = 1  # Pixtral's: angles of tokens alone, which all heads of all samples share
        # with positions, cos and sin are tables; angles that are trained get their gradient from the original; and a
        # call that was not proven is the original's
        trains = torch.is_grad_enabled() and (cos.requires_grad or (sin is not None and sin.requires_grad))
        if given.get("position_ids") is not None or trains or not takes(q, k, cos, where):
            return stock(*map(computed, args), **{name: computed(value) for name, value in named.items()})
        return _turned(q, k, cos, sin, where, turn)

    return apply_rotary


def takes(q: Tensor, k: Tensor | None, cos: Tensor, heads_dim: int) -> bool:
    """Whether ``rope`` takes these shapes: each token has its angles, in each sample or in all."""
    if heads_dim not in (1, 2) or q.ndim not in (3, 4) or not 2 <= cos.ndim < q.ndim:
        return False
    tokens_dim = -2 if heads_dim == 1 else -3
    if k is not None and (k.ndim != q.ndim or k.shape[tokens_dim] != q.shape[tokens_dim]):
        return False
    if k is not None and q.ndim == 4 and k.shape[0] != q.shape[0]:
        return False
    return cos.shape[-2] == q.shape[tokens_dim] and (cos.ndim == 2 or cos.shape[0] in (1, q.shape[0]))


def _turned(
    q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor | None, heads_dim: int, turn: Turn
) -> Tensor | tuple[Tensor, Tensor]:
    cos, sin = (None if a is None else _by_pair(a, turn) for a in (cos, sin))
    if turn.opposite:
        sin = -sin
    if isinstance(q, Normed) and isinstance(k, Normed) and turns_with_norms(turn):
        y = turned_together(q, k, cos, sin, heads_dim, turn.keep_dtype)
        if y is not None:
            return y
    q, k = computed(q), computed(k)
    single = k is None
    if single:
        # rope turns two; of the second there are no heads
        k = q.detach().narrow(heads_dim - 4, 0, 0)
    rest = None
    if turn.last:
        rest = [x[..., : -cos.shape[-1]] for x in (q, k)]
        q, k = (x[..., -cos.shape[-1] :] for x in (q, k))
    if turn.halves:
        q, k = (_split(x) for x in (q, k))
    interleaved = turn.neighbours and not turn.halves
    y = rope(q, k, cos, sin, interleaved=interleaved, unsqueeze_dim=heads_dim, keep_dtype=turn.keep_dtype)
    if rest is not None:
        y = tuple(torch.cat(pieces, -1) for pieces in zip(rest, y, strict=True))
    return y[0] if single else y


def turns_with_norms(turn: Turn) -> bool:
    """Whether ``rms_norm_rope`` turns so."""
    return not turn.neighbours and not turn.last


def _by_pair(angles: Tensor, turn: Turn) -> Tensor:
    """As rope wants them: pair i's at i and i + R/2. Small beside q: they have no heads."""
    if turn.angles == "once":
        return torch.cat((angles, angles), -1)
    if turn.angles == "pair":
        half = angles[..., : angles.shape[-1] // 2]
        return torch.cat((half, half), -1)
    return _split(angles) if turn.neighbours and turn.angles == "column" else angles


def _split(x: Tensor) -> Tensor:
    """Columns 0, 2, ..., and then 1, 3, ..."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), -1)
