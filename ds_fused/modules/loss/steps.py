"""What a model does to logits between its head and its loss, as far as it can be recorded and done later.

A step is a name and an operand: "index", "reshape", "transpose" and "contiguous" choose and arrange tokens; "add",
"mul", "div", "tanh" and "to" act on every logit, "log_softmax" on all of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# one recorded step: the name of what happened to the logits, and its operand
Step = tuple[str, Any]
# those that choose and arrange tokens: what they do to the logits, they can do to the hidden states
ROW_STEPS = ("index", "reshape", "transpose", "contiguous")


def replay(logits: Tensor, steps: tuple[Step, ...]) -> Tensor:
    """The recorded steps on real logits, each as the model wrote it."""
    for name, operand in steps:
        if name == "index":
            logits = logits[operand]
        elif name == "reshape":
            logits = logits.reshape(*operand, logits.shape[-1])
        elif name == "transpose":
            logits = logits.transpose(*operand)
        elif name == "contiguous":
            logits = logits.contiguous()
        elif name == "add":
            logits = logits + operand
        elif name == "mul":
            logits = logits * operand
        elif name == "div":
            logits = logits / operand
        elif name == "tanh":
            logits = logits.tanh()
        elif name == "log_softmax":
            logits = logits.log_softmax(-1, dtype=operand)
        else:
            logits = logits.to(operand)
    return logits


def row_index(index: Any, n_dims: int) -> tuple | None:
    """An index that chooses among tokens, as one of the leading dimensions; None where it is another."""
    if isinstance(index, Tensor):
        if index.dtype != torch.bool or not 0 < index.ndim < n_dims:
            return None
        return index.nonzero(as_tuple=True)
    items = index if isinstance(index, tuple) else (index,)
    at = [i for i, item in enumerate(items) if item is Ellipsis]
    if len(at) > 1 or not all(item is Ellipsis or type(item) in (slice, int) for item in items):
        return None
    if at:
        missing = n_dims - (len(items) - 1)
        items = (*items[: at[0]], *[slice(None)] * missing, *items[at[0] + 1 :])
    if len(items) == n_dims:
        if items[-1] != slice(None):
            return None
        items = items[:-1]
    return items if len(items) < n_dims else None


def indexed(shape: torch.Size, index: tuple) -> torch.Size:
    """The shape of what ``row_index`` chooses from a tensor of ``shape``."""
    if isinstance(index[0], Tensor):
        return torch.Size((len(index[0]), *shape[len(index) :]))
    chosen = []
    for dim, (item, size) in enumerate(zip(index, shape[: len(index)], strict=True)):
        if isinstance(item, slice):
            # torch.compile knows no slice.indices before 2.13
            chosen.append(len(range(size)[item]))
        elif not -size <= item < size:
            raise IndexError(f"index {item} is out of bounds for dimension {dim} with size {size}")
    return torch.Size((*chosen, *shape[len(index) :]))
