"""The model by which mode "auto" chooses, and the choice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ds_fused.engine.figures import Figures, Rates, chosen, of_stationary, of_stream

V, H, W, SLAB = 128256, 4096, 4, 16384
MB = 2**20
# about those of an H100 and its NVLink
RATES = Rates(flops=720e12, wire=200e9)


class Slabs(SimpleNamespace):
    def __len__(self) -> int:
        return 8


def stream(most: int, keep_mb: int = 0, ranks: int = W, trained: bool = True) -> Figures:
    slabs = Slabs(shape=(V, H), dtype=torch.bfloat16, slab_rows=SLAB, ranks=ranks, requires_grad=trained)
    return of_stream(slabs, most, 512 * MB, keep_mb * MB, RATES)


def stationary(most: int, ranks: int = W, trained: bool = True, offloaded: bool = False) -> Figures:
    shard = SimpleNamespace(shape=(V, H), dtype=torch.bfloat16, ranks=ranks, requires_grad=trained)
    shard.shards, shard.is_offloaded = SimpleNamespace(size=V * H // ranks), offloaded
    return of_stationary(shard, most, 512 * MB, RATES)


def test_bytes_on_the_wire():
    # two gathers and a reduce-scatter of what the other three ranks have, but for one slab; whatever the tokens are
    assert stream(8192).wire == stream(1).wire == (3 * V - SLAB) * H * 2 * 3 // 4
    # a frozen head is gathered once
    assert stream(8192, trained=False).wire == V * H * 2 * 3 // 4
    # x of three ranks, and their parts of dx in fp32; the rest is little
    assert stationary(8192).wire == pytest.approx(3 * 8192 * H * 6, rel=1e-2)
    assert stream(8192, ranks=1).wire == stationary(8192, ranks=1).wire == 0


def test_time():
    products = 2 * 8192 * V * H / RATES.flops  # of one of the three: 2 MHV
    wire = stream(8192).wire / RATES.wire
    assert stream(8192).seconds == pytest.approx(4 * products + wire)
    assert stream(8192, keep_mb=4096).seconds == pytest.approx(3 * products + wire)
    assert stationary(8192).seconds == pytest.approx(3 * products + stationary(8192).wire / RATES.wire)
    assert stationary(8192, trained=False).seconds < stationary(8192).seconds


def test_bytes_held():
    slab = 16384 * H * 2
    assert stream(8192).held >= 4 * slab
    assert stream(8192, keep_mb=4096).held - stream(8192).held == pytest.approx(8192 * V * 2 - 2**27, rel=0.2)
    dw = V * H // W * 4
    assert stationary(8192).held - stationary(8192, trained=False).held == dw
    assert stationary(8192, offloaded=True).held - stationary(8192).held == dw // 2
    assert stationary(65536).held == pytest.approx(stationary(8192).held, rel=0.1)


def test_the_choice():
    def way(mode: str, held: int, seconds: float) -> Figures:
        return Figures(mode, "", held, 0, seconds)

    small, quick = way("stream", 1, 2.0), way("stationary", 3, 1.0)
    assert chosen([small, quick], free=10) is quick
    assert chosen([small, quick], free=2) is small
    assert chosen([small, quick], free=0) is small  # none fits
    # as good as equal
    assert chosen([way("stream", 1, 1.04), quick], free=10).mode == "stream"


def test_tokens_travel_on_few_ranks_and_the_weight_on_many():
    few = [stream(8192), stationary(8192)]
    many = [stream(8192, keep_mb=4096, ranks=256), stationary(8192, ranks=256)]
    assert chosen(few, float("inf")).mode == "stationary"
    assert chosen(many, float("inf")).mode == "stream"


def test_a_line_of_figures():
    assert str(Figures("stream", "8 slabs", 3 * 2**30, 2**20, 0.0123)) == (
        "stream (8 slabs, 3,072 MiB held, 1 MiB on the wire, 12.3 ms)"
    )
