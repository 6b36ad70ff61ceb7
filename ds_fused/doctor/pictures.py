"""Small pictures in the forms that models take them in, and how many words stand for one.

No form is asked for by a family's name: they are tried one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

SIDE, PATCHES = 32, 4  # pixels of a side, patches of it


@dataclass(frozen=True)
class Picture:
    """One for each row of a batch."""

    shape: tuple[int, ...]  # of its pixels
    n_words: int
    grid: bool = False  # its pixels are patches, beside which stands how they lie
    sized: bool = False  # its size stands beside it

    def tensors(self, n_rows: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(7)
        if self.grid:
            patches, size = self.shape
            pixels = torch.randn(n_rows * patches, size, generator=draw)
            return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, PATCHES, PATCHES]] * n_rows)}
        pixels = torch.randn(n_rows, *self.shape, generator=draw)
        return {"pixel_values": pixels} | ({"image_sizes": torch.tensor([[SIDE, SIDE]] * n_rows)} if self.sized else {})


def image_token(config: PretrainedConfig) -> str | None:
    """What the configuration calls the word that stands for a part of a picture."""
    names = ("image_token_id", "image_token_index")
    return next((name for name in names if isinstance(getattr(config, name, None), int)), None)


def pictures(config: PretrainedConfig, grid: bool) -> Iterator[Picture]:
    """Forms of a picture, the likely ones first. ``grid``: the model takes patches."""
    vision: Any = getattr(config, "vision_config", None)
    if grid:
        side = getattr(vision, "patch_size", None) or 8
        n_words = (PATCHES // getattr(vision, "spatial_merge_size", 1)) ** 2
        for frames in (getattr(vision, "temporal_patch_size", 1), 2):
            yield Picture((PATCHES**2, 3 * frames * side**2), n_words, grid=True)
        return
    for sized in (False, True):
        for shape in ((3, SIDE, SIDE), (1, 3, SIDE, SIDE)):
            # all patches, merged in fours, pooled; with a class token; with the ends of lines
            for n_words in (16, 4, 1, 17, 5, 20, 8, 64):
                yield Picture(shape, n_words, sized=sized)
