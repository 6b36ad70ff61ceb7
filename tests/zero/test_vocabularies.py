"""The sharded modes at the vocabularies of real models, over numbers of ranks that split rows and that don't."""

from __future__ import annotations

import json
from pathlib import Path

import products
import pytest
from launching import launch

from ds_fused.engine.zero3.shards import Shards

HERE = Path(__file__).parent
SAID = {"stream": "its weight in", "stationary": "its rows stay on"}


# GPT-2: odd, so rows are split over any even number; SmolLM2: whole ones; Qwen2.5: split over five
@pytest.mark.all
@pytest.mark.parametrize(
    ("n_vocab", "n_ranks", "is_split"), [(50257, 2, True), (50257, 4, True), (49152, 3, False), (151936, 5, True)]
)
def test_real_vocabularies(n_vocab, n_ranks, is_split, tmp_path):
    assert Shards(n_vocab, products.SIZES["hidden_size"], n_ranks).splits_rows == is_split
    launch(HERE / "vocabulary_ranks.py", str(tmp_path), str(n_vocab), ranks=n_ranks)
    for rank in range(n_ranks):
        rows = json.loads((tmp_path / f"{rank}.json").read_text())
        for mode, said in SAID.items():
            assert rows[mode]["report"].count(said) == 2, "of head and embedding"
            # fp32, summed in another order
            assert rows[mode]["losses"] == pytest.approx(rows["stock"]["losses"], rel=1e-5)
            assert rows[mode]["apart"] < 1e-6
        assert rows["stock"]["losses"][0] != rows["stock"]["losses"][2]
