"""A real model on real text: fused against stock for ten steps on the same batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from launching import REPO, launch, start

HERE = Path(__file__).parent
ULP = 2.0**-23


def test_ten_steps_of_smollm2(tmp_path: Path):
    fetched = start([sys.executable, REPO / "launch" / "real_data.py"], timeout=180)
    assert fetched.status == 0, f"SmolLM2 and Shakespeare are not here:\n{fetched.output}"
    model, texts = fetched.output.splitlines()[-2:]
    out = tmp_path / "losses.json"
    launch(HERE / "smollm2_rank.py", model, texts, str(out), ranks=1, timeout=600)
    runs = json.loads(out.read_text())

    stock, fused, reordered = runs["stock"], runs["fused"], runs["reordered"]
    assert len(stock) == len(fused) == 10
    # what another order of summation makes of the same ten steps; one step's share of it is luck, so the largest counts
    rounding = max(abs(a - b) for a, b in zip(stock, reordered, strict=True))
    for step, (a, b) in enumerate(zip(stock, fused, strict=True)):
        assert abs(a - b) <= 2 * rounding + 4 * ULP * a, f"step {step}: fused {b}, stock {a}, rounding {rounding:.1e}"
    assert rounding < 1e-3, "the yardstick itself is off"
