"""What gathers and reductions in place have in common: something of DeepSpeed's does them otherwise from here on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ds_fused.modules.swap import qualified_name

# so many of the smallest weights, or gradients, go both ways before any go in place
PROBES = 2


@dataclass(eq=False)
class CollectiveClaim:
    """All of what ``owner``, an object of DeepSpeed's, sends in one direction."""

    owner: Any
    key: str
    paths: tuple[str, ...] = ("",)
    replacement: ClassVar[str]

    @property
    def original(self) -> str:
        return qualified_name(type(self.owner))

    def __deepcopy__(self, memo: dict) -> None:
        # an engine's; of a copied model nothing is sent
        return None

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """What differs where some go this way and DeepSpeed's; all ranks ask."""
        try:
            return self._difference()
        except (AttributeError, RuntimeError, TypeError) as error:
            # a backend of PyTorch's that can't, or another DeepSpeed
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def _difference(self) -> str | None:
        raise NotImplementedError

    def watched(self) -> tuple[type, ...]:
        return ()
