"""What claims have in common that ask for no proof: their layers compute as before, on what reaches them otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ds_fused.modules.swap import original_class, qualified_name


@dataclass(eq=False)
class UnprovenClaim:
    """Layers of one class."""

    paths: tuple[str, ...]
    modules: Sequence[nn.Module]

    @property
    def original(self) -> str:
        return qualified_name(original_class(self.modules[0]))

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        return None

    def watched(self) -> tuple[type, ...]:
        return ()
