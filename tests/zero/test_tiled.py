"""Tiled MLPs against stock ones on two ranks, under ZeRO-3 and ZeRO-2, with gradient accumulation."""

from __future__ import annotations

import json
from pathlib import Path

import products
import pytest
from launching import launch

GAS, TILES = 2, 5


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("tiled")
    launch(Path(__file__).with_name("tiled_ranks.py"), str(out))
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(
    "stage, way",
    [
        *(("3", way) for way in ("tiled", "leaf", "json", "long_tiles", "nothing_kept")),
        *(("2", way) for way in ("tiled", "nothing_kept")),
    ],
)
def test_it_trains_as_stock(ranks, stage, way):
    for found in ranks:
        stock, tiled = found[stage]["stock"]["losses"], found[stage][way]["losses"]
        assert len(stock) == GAS * products.FEW_STEPS and stock[-1] != stock[0]
        assert tiled == pytest.approx(stock, rel=1e-5)


def test_a_gradient_is_reduced_once_a_backward(ranks):
    for found in ranks:
        stock = found["3"]["stock"]["counts"]
        assert sum("mlp" in name for name in stock) == 3 * products.SIZES["num_hidden_layers"]
        assert set(stock.values()) == {GAS * products.FEW_STEPS}
        for way in ("tiled", "leaf", "json", "long_tiles", "nothing_kept"):
            assert found["3"][way]["counts"] == stock


def test_under_checkpointing_tiles_run_twice(ranks):
    for found in ranks:
        again, less = found["3"]["again"], found["3"]["nothing_kept"]
        assert less["losses"] == again["losses"]
        n = GAS * products.FEW_STEPS
        assert again["runs"] == n * [3]
        # of gate, up and down of the first layer, by all tiles but the last
        assert again["sums"] == less["sums"] == n * 3 * (TILES - 1)
        # the first repetition shows what it does not need
        assert less["runs"] == found["2"]["nothing_kept"]["runs"] == [3] + (n - 1) * [2]


def test_a_layer_that_is_gathered_as_one_goes_back_by_slices(ranks):
    n = GAS * products.FEW_STEPS * (products.SIZES["num_hidden_layers"] - 1)
    for rank, found in enumerate(ranks):
        sliced = {way: run["sliced"] for way, run in found["3"].items()}
        # what of long_tiles is whole has neither. Tiles of any function are no gated MLP's
        long = n if rank == 0 else 0
        assert sliced == dict.fromkeys(("stock", "tiled", "leaf"), 0) | {"json": n, "long_tiles": long} | {
            "again": n,
            "nothing_kept": n,
        }
        assert found["2"]["nothing_kept"]["sliced"] == n


def test_the_json_key_tiles_mlps_and_has_them_gathered_once(ranks):
    for found in ranks:
        assert [(found["3"][way]["tiles"], found["3"][way]["leaf"]) for way in ("stock", "tiled", "leaf", "json")] == [
            (None, False),
            ([5, 1], False),
            ([5, 1], True),
            ([5, 1], True),
        ]


def test_a_rank_with_few_tokens_has_a_whole_mlp_beside_one_with_tiles(ranks):
    n = GAS * products.FEW_STEPS
    # of 24 rows and of 22; tiles run once more in backward
    assert [found["3"]["long_tiles"]["runs"] for found in ranks] == [n * [2], n * [1]]
    assert all(found["3"]["long_tiles"]["leaf"] for found in ranks)
