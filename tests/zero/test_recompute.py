"""Ranks that keep different parts of their layers under ZeRO-3: the steps of stock, and its collectives in order."""

from __future__ import annotations

import json
from pathlib import Path

import products
import pytest
from launching import launch

LAYERS = products.SIZES["num_hidden_layers"]
WAYS = ["plain", "init"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("recompute")
    launch(Path(__file__).with_name("recompute_ranks.py"), str(out))
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_stock_to_the_last_bit(ranks, way):
    for found in ranks:
        stock = found[f"{way} stock"]
        assert len(set(stock["losses"])) == len(stock["losses"]) and min(stock["norms"]) > 0
        for name in ("same", "different", "less", "offload", "room"):
            assert [found[f"{way} {name}"][what] for what in ("losses", "norms")] == [stock["losses"], stock["norms"]]


@pytest.mark.parametrize("way", WAYS)
def test_collectives_are_those_of_stock_in_their_order(ranks, way):
    for found in ranks:
        stock = found[f"{way} stock"]["collectives"]
        # every layer's weights are gathered in forward and in backward, and gradients leave
        assert sum("allgather" in line for line in stock) >= 2 * LAYERS
        assert any("reduce_scatter" in line for line in stock)
        for name in ("same", "different", "less", "offload", "room"):
            assert found[f"{way} {name}"]["collectives"] == stock


@pytest.mark.parametrize("way", WAYS)
def test_each_rank_goes_by_its_own_room(ranks, way):
    assert [found[f"{way} room"]["on_host"] for found in ranks] == [False, True]
    saved = [found[f"{way} stock"]["products"] - found[f"{way} room"]["products"] for found in ranks]
    assert saved == [7 * LAYERS, LAYERS]


def test_products_that_are_kept_are_not_computed_again(ranks):
    # q, k, v, o, gate and up; and down, which DeepSpeed's linear has computed again for nothing
    for way in WAYS:
        for found, saved in zip(ranks, ((7, 7, 1), (7, 0, 7)), strict=True):
            stock = found[f"{way} stock"]["products"]
            names = ("same", "different", "less")
            assert tuple(stock - found[f"{way} {name}"]["products"] for name in names) == tuple(
                LAYERS * n for n in saved
            )


def test_by_the_json(ranks):
    for found in ranks:
        stock, kept = found["init stock"], found["init json"]
        assert kept["losses"] == stock["losses"]
        assert stock["products"] - kept["products"] == 7 * LAYERS
        assert f"products of {LAYERS} of {LAYERS} layers kept" in kept["report"]
