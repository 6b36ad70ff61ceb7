"""Outside tests/ops a CPU runs the references, as it does for users; what a fixture starts inherits no interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ds_fused.ops.common._triton import runs_kernels


@pytest.fixture(scope="module")
def rank() -> str:
    """What a process sees that a fixture of the widest scope started."""
    command = [sys.executable, "-c", "import os; print(os.environ.get('TRITON_INTERPRET'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_a_cpu_runs_references(rank):
    assert rank == "None"
    assert "TRITON_INTERPRET" not in os.environ
    assert not runs_kernels(torch.empty(1))
