"""The sharded modes over numbers of ranks, vocabularies, families and uneven batches: what stock gives."""

from __future__ import annotations

import json
from pathlib import Path

import products
import pytest
from launching import launch

from ds_fused.engine.zero3.shards import Shards
from ds_fused.ops.common._tiles import KEPT_SLABS

HERE = Path(__file__).parent
HIDDEN = 32
# model -> its vocabulary, and whether the embedding is never whole, too
MODELS = {
    "split rows": (67, False),
    "whole rows": (66, False),
    "one row over": (71, True),
    "frozen": (67, False),
    "softcap": (67, True),
    "scale": (67, True),
}


# each number of ranks takes half a minute; the quick suite has the same in test_special and test_zero_slabs, for a few
pytestmark = pytest.mark.all


@pytest.fixture(scope="module", params=[1, 2, 3, 4, 5])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """[rank] -> what it found."""
    out = tmp_path_factory.mktemp("sweep")
    launch(HERE / "sweep_ranks.py", str(out), ranks=request.param)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("mode", ["stream", "stationary"])
@pytest.mark.parametrize("name", MODELS)
def test_training_is_stocks(ranks, name, mode):
    for result in ranks:
        stock, fused = result[name]["stock"], result[name][mode]
        assert {"stream": "its weight in", "stationary": "its rows stay on"}[mode] in fused["report"]
        # fp32, summed in another order
        assert fused["losses"] == pytest.approx(stock["losses"], rel=1e-5, abs=1e-6)
        assert fused["weights"].keys() == stock["weights"].keys()
        for weight, values in fused["weights"].items():
            assert values == pytest.approx(stock["weights"][weight], rel=1e-5, abs=1e-6), weight
    # nobody has a label in the third step, and all do in the first
    assert all(result[name][mode]["losses"][2] == 0 < result[name][mode]["losses"][0] for result in ranks)


@pytest.mark.parametrize("name", MODELS)
def test_collectives_are_as_many_whatever_the_batch(ranks, name):
    n_vocab, embedding = MODELS[name]
    shards = Shards(n_vocab, HIDDEN, len(ranks))
    slabs = len(shards.spans(shards.cuts(1, 0)))
    # forward and backward gather for the head, but for the slabs that are kept; the embedding looks up once
    gathers, scatters = (2 + embedding) * slabs - min(KEPT_SLABS, slabs), (1 + embedding) * slabs
    if name == "frozen":
        # its forward is all, and it sends no gradient
        gathers, scatters = slabs, 0
    for result in ranks:
        assert f"its weight in {slabs} slabs" in result[name]["stream"]["report"]
        assert result[name]["stream"]["counts"] == [[gathers, scatters]] * 4
        assert result[name]["stock"]["counts"] == [[0, 0]] * 4
        # a stationary head needs none, nor does the embedding where the tokens that travel are fewer than the words
        in_slabs = [embedding and len(ranks) * most_tokens(step, len(ranks)) >= n_vocab for step in range(4)]
        assert result[name]["stationary"]["counts"] == [[slabs, slabs] if so else [0, 0] for so in in_slabs]


def most_tokens(step: int, n_ranks: int) -> int:
    """Of any rank, in sweep_ranks.batch."""
    tokens = [products.ROWS * (5 + 2 * rank) for rank in range(n_ranks)]
    return max([*tokens[:-1], 1] if step == 3 else tokens)


def test_embeddings_are_looked_up_in_both_ways():
    """Over the numbers of ranks, so that the sweep says something of either."""
    ways = {n_ranks * most_tokens(step, n_ranks) < 67 for n_ranks in (1, 2, 3, 4, 5) for step in range(4)}
    assert ways == {True, False}
