"""What several tests of policies need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from ds_fused.ops.common._say import say_once


@pytest.fixture(autouse=True)
def say_again() -> None:
    """What is said once a process is said once a test."""
    say_once.cache_clear()


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> torch.device:
    """Where they run: only these write over what projections return."""
    if device.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return device


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same bits each time on a GPU: otherwise the backward of flash attention adds in no fixed order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
