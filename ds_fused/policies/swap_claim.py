"""Layers that are replaced by a change of class: what they become, the proof, and the way back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ds_fused.modules.layers.tiled_mlp import TILED_MIXINS, Tiles
from ds_fused.modules.swap import is_fused, is_live, qualified_name, swap, unswap_all
from ds_fused.policies.kinds import Kind, Way, qk_norms, unproven
from ds_fused.policies.memory import remembered


class SwapClaim:
    """Layers of one class, alike in all that the proof depends on, and the ways to replace them."""

    # the key that asked for another way, which was not to be had, and why
    apart: tuple[str, str] | None = None
    # the key of the way that is had where nobody asks for the one that was proven
    instead_of: str | None = None

    def __init__(self, kind: Kind, ways: Sequence[Way], model: nn.Module, tiles: Tiles | None = None) -> None:
        self.paths: tuple[str, ...] = ()
        self.original = ""
        self._kind, self._ways, self._model, self._tiles = kind, tuple(ways), model, tiles
        self._modules: list[nn.Module] = []

    @property
    def certain(self) -> bool:
        """Whether it is settled what the layers become."""
        return len(self._ways) == 1 and self._kind.certain

    @property
    def way(self) -> Way:
        """The one that was proven; before, the likeliest."""
        return self._ways[0]

    @property
    def key(self) -> str:
        return self.way.key

    @property
    def tiles(self) -> Tiles | None:
        return self._tiles if self.way.mixin in TILED_MIXINS else None

    @property
    def replacement(self) -> str:
        return self.way.op if self.tiles is None else f"{self.way.op} in {self.tiles}"

    @property
    def _mixin(self) -> type:
        return self.way.mixin if self.tiles is None else TILED_MIXINS[self.way.mixin]

    def add(self, path: str, module: nn.Module) -> None:
        self.paths += (path,)
        self._modules.append(module)
        self.original = qualified_name(type(module))

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        # what runs tile by tile is what is proven; its copies have stub children, whose weights no tile would know
        asked, others = ([way for way in self._ways if way.asked == is_asked] for is_asked in (True, False))
        reason = None
        for ways in filter(None, (asked, others)):
            chosen = remembered(self._kind, self._modules[0], ways, device, dtype)
            if isinstance(chosen, Way):
                if reason is not None:
                    self.apart = asked[0].key, reason
                elif chosen.asked and others:
                    self.instead_of = others[0].key
                self._ways = (chosen,)
                return None
            reason = chosen
        return reason

    def commit(self) -> None:
        state = dict(self.way.state) | ({} if self.tiles is None else {"fused_tiles": self.tiles})
        try:
            for module in self._modules:
                swap(module, self._mixin, self.way.how, **state)
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        unswap_all(self._modules)

    def in_place(self) -> bool:
        there = {id(module) for module in self._model.modules()}
        return all(id(module) in there and is_live(module) for module in self._modules)

    def watched(self) -> tuple[type, ...]:
        # not built once more: somebody may have patched the original since
        return tuple({type(module) for module in self._modules if is_fused(module)})


class AttentionClaim(SwapClaim):
    """Attention layers, whose norms of q and k are fused with their rotary functions where that is proven, too."""

    certain = False

    def prove(self, device: torch.device, dtype: torch.dtype) -> str | None:
        reason = super().prove(device, dtype)
        if reason is not None:
            return reason
        try:
            found = qk_norms.with_norms(self._modules[0], self.way, device, dtype)
        except Exception as error:
            found = unproven(error)
        if isinstance(found, str):
            self.apart = qk_norms.KEY, found
        else:
            self._ways = (found,)
        return None
