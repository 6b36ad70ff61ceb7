"""What the tests of linear_cross_entropy share, however the weight comes."""

from __future__ import annotations

import pytest
import torch

from ds_fused.ops import _tiles


@pytest.fixture(params=["kernels", "plain"])
def where(request, monkeypatch, device) -> torch.device:
    """Both softmax passes: the kernels (on a GPU, or interpreted), and PyTorch on a CPU. Tiles are small."""
    monkeypatch.setattr(_tiles, "LEAST_SIDE", 4)
    monkeypatch.setattr(_tiles, "SIDE_STEP", 2)
    monkeypatch.setattr(_tiles, "ROW_STEP", 4)
    if request.param == "plain":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return torch.device("cpu")
    return device
