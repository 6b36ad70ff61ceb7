"""Ulysses sequence parallelism, two sequences at a time on two ranks each: the sharded modes train as stock."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launching import launch

HERE = Path(__file__).parent
RANKS = 4

pytestmark = pytest.mark.all  # a minute


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], str]:
    """What each rank found, and what rank 0 said."""
    out = tmp_path_factory.mktemp("ulysses")
    said = launch(HERE / "ulysses_ranks.py", str(out), ranks=RANKS)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(RANKS)], said[0].output


@pytest.mark.parametrize("mode", ["stream", "stationary"])
@pytest.mark.parametrize("kind", ["untied", "tied", "outside"])
def test_ulysses(ended, kind, mode):
    ranks, _ = ended
    for result in ranks:
        stock, fused = result[kind]["stock"], result[kind][mode]
        assert {"stream": "its weight in 17 slabs", "stationary": "its rows stay on 4"}[mode] in fused["report"]
        assert fused["shares"] == stock["shares"] == RANKS
        # halves of sequences of both lengths
        assert fused["lengths"] == stock["lengths"] and set(fused["lengths"]) == {4, 6}
        assert fused["losses"] == pytest.approx(stock["losses"], rel=1e-5)
        assert fused["norms"] == pytest.approx(stock["norms"], rel=1e-5)
        for name, w in fused["weights"].items():
            assert w == pytest.approx(stock["weights"][name], rel=1e-5, abs=1e-6), name
    # the ranks of a pair share a loss, the pairs don't
    losses = [result[kind][mode]["losses"] for result in ranks]
    assert losses[0] == losses[1] and losses[2] == losses[3]
    assert losses[0] != losses[2]


def test_a_loss_outside_of_the_forward_is_no_use_and_says_so(ended):
    assert ended[1].count("the forward was given no labels, so the head computes real logits") == 1
