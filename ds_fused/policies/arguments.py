"""What apply was asked for: whether it can be what was meant. Each error names the argument, what came and what may."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn


def check_model(model: object, where: str = "apply") -> None:
    if isinstance(model, nn.Module):
        return
    came = f"the class {model.__name__}" if isinstance(model, type) else f"{shown(model)}"
    raise ValueError(f"{where}: the model must be a torch.nn.Module that is built, got {came}")


def check_flags(**flags: object) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"apply: {name} is {value!r}; it can be True or False")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"apply: {name} is {value!r}; it can be {' or '.join(map(repr, choices))}")


def check_wanted(wanted: object) -> None:
    if wanted is not None and not isinstance(wanted, Mapping):
        raise ValueError(f"apply: wanted is {shown(wanted)}; it can be None or an object, such as {{'rope': True}}")


def place(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    """Where and in what to prove: as asked, else as the first floating parameter."""
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    if device is None:
        device = "cpu" if first is None or first.device.type == "meta" else first.device
    if dtype is None:
        dtype = torch.float32 if first is None or first.dtype.itemsize == 1 else first.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"apply: dtype is {dtype!r}; it must be a floating one of PyTorch's, such as torch.bfloat16")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    # PyTorch's own say so in many ways, and some builds by an assertion
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"apply: device is {device!r}; it must be one that is here, such as 'cpu': {reason}") from None
    return device, dtype


def near(name: object, known: Iterable[str]) -> str:
    """A hint at the known one that may have been meant; nothing where none is near."""
    found = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def shown(value: object) -> str:
    """What came, and of which type, for an error."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"
