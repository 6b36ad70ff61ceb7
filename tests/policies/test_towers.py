"""Encoders and the towers of multimodal models: what stands beside a language model, equal to stock as well."""

from __future__ import annotations

import copy
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import ds_fused
from tests.policies.tiny import LAYER_KEYS, NO_DROPOUT, counts
from tests.policies.tiny_families import TOWERS

IDS = {"input_ids": torch.arange(3, 14)[None]}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
# two pictures of 4 x 4 patches: [patches, channels * times * height * width]
PATCHES = torch.randn(32, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
GRID = torch.tensor([[1, 4, 4], [1, 4, 4]])
SOUND = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}
INPUTS = {"ids": IDS, "pixels": PIXELS, "sound": SOUND, "patches": {"hidden_states": PATCHES, "grid_thw": GRID}}


def outputs_and_gradients(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    model.train()
    output = model(**inputs)
    y = output[0] if isinstance(output, (tuple, list)) or hasattr(output, "keys") else output
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * upstream).sum().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(("name", "config", "layers", "given", "settings"), TOWERS, ids=[row[0] for row in TOWERS])
def test_equals_stock(name: str, config: str, layers: str, given: str, settings: dict) -> None:
    family, _, cls = name.partition(".")
    file = import_module(f"transformers.models.{family}.modeling_{family}")
    config = getattr(import_module(f"transformers.models.{family}.configuration_{family}"), config)
    torch.manual_seed(0)
    stock = getattr(file, cls)(config(**NO_DROPOUT | settings))
    for parameter in stock.parameters():
        nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
    model = copy.deepcopy(stock)
    report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == {key: int(count) for key, count in (each.split() for each in layers.split(", "))}

    mine, theirs = (outputs_and_gradients(each, INPUTS[given]) for each in (model, stock))
    assert report.verify_live() == []
    largest = max(t.norm() for t in theirs[1:])
    for a, b in zip(mine, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * max(b.norm(), 1e-3 * largest)
