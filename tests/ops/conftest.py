"""What tests of several files share: giving back a GPU's memory, small tiles, blocks and rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _along_rows, _tiles
from ds_fused.ops.losses import _divergence_kernels
from ds_fused.ops.vocab import one_pass

# what a worker may keep of a GPU that it shares, between two tests
MOST_KEPT = 2**30


@pytest.fixture(autouse=True)
def gives_back() -> Iterator[None]:
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > MOST_KEPT:
        torch.cuda.empty_cache()


@pytest.fixture(params=["kernels", "plain"])
def where(request, monkeypatch, device) -> torch.device:
    """Both softmax passes: the kernels (on a GPU, or interpreted), and PyTorch on a CPU. Tiles are small."""
    monkeypatch.setattr(_tiles, "LEAST_SIDE", 4)
    monkeypatch.setattr(one_pass, "LEAST_TOKENS", 4)
    monkeypatch.setattr(_tiles, "SIDE_STEP", 2)
    monkeypatch.setattr(_tiles, "ROW_STEP", 4)
    if request.param == "plain":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        return torch.device("cpu")
    return device


@pytest.fixture
def pair_blocks(monkeypatch) -> None:
    """Blocks so small that a row of 71 has whole ones and a rest."""
    for name in ("FWD_BLOCK", "BWD_BLOCK"):
        monkeypatch.setattr(_divergence_kernels, name, 32)


@pytest.fixture
def walked(monkeypatch) -> None:
    """Rows of more than 8 columns are wide: blocks of 16, where sparsemax walks them, and parts of 16, of which four
    are looked at together."""
    monkeypatch.setattr(_along_rows, "WHOLE_ROW_FWD", 8)
    monkeypatch.setattr(_along_rows, "WHOLE_ROW_BWD", 8)
    monkeypatch.setattr(registry.op("sparsemax").module, "WALK_COLS", 16)
    monkeypatch.setattr(_along_rows, "PART_FWD", 16)
    monkeypatch.setattr(_along_rows, "PART_BWD", 16)
    monkeypatch.setattr(_along_rows, "MERGE_BLOCK", 4)
