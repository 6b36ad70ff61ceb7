"""How much is kept: by a table, and on a device whose memory a test makes up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_fused.modules import allotment
from ds_fused.modules.allotment import MEASURED, SHARE, STEP, Auto, Fixed, allot
from ds_fused.modules.exchange import ATTENTION, MATMUL
from ds_fused.modules.kept import Learnt, Recording

F, A, M = "full", "attention", "matmuls"


@pytest.mark.parametrize(
    "room, attention, matmuls, levels",
    [
        (0, [2, 2, 2], [9, 9, 9], [F, F, F]),
        (-5, [2, 2, 2], [9, 9, 9], [F, F, F]),
        # the last first
        (2, [2, 2, 2], [9, 9, 9], [F, F, A]),
        (5, [2, 2, 2], [9, 9, 9], [F, A, A]),
        (6, [2, 2, 2], [9, 9, 9], [A, A, A]),
        # attention of all before products of any
        (14, [2, 2, 2], [9, 9, 9], [A, A, A]),
        (15, [2, 2, 2], [9, 9, 9], [A, A, M]),
        (33, [2, 2, 2], [9, 9, 9], [M, M, M]),
        (1e9, [2, 2, 2], [9, 9, 9], [M, M, M]),
        # one that doesn't fit leaves its room to a smaller one
        (9, [2, 2, 2], [3, 9, 9], [M, A, A]),
        # a layer without attention, as Mamba's, and one of which nothing is known
        (7, [2, 0, 2], [3, 3, 9], [A, M, A]),
        (100, [0, 2, 0], [0, 3, 4], [F, M, M]),
        (100, [], [], []),
    ],
)
def test_allot(room, attention, matmuls, levels):
    assert allot(room, attention, matmuls) == levels


LAYERS = 3
# bytes for each token that a layer would keep
ATTENTION_BYTES, MATMUL_BYTES = 10, 100


class Device:
    """Memory in which a forward holds what it keeps and needs ``rise`` bytes a token beside it, but ``least``."""

    def __init__(self, total: int, held: int, rise: int, least: int = 0) -> None:
        self.total, self.now, self.rise, self.least = total, held, rise, least
        self.top = 10**9  # from loading the model, before anything trains
        self.short = 0

    def held(self) -> int:
        return self.now

    def peak(self) -> int:
        return self.top

    def forget_peak(self) -> None:
        self.top = self.now

    def available(self) -> int:
        return self.total

    def troubles(self) -> int:
        return self.short


class Training:
    def __init__(self, device: Device | None, monkeypatch, keep_bytes: int | None = None) -> None:
        self.device, self.told = device, []
        monkeypatch.setattr(allotment, "memory_of", lambda _: device)
        self.auto = Auto(LAYERS, keep_bytes, self.told.append)
        self.learnt = [Learnt() for _ in range(LAYERS)]

    def forward(self, tokens: int) -> list[Recording]:
        made = [self.auto.recording(i, self.learnt[i], torch.empty(1, tokens, 4)) for i in range(LAYERS)]
        for recording in made:
            # three calls, of which the repetition doesn't reach the last
            if recording.sizes is not None:
                recording.sizes += [(ATTENTION, ATTENTION_BYTES * tokens), (MATMUL, MATMUL_BYTES * tokens)]
                recording.sizes.append((MATMUL, 10**6))
        if self.device is not None:
            rise = max(self.device.least, self.device.rise * tokens)
            self.device.top = max(self.device.top, self.device.now + rise)
        return made

    def backward(self, made: list[Recording]) -> None:
        for i, recording in reversed(list(enumerate(made))):
            self.learnt[i].unread = 1
            if recording.ended is not None:
                recording.ended()
        made.clear()

    def step(self, tokens: int) -> list[str]:
        made = self.forward(tokens)
        kinds = [{frozenset(): F, frozenset({ATTENTION}): A}.get(recording.kinds, M) for recording in made]
        self.backward(made)
        return kinds


def test_first_steps_measure_and_then_as_much_is_kept_as_has_room(monkeypatch):
    # room at 100 tokens: 0.9 * 60000 - 20000 - 100 * 50 = 29000; a layer's attention 1000 and products 10000
    training = Training(Device(60_000, 20_000, 50), monkeypatch)
    assert [training.step(100) for _ in range(MEASURED)] == MEASURED * [[F, F, F]]
    assert training.told == []
    assert training.step(100) == [A, M, M]
    (line,) = training.told
    assert "at 100 tokens attention of 3 and products of 2 of 3 layers kept" in line
    assert str(training.auto) == line
    # much longer is measured too: 54000 - 20000 - 15000 = 19000 for 3000 and 30000 a layer
    assert training.step(300) == [F, F, F]
    assert training.step(300) == [A, A, A]
    # shorter: what was measured is as much as it needs
    assert training.step(10) == [M, M, M]
    # more than the device has
    assert training.step(1000) == [F, F, F]
    assert training.step(1000) == [F, F, F]
    # more is held by somebody else
    training.device.now += 20_000
    assert training.step(100) == [A, A, A]
    assert len(training.told) == 1


def test_what_a_length_needs_is_measured_and_not_only_in_proportion(monkeypatch):
    # what a short forward needs says little of a long one: at 100 tokens 12000 for weights, at 400 tokens no more
    training = Training(Device(60_000, 10_000, 30, least=12_000), monkeypatch)
    for _ in range(MEASURED):
        training.step(100)
    # a little longer is in proportion: 54000 - 10000 - 1.19 * 12000 = 29720 for 1190 and 11900 a layer
    assert training.step(119) == [A, M, M]
    assert training.step(400) == [F, F, F]
    # 54000 - 10000 - 12000 = 32000 for 4000 and 40000 a layer
    assert training.step(400) == [A, A, A]
    # and between: as little; 2000 and 20000 a layer
    assert training.step(200) == [A, A, M]
    assert training.step(119) == [A, M, M]
    # 480 / 400 * 12000 are taken to be needed, without a measurement
    assert training.step(480) == [A, A, A]


def test_between_two_lengths_the_rise_is_on_their_line(monkeypatch):
    training = Training(Device(60_000, 10_000, 50, least=5_000), monkeypatch)
    for tokens in (100, 100, 100, 500):
        training.step(tokens)
    # 5000 and 25000: 15000 at 300; 54000 - 10000 - 15000 = 29000 for 3000 and 30000 a layer
    assert training.auto._rise(300) == 15_000
    assert training.step(300) == [A, A, A]
    assert [training.auto._rise(tokens) for tokens in (1, 100, 500, 1000)] == [5_000, 5_000, 25_000, 50_000]


def test_what_the_first_step_makes_is_no_rise_of_the_others(monkeypatch):
    training = Training(Device(60_000, 20_000, 300), monkeypatch)
    training.step(100)
    training.device.rise = 50
    for _ in range(MEASURED - 1):
        training.step(100)
    assert training.step(100) == [A, M, M]


def test_an_evaluation_in_between_measures_nothing(monkeypatch):
    training = Training(Device(60_000, 20_000, 50), monkeypatch)
    for _ in range(5):
        training.forward(100).clear()  # gone without a backward
    assert training.step(100) == [F, F, F]
    training.step(100)
    training.step(100)
    assert training.step(100) == [A, M, M]


def test_an_empty_batch_measures_nothing(monkeypatch):
    training = Training(Device(60_000, 20_000, 50), monkeypatch)
    assert [training.step(tokens) for tokens in (0, 100, 0, 100, 100)] == 5 * [[F, F, F]]
    assert training.step(100) == [A, M, M]
    training.step(0)


def test_two_backwards_of_a_forward_measure_it_once(monkeypatch):
    training = Training(Device(60_000, 20_000, 50), monkeypatch)
    for _ in range(MEASURED - 1):
        made = training.forward(100)
        training.backward(list(made))
        training.backward(made)
        del made
    assert training.step(100) == [F, F, F]
    assert training.step(100) == [A, M, M]


def test_short_of_memory_less_is_planned_with(monkeypatch):
    training = Training(Device(60_000, 19_000, 50), monkeypatch)
    training.device.short = 4  # while the model was loaded
    for _ in range(MEASURED):
        training.step(100)
    assert training.step(100) == [A, M, M]
    training.device.short += 1
    # 0.85 * 60000 - 24000 = 27000
    assert training.step(100) == [A, M, M]
    training.device.short += 1
    # 0.8 * 60000 - 24000 = 24000, and 21000 after that
    assert training.step(100) == [A, M, M]
    training.device.short += 1
    assert training.step(100) == [A, A, M]
    assert sum("ran short of memory" in line for line in training.told) == 3
    assert f"{SHARE - 3 * STEP:.2f}" in training.told[-1]


def test_several_forwards_before_a_backward_keep_nothing(monkeypatch):
    training = Training(Device(10**9, 0, 50), monkeypatch)
    for _ in range(MEASURED):
        training.step(100)
    first = training.forward(100)
    assert all(recording.kinds for recording in first)
    second = training.forward(100)
    assert not any(recording.kinds for recording in second)
    training.backward(second)
    training.backward(first)
    assert training.step(100) == [F, F, F]
    assert "a forward began before the backward of another" in training.told[-1]


def test_where_nothing_is_known_of_memory_nothing_is_kept(monkeypatch):
    training = Training(None, monkeypatch)
    for _ in range(MEASURED + 1):
        assert training.step(100) == [F, F, F]
    assert training.told == ["nothing kept: nothing is known of the memory of cpu; say recompute.keep_mb"]


def test_a_cpu_tells_nothing_of_its_memory():
    assert allotment.memory_of(torch.device("cpu")) is None


def test_bytes_may_be_given(monkeypatch):
    training = Training(None, monkeypatch, keep_bytes=23_000)
    assert training.step(100) == [F, F, F]
    assert training.step(100) == [A, M, M]
    assert training.step(50) == [M, M, M]


def test_layers_that_are_skipped(monkeypatch):
    training = Training(None, monkeypatch, keep_bytes=10**6)
    x: Tensor = torch.empty(1, 100, 4)
    for _ in range(2):
        made = training.auto.recording(1, training.learnt[1], x)
        if made.sizes is not None:
            made.sizes.append((MATMUL, 1000))
            made.ended()
        kinds = made.kinds
        del made
    assert kinds == {ATTENTION, MATMUL}
    # of the others nothing is known
    assert training.step(100) == [F, M, F]


def test_fixed():
    assert Fixed("attention").recording(0, Learnt(), torch.empty(1)).kinds == {ATTENTION}
    assert Fixed("matmuls").recording(0, Learnt(), torch.empty(1)).kinds == {ATTENTION, MATMUL}
