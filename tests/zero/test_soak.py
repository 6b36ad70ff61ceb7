"""A thousand steps with DeepSpeed's prefetch beside the collectives of the sharded modes: nothing hangs or grows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

HERE = Path(__file__).parent
SIGNS = {"stream": "its weight in", "stationary": "its rows stay on"}

pytestmark = [pytest.mark.gpus, pytest.mark.all]


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    """mode -> what each rank found."""
    out = tmp_path_factory.mktemp("soak")
    modes = ("stock", *SIGNS)
    launch(HERE / "soak_ranks.py", str(out), *modes, ranks=2, timeout=500, env={"DS_ACCELERATOR": "cuda"})
    return {mode: [json.loads((out / f"{mode}.{rank}.json").read_text()) for rank in range(2)] for mode in modes}


@pytest.mark.parametrize("mode", SIGNS)
def test_a_thousand_steps(ended, mode):
    for fused, stock in zip(ended[mode], ended["stock"], strict=True):
        assert SIGNS[mode] in fused["head"]
        # one block of the allocator, of either run
        assert fused["late"] <= fused["early"] + 2**21
        assert len(fused["losses"]) == 1000
        # rounded elsewhere the two runs part, but they learn the same from the same batches
        for part in (slice(0, 10), slice(900, 1000)):
            ours, theirs = (sum(run["losses"][part]) for run in (fused, stock))
            assert ours == pytest.approx(theirs, rel=5e-3), part
        assert sum(fused["losses"][900:]) < 0.9 * sum(fused["losses"][:100])
