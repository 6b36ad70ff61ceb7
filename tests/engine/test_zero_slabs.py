"""A weight in slabs, on 1 to 4 ranks: every row comes once, gradients are stock's, collectives know nothing of data."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch
from launching import launch

from ds_fused.engine.zero3.shards import Shards
from ds_fused.engine.zero3.windows import TURNS
from ds_fused.ops.common._tiles import KEPT_SLABS

HERE = Path(__file__).parent


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.all), 3, pytest.param(4, marks=pytest.mark.all)]
)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[dict]]:
    """[rank][weight] -> what came out."""
    out = tmp_path_factory.mktemp("slabs") / "rank"
    which = ["all"] if request.config.getoption("--all") else []
    launch(HERE / "slabs_ranks.py", str(out), *which, ranks=request.param)
    return [json.loads(Path(f"{out}.{rank}.json").read_text()) for rank in range(request.param)]


def test_every_row_comes_once(ranks):
    for row in (row for rank in ranks for row in rank):
        assert row["ids"] and row["rows"] and row["own_rows"], row["weight"]


def test_training_is_stocks(ranks):
    for row in (row for rank in ranks for row in rank):
        # what went before in slabs, and left nothing behind
        assert row["broken off"] == [2, 2]
        for mode in ("fused", "stationary", "copied", "carried"):
            # sums in another order
            assert row[mode]["losses"] == pytest.approx(row["stock"]["losses"], rel=1e-5), row["weight"]
            for mine, theirs in zip(row[mode]["weights"], row["stock"]["weights"], strict=True):
                assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-7), row["weight"]


def test_collectives_depend_on_the_weight_alone(ranks):
    for weights in zip(*ranks, strict=True):
        n_vocab, hidden, slab_bytes = weights[0]["weight"]
        # the same on every rank and in every step: with labels, without any, and where a rank has no tokens
        first = weights[0]["fused"]["collectives"][0]
        assert all(seen == first for row in weights for seen in row["fused"]["collectives"]), weights[0]["weight"]
        names = [name for name, _ in first]
        slabs = weights[0]["slabs"]
        # backward begins with the slabs that forward ended with
        assert names.count("all_gather_into_tensor") == 2 * slabs - min(KEPT_SLABS, slabs)
        assert names.count("reduce_scatter_tensor") == slabs
        # no slab is larger than asked for, beyond a row a rank, and the seam
        row_bytes = 4 * hidden * len(ranks)
        largest = max(4 * numel for name, numel in first if name == "reduce_scatter_tensor")
        assert largest <= max(slab_bytes, 3 * row_bytes)


def test_collectives_of_rows_that_stay_depend_on_the_most_tokens_too(ranks):
    n_ranks = len(ranks)
    for weights, kind in product(zip(*ranks, strict=True), ("stationary", "entropies", "class weights")):
        assert all(row[kind]["collectives"] == weights[0][kind]["collectives"] for row in weights)
        for step, seen in enumerate(weights[0][kind]["collectives"]):
            # tests/engine/slabs_ranks.py's batches; the last rank has none in the last step
            most = 3 + 2 * (n_ranks - 1) + step - (2 if step == 2 and n_ranks > 1 else 0)
            blocks = -(-most // max(1, 4 // n_ranks))
            names = [name for name, _ in seen]
            assert names.count("reduce_scatter_tensor") == blocks
            # of a block its tokens, and three numbers a token of each half; labels; the upstream gradients; pieces of
            # split rows
            n_vocab, hidden, _ = weights[0]["weight"]
            pieces = 2 * Shards(n_vocab, hidden, n_ranks).splits_rows
            gathers = (1 + min(2, n_ranks)) * blocks + 2 + pieces
            if kind != "stationary":
                # the forward makes no gradients, so the backward wants tokens again, and the pieces
                gathers += blocks + pieces // 2
            if kind == "class weights":
                # and those of the tokens
                gathers += 2
            assert names.count("all_gather_into_tensor") == gathers


def test_a_shape_is_cut_into_rows_that_are_there_once():
    cut = 0
    for n_vocab, hidden, n_ranks in product((2, 3, 10, 67, 100, 257, 50257), (1, 3, 8, 32), (1, 2, 3, 5, 8)):
        shards = Shards(n_vocab, hidden, n_ranks)
        if shards.why_uncut():
            continue
        cut += 1
        for slab_bytes in (0, 700, 10**9):
            cuts = shards.cuts(hidden, slab_bytes)
            ids, spans = shards.ids(cuts), shards.spans(cuts)
            assert torch.equal(ids.sort().values, torch.arange(n_vocab))
            assert [span.start for span in spans] == [0, *(span.stop for span in spans[:-1])]
            assert spans[-1].stop == n_vocab
        assert shards.seam_rows < 2 * n_ranks
        for rank in range(n_ranks):
            head, tail = shards.head(rank), shards.tail(rank)
            assert head.stop < hidden or head.stop == 0
            assert 0 <= tail.stop - tail.start < 2 * hidden
    assert cut > 80


# GPT-2, SmolLM2, Qwen2.5, Llama 3, Gemma: V, H over W ranks, and how many rows are in the seam
REAL = [
    (50257, 768, 2, 1),
    (49152, 576, 3, 0),
    (151936, 896, 5, 6),
    (128256, 4096, 8, 0),
    (256000, 2304, 7, 10),
    (50257, 768, 64, 81),
]


@pytest.mark.parametrize(("n_vocab", "hidden", "n_ranks", "seam"), REAL)
def test_the_shapes_of_real_models(n_vocab, hidden, n_ranks, seam):
    shards = Shards(n_vocab, hidden, n_ranks)
    assert shards.why_uncut() is None
    assert shards.seam_rows == seam < 2 * n_ranks
    cuts = shards.cuts(2 * hidden, 128 * 2**20)
    assert torch.equal(shards.ids(cuts).sort().values, torch.arange(n_vocab))
    sizes = [cut.stop - cut.start for cut in cuts]
    # both ends of a pass are exposed, so the first is a small one
    assert len(sizes) == 1 or 2 * sizes[0] < max(sizes) <= 128 * 2**20 // (2 * hidden * n_ranks)
    # sides of products
    assert all(n_ranks * size % 8 == 0 for size in sizes[1:-1])
    # heads, common rows and tails are all of every shard but the padding at the end
    parts = [
        shards.head(r).stop + shards.common * hidden + len(range(shards.size)[shards.tail(r)]) for r in range(n_ranks)
    ]
    assert parts[:-1] == [shards.size] * (n_ranks - 1)
    assert sum(parts) == n_vocab * hidden


# V, H over W ranks, and the rows of slabs of at most 132 MiB
IN_WAVES = [
    # Llama 3
    (128256, 4096, 4, [1536, 8448, *[16896] * 7]),
    (128256, 8192, 3, [1536, *[8448] * 15]),
    (128256, 4096, 64, [1536, 8448, *[16896] * 7]),
    # Qwen2.5, with 64 rows in the seam: what is left is nearly a wave, and where that is a slab, it comes in two
    (151936, 3584, 128, [8320, 8448, *[16896] * 8]),
    (151936, 8192, 4, [2816, 5504, *[8448] * 17]),
    # so much less than fits is not worth while
    (262144, 5376, 4, [2560, *[12544] * 20, 8704]),
]


@pytest.mark.parametrize(("n_vocab", "hidden", "n_ranks", "rows"), IN_WAVES)
def test_slabs_in_whole_waves(n_vocab, hidden, n_ranks, rows):
    cuts = Shards(n_vocab, hidden, n_ranks).cuts(2 * hidden, 132 * 2**20)
    assert [n_ranks * (cut.stop - cut.start) for cut in cuts] == rows
    assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]


def test_a_shape_that_is_too_small_says_so():
    assert Shards(67, 32, 2).why_uncut() is None
    assert "too small" in Shards(3, 32, 4).why_uncut()
    assert "too small" in Shards(1000, 2, 4).why_uncut()
    # P = 10: the second rank has the end of one row and the beginning of another
    assert "too small" in Shards(5, 8, 4).why_uncut()


def test_windows_are_five_slabs(ranks):
    for row in (row for rank in ranks for row in rank):
        assert row["windows"] == [5 * row["largest"], 0, 0]


def test_windows_of_tokens_are_those_of_the_largest_block(ranks):
    # of one rank the first step has 3 tokens, and memory for 4 comes beside that
    tokens = {1: 3 + 4}.get(len(ranks), 1)
    assert {row["blocks carried"] for rank in ranks for row in rank} == {tokens}


def test_what_two_losses_leave_in_windows_is_the_same_on_every_rank(ranks):
    for weights in zip(*ranks, strict=True):
        first, slabs = weights[0]["copied"]["collectives"][0], weights[0]["slabs"]
        assert all(seen == first for row in weights for seen in row["copied"]["collectives"]), weights[0]["weight"]
        # the second loss finds the last slabs of its forward, the first one none but what no window is needed for
        assert [name for name, _ in first].count("all_gather_into_tensor") == 4 * slabs - min(TURNS, slabs)
