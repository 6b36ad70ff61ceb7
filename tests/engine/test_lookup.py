"""The way of each lookup: few tokens travel, for many the table comes in slabs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ds_fused.engine.zero3.lookup import Lookup
from ds_fused.ops.vocab.slabs import WholeWeight
from tests.ops.shards import Shard

V, H = 13, 6


class Slabs(WholeWeight):
    ranks = 1
    whole = None

    def __str__(self) -> str:
        return "its weight in 4 slabs"


def test_the_way_is_chosen_by_what_travels():
    weight = torch.randn(V, H)
    shard = Shard(weight, 0, V)
    lookup = Lookup(Slabs(weight, 4), shard, 2**20)
    assert str(lookup) == "its rows stay on 1 ranks up to 12 tokens a rank, its weight in 4 slabs above"
    for n, travels in ((12, True), (13, False), (0, True)):
        shard.collectives.clear()
        ids = torch.arange(n) % 3
        assert torch.equal(lookup(ids), F.embedding(ids, weight))
        assert bool(shard.collectives) == travels


def test_without_the_shard_all_comes_in_slabs():
    weight = torch.randn(V, H)
    lookup = Lookup(Slabs(weight, 4), None, 2**20)
    assert str(lookup) == "its weight in 4 slabs"
    assert torch.equal(lookup(torch.tensor([1, 2])), weight[1:3])


def test_nothing_travels_where_the_table_is_here():
    weight = torch.randn(V, H)
    shard, slabs = Shard(weight, 0, V), Slabs(weight, 4)
    slabs.whole = weight
    for way in (shard, None):
        assert torch.equal(Lookup(slabs, way, 2**20)(torch.tensor([[1, 2]])), weight[None, 1:3])
    assert not shard.collectives


def test_an_illegal_id_is_an_error_before_ranks_count_on_each_other(monkeypatch):
    weight = torch.randn(V, H)
    shard = Shard(weight, 0, V)
    monkeypatch.setattr(shard, "most", lambda n: pytest.fail("the ranks have met"))
    with pytest.raises(ValueError, match=r"embedding: id 13 lies outside \[0, 13\)"):
        Lookup(Slabs(weight, 4), shard, 2**20)(torch.tensor([0, 13]))
