"""How much is kept: by a table, and on a device whose memory a test makes up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ds_fused.modules.memory import allotment
from ds_fused.modules.memory.allotment import MEASURED, SHARE, STEP, Auto, Fixed, allot
from ds_fused.modules.memory.intercept import ATTENTION, MATMUL
from ds_fused.modules.memory.kept import Learnt, Recording
from ds_fused.modules.memory.rise import Rise

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
    """Memory in which a forward holds what it keeps and needs ``rise`` bytes a token beside it, but ``least``; and
    ``inputs`` more where these are not on the host."""

    def __init__(self, total: int, held: int, rise: int, least: int = 0, inputs: int = 0) -> None:
        self.total, self.now, self.rise, self.least, self.inputs = total, held, rise, least, inputs
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
    def __init__(
        self, device: Device | None, monkeypatch, keep_bytes: int | None = None, on_host: bool | None = False
    ) -> None:
        self.device, self.told = device, []
        monkeypatch.setattr(allotment, "memory_of", lambda _: device)
        self.auto = Auto(LAYERS, keep_bytes, self.told.append, on_host=on_host)
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
            rise += 0 if self.auto.on_host else self.device.inputs * tokens
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
    assert training.step(300) == [A, A, A]
    assert f"where {29_000 / 2**20:.4g} have room" in str(training.auto)


def test_a_rise():
    rise = Rise()
    assert not rise.covers(0) and not rise.covers(1)
    for tokens, n_bytes in ((100, 4_000), (500, 25_000), (100, 5_000), (100, 3_000)):
        rise.measured(tokens, n_bytes)
    assert [rise.of(tokens) for tokens in (0, 1, 100, 300, 500, 1000)] == [5e3, 5e3, 5e3, 15e3, 25e3, 50e3]
    assert [rise.covers(tokens) for tokens in (0, 100, 600, 601)] == [True, True, True, False]


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
    # as the allocator changes from what it had in store for steps that were measured
    training.device.short += 1
    assert training.step(100) == [A, M, M]
    assert not any("ran short of memory" in line for line in training.told)
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


def side(training: Training, tokens: int) -> tuple[bool, list[str]]:
    """Of a step: whether inputs and attention were on the host, and the levels."""
    levels = training.step(tokens)
    return training.auto.on_host, levels


HERE, HOST = False, True


def test_where_everything_has_room_nothing_goes_to_the_host(monkeypatch):
    # at 100 tokens 54000 - 10000 - 100 * (20 + 30) = 39000 for 3 * (1000 + 10000)
    training = Training(Device(60_000, 10_000, 20, inputs=30), monkeypatch, on_host=None)
    assert "on the host where not all has room" in str(training.auto)
    assert [side(training, 100) for _ in range(MEASURED)] == MEASURED * [(HERE, [F, F, F])]
    assert [side(training, 100) for _ in range(2)] == 2 * [(HERE, [M, M, M])]
    (line,) = training.told
    assert line == str(training.auto) and "on the host" not in line


def test_where_not_everything_has_room_inputs_and_attention_go_to_the_host(monkeypatch):
    # at 100 tokens 54000 - 21000 - 5000 = 28000 are too little for 33000
    training = Training(Device(60_000, 21_000, 20, inputs=30), monkeypatch, on_host=None)
    for _ in range(MEASURED):
        assert side(training, 100) == (HERE, [F, F, F])
    # what is needed there is measured, and attention, which needs no room, kept
    assert side(training, 100) == (HOST, [A, A, A])
    assert training.told == []
    # 54000 - 21000 - 2000 = 31000 for 3 * 10000
    assert side(training, 100) == (HOST, [M, M, M])
    (line,) = training.told
    kept, room = f"{30_000 / 2**20:.4g}", f"{31_000 / 2**20:.4g}"
    assert (
        f"products of 3 of 3 layers kept, {kept} MiB where {room} have room; inputs and attention on the host" in line
    )
    # 700 + 7000 a layer, where 54000 - 21000 - 3500 = 29500 have room
    assert side(training, 70) == (HERE, [M, M, M])
    assert training.told[1:] == [str(training.auto)] and "on the host" not in str(training.auto)
    assert side(training, 100) == (HOST, [M, M, M])
    # less is held
    training.device.now = 10_000
    assert side(training, 100) == (HERE, [M, M, M])
    assert len(training.told) == 2


def test_a_batch_too_long_for_the_device_is_not_tried_there(monkeypatch):
    training = Training(Device(60_000, 10_000, 20, inputs=30), monkeypatch, on_host=None)
    for _ in range(MEASURED + 1):
        training.step(100)
    # 44000 - 10000 = 34000 are too little for 66000: measured, on the host, where 44000 - 4000 have room for 20000 each
    assert [side(training, 200) for _ in range(2)] == [(HOST, [A, A, A]), (HOST, [A, M, M])]
    # twice as long: 44000 - 8000 have room for 40000 each
    assert [side(training, 400) for _ in range(2)] == [(HOST, [A, A, A]), (HOST, [A, A, A])]
    # and back: longer than what was measured on the device, and measured there as it has room: 44000 - 6050 for 39930
    training.device.now = 8_000
    assert [side(training, 121) for _ in range(2)] == [(HERE, [F, F, F]), (HERE, [M, M, M])]
    # no longer than what was measured on the host: 46000 - 4000 for 15000 each
    assert side(training, 150) == (HOST, [A, M, M])


def test_a_batch_that_seemed_too_long_by_short_ones_comes_back_from_the_host(monkeypatch):
    # what ten tokens need is weights: 12000, and 300 for inputs; in proportion 73800 at 60 tokens
    training = Training(Device(60_000, 10_000, 30, least=12_000, inputs=30), monkeypatch, on_host=None)
    for _ in range(MEASURED):
        training.step(10)
    assert side(training, 60) == (HOST, [A, A, A])
    # 44000 - 12000 - 3 * 16 * 60 have room for 19800
    assert [side(training, 60) for _ in range(2)] == [(HERE, [F, F, F]), (HERE, [M, M, M])]


def test_a_forward_that_is_gone_leaves_the_next_its_choice(monkeypatch):
    training = Training(Device(60_000, 10_000, 20, inputs=30), monkeypatch, on_host=None)
    for _ in range(MEASURED):
        training.step(100)
    for tokens in (200, 0):
        training.forward(tokens).clear()
        assert training.auto.on_host == (tokens == 200)
    assert side(training, 100) == (HERE, [M, M, M])
    assert side(training, 200) == (HOST, [A, A, A])
    # an empty batch where there is no room at all
    training.device.now = 60_000
    assert side(training, 0)[0] == HOST and side(training, 100) == (HOST, [A, A, A])


def test_all_on_the_host(monkeypatch):
    training = Training(Device(60_000, 10_000, 20, inputs=30), monkeypatch, on_host=True)
    # attention is known after the first
    assert [side(training, 100)[1] for _ in range(MEASURED)] == [[F, F, F], *(MEASURED - 1) * [[A, A, A]]]
    assert side(training, 100) == (HOST, [M, M, M])
    assert f"where {42_000 / 2**20:.4g} have room; inputs and attention on the host" in str(training.auto)


def test_bytes_that_are_given_choose_too(monkeypatch):
    training = Training(None, monkeypatch, keep_bytes=23_000, on_host=None)
    assert side(training, 100) == (HERE, [F, F, F])
    assert side(training, 100) == (HOST, [A, M, M])
    assert side(training, 50) == (HERE, [M, M, M])
    assert side(training, 100) == (HOST, [A, M, M])


@pytest.mark.parametrize("on_host", [False, True, None])
def test_of_several_forwards_the_later_ones_inputs_wait_where_they_may(monkeypatch, on_host):
    training = Training(Device(10**9, 0, 50, inputs=30), monkeypatch, on_host=on_host)
    for _ in range(MEASURED + 1):
        training.step(100)
    first = training.forward(100)
    assert training.auto.on_host == (on_host is True)
    second = training.forward(100)
    assert training.auto.on_host == (on_host is not False) and not any(recording.kinds for recording in second)
    training.backward(second)
    training.backward(first)
    assert side(training, 100) == (on_host is not False, [F, F, F])
    assert ("inputs and attention on the host" in training.told[-1]) == (on_host is not False)


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
    training = Training(None, monkeypatch, on_host=None)
    for _ in range(MEASURED + 1):
        assert side(training, 100) == (HERE, [F, F, F])
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
