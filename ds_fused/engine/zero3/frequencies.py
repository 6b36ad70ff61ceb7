"""``"rotary_frequencies": "fp32"``: what zero.Init has rounded of rotary frequencies is computed again.

Within DeepSpeed's zero.Init every floating-point tensor that a constructor makes has the dtype of the training, however
it was asked for. So a model that is built there, as by HuggingFace's ``from_pretrained`` under ZeRO-3, has the
frequencies of its rotary embedding in 16 bits, up to 0.4 % off, where under ZeRO-0 to 2 they are in fp32: a pretrained
model turns by other angles than it was trained with. In bf16 that costs little (1e-4 to 4e-4 of SmolLM2's loss, see
benchmarks/notes.md), but a training that moves between the stages is not of one model. In fp16 a base beyond 65504 is
infinite on the way, and all frequencies but the first are 0. Stock has it so; without this key a line of the report
says it.

Source: DeepSpeed's issue 4932, transformers' issue 28596.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ds_fused.engine.unproven_claim import UnprovenClaim
from ds_fused.modules.swap import original_class
from ds_fused.policies.report import Left, counted

KEY = "rotary_frequencies"
# part of the names of transformers' buffers
NAME = "inv_freq"
# as far, of their size, as numbers may be apart that were rounded to 16 bits at every step of their computation
NEAR = 2**-6

Buffers = Mapping[str, Tensor]


@dataclass(eq=False)
class FrequencyClaim(UnprovenClaim):
    """The rotary embeddings of one class whose frequencies are computed again: compared when they were found."""

    exact: Sequence[Buffers]
    key: str = KEY
    replacement: str = "the same, with its frequencies in fp32"
    rounded: list[Buffers] = field(default_factory=list)

    def commit(self) -> None:
        self.rounded = [_rounded(module) for module in self.modules]
        for module, exact, rounded in zip(self.modules, self.exact, self.rounded, strict=True):
            module._buffers.update({name: exact[name].to(buffer.device) for name, buffer in rounded.items()})

    def restore(self) -> None:
        for module, rounded in zip(self.modules, self.rounded, strict=True):
            module._buffers.update({name: b.to(module._buffers[name].device) for name, b in rounded.items()})

    def in_place(self) -> bool:
        return not any(map(_rounded, self.modules))


def claims_of(model: nn.Module, wanted: bool) -> tuple[list[FrequencyClaim], list[Left]]:
    """Class by class what can be computed again, if that is ``wanted``; and what stays rounded, with the reason."""
    found: dict[type, dict[str, tuple[nn.Module, Buffers]]] = {}
    left: Counter[tuple[str, str]] = Counter()
    for path, module in model.named_modules():
        rounded = _rounded(module)
        if not rounded:
            continue
        exact = _exact(module, rounded)
        if wanted and not isinstance(exact, str):
            found.setdefault(original_class(module), {})[path] = (module, exact)
            continue
        left[original_class(module).__name__, f"{KEY}: {_said(rounded, exact, wanted)}"] += 1
    claims = [
        FrequencyClaim(tuple(there), [module for module, _ in there.values()], [exact for _, exact in there.values()])
        for there in found.values()
    ]
    return claims, counted(left)


def _rounded(module: nn.Module) -> Buffers:
    """The frequencies that it has in 16 bits."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if NAME in name and buffer is not None and buffer.is_floating_point() and buffer.itemsize == 2
    }


def _exact(module: nn.Module, rounded: Buffers) -> Buffers | str:
    """The same by its class and its configuration, outside zero.Init; or why they can't be had so."""
    config = getattr(module, "config", None)
    if config is None:
        return "it has no configuration that they could be computed from"
    if next(module.parameters(), None) is not None:
        # a second one of these would be more than frequencies
        return "it has weights besides"
    try:
        with torch.device("cpu"):
            twin = original_class(module)(config)
    except Exception as error:
        return f"they can't be computed from its configuration: {type(error).__name__}: {error}".splitlines()[0]
    exact = {name: twin._buffers.get(name) for name in rounded}
    for name, buffer in rounded.items():
        if exact[name] is None or exact[name].shape != buffer.shape or exact[name].dtype != torch.float32:
            return f"its configuration gives no {name} like this in fp32"
        if not _is_rounded(buffer, exact[name]):
            return f"{name} is none that its configuration gives"
    return exact


def _is_rounded(rounded: Tensor, exact: Tensor) -> bool:
    """Below the smallest normal number there are few bits. What overflows on the way is 0 in the end."""
    allowed = NEAR * exact.abs() + torch.finfo(rounded.dtype).tiny
    overflowed = (rounded.cpu() == 0) & (rounded.dtype == torch.float16)
    return bool(((_apart(rounded, exact) <= allowed) | overflowed).all())


def _apart(rounded: Tensor, exact: Tensor) -> Tensor:
    return (rounded.float().cpu() - exact).abs()


def _off(rounded: Tensor, exact: Tensor) -> float:
    """The largest relative error; parts of a head that are not turned have 0."""
    return (_apart(rounded, exact) / exact.abs().clamp_min(torch.finfo(torch.float32).tiny)).max().item()


def _said(rounded: Buffers, exact: Buffers | str, wanted: bool) -> str:
    dtype = str(next(iter(rounded.values())).dtype).removeprefix("torch.")
    if isinstance(exact, str):
        return f"its frequencies stay in {dtype}, since {exact}" if wanted else f"its frequencies are in {dtype}"
    off = max(_off(buffer, exact[name]) for name, buffer in rounded.items())
    return (
        f"its frequencies are in {dtype}, as DeepSpeed has made them and stock has them, up to {100 * off:.3g} % off; "
        f'"{KEY}": "fp32" has them computed again'
    )
