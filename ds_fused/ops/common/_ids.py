"""What the lookups ask of their ids: is each of them a row of the table."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_fused.ops.common._triton import is_fake, is_vmapped, waited


def looks_itself(ids: Tensor) -> bool:
    """Whether the kernel that reads the ids can say that one is wrong: on a CPU it need not, in a graph it does not."""
    return ids.device.type != "cpu" and not torch.compiler.is_compiling()


# with which `tl.device_assert` of a kernel that looks itself does something, and Triton adds no assertions of its own
ASSERTING = {"debug": True, "sanitize_overflow": False}


def flat_ids(op: str, ids: Tensor, n_vocab: int, looked_at: bool = False) -> Tensor:
    """ids [...] as [N] int64, side by side as the kernel reads them.

    One outside the vocabulary is an error: here on a CPU, on the device else. Nobody looks on a CPU in a graph, nor at
    fake ones, nor within a vmap, where no value can be asked.
    ``looked_at``: by the kernel, which costs five launches less.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{op}: ids are {ids.dtype}; they must be int64 or int32")
    if type(ids) is not Tensor:
        ids = waited(ids)
    flat = ids.reshape(-1).long().contiguous()
    if flat.device.type == "cpu" and (torch.compiler.is_compiling() or is_fake(flat)):
        return flat
    if looked_at or is_vmapped():
        return flat
    legal = ((flat >= 0) & (flat < n_vocab)).all()
    if flat.device.type == "cpu":
        if not legal:
            wrong = flat[(flat < 0) | (flat >= n_vocab)]
            raise ValueError(f"{op}: id {int(wrong[0])} lies outside [0, {n_vocab})")
    else:
        torch._assert_async(legal, f"{op}: an id lies outside [0, {n_vocab})")
    return flat
