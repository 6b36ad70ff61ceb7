"""A real model on real text: fused against stock for ten steps on the same batches."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from launching import REPO, launch, start

HERE = Path(__file__).parent
ULP = 2.0**-23  # of 1.0
# Relative. Stock's own first loss is 1.1e-6 from fp64 (its sums over 49,152 words), ours 6e-8; ten AdamW updates, each
# dividing by the root of a squared gradient, made 6.3e-6 of it.
APART = 5e-5


def test_ten_steps_of_smollm2(tmp_path: Path):
    fetched = start([sys.executable, REPO / "launch" / "real_data.py"])
    assert fetched.status == 0, f"SmolLM2 and Shakespeare are not here:\n{fetched.output}"
    model, texts = fetched.output.splitlines()[-2:]
    out = tmp_path / "losses.json"
    launch(HERE / "smollm2_rank.py", model, texts, str(out), ranks=1)
    runs = json.loads(out.read_text())

    stock, fused, true = runs["stock"], runs["fused"], runs["judge"]
    assert len(stock) == 10
    assert abs(fused[0] - true) <= 2 * abs(stock[0] - true) + 4 * ULP * true
    assert fused == pytest.approx(stock, rel=APART)
