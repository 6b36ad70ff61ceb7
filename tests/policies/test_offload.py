"""Inputs of checkpointed layers that wait in the host's memory: the same losses and gradients to the last bit, and no
layer's input but the last one's on the device in between."""

from __future__ import annotations

import copy
import functools
import gc
import weakref

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ds_fused
from ds_fused.modules.memory import allotment, offload
from ds_fused.modules.memory.allotment import MEASURED, SHARE
from ds_fused.modules.memory.offload import OnHost
from tests.policies.test_recompute import (
    MODELS,
    PER_LAYER,
    assert_same,
    checkpointed,
    recordings,
    step,
    uncheckpointed,
)  # fmt: skip
from tests.policies.tiny import LAYERS, LLAMA, batch

OFFLOAD = {"offload": True}
LEVELS = [OFFLOAD, *({**given, **OFFLOAD} for given in ({"level": "attention"}, {"level": "matmuls"}, {"keep_mb": 0}))]


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch):
    monkeypatch.setattr(offload, "SMALL", 1)


def waiting() -> list[OnHost]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is OnHost]


def on_the_device(found: list[OnHost]) -> list[bool]:
    return [x._x is not None for x in found]


# every model with what is kept of itself, and one with each of the other levels
@pytest.mark.parametrize(
    ("name", "level"),
    [
        pytest.param(name, level, marks=[] if level is OFFLOAD or name == "experts" else [pytest.mark.all])
        for level in LEVELS
        for name in MODELS
    ],
    ids=str,
)
def test_a_step_is_stock_to_the_last_bit(name, level):
    model = checkpointed(MODELS[name]())
    stock, _ = step(model)
    report = ds_fused.apply(model, {}, recompute=level)
    for _ in range(2):
        assert_same(step(model)[0], stock)
    assert waiting() == []
    report.restore()
    assert_same(step(model)[0], stock)


def test_inputs_leave_the_device():
    model = checkpointed(LLAMA.make())
    report = ds_fused.apply(model, {}, recompute=OFFLOAD)
    said = "under gradient checkpointing: inputs, and what is kept of attention, wait in the host's memory"
    assert said in str(report)
    inputs: list[weakref.ref[Tensor]] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    loss = model(**batch()).loss
    assert len(inputs) == LAYERS >= 2
    assert [x() is not None for x in inputs] == [False] * LAYERS
    # what the last layer was given is held without its history
    assert sorted(on_the_device(waiting())) == [False] * (LAYERS - 1) + [True]
    size = batch()["input_ids"].numel() * model.config.hidden_size * 4
    assert [sum(piece.nbytes for piece in x._host) for x in waiting()] == [size] * LAYERS
    loss.backward()
    assert waiting() == []


def test_attention_waits_with_them_and_is_not_computed_again():
    model = checkpointed(LLAMA.make())
    stock, stock_ran = step(model)
    ds_fused.apply(model, {}, recompute={"level": "attention", **OFFLOAD})
    for _ in range(2):
        found, ran = step(model)
        assert_same(found, stock)
        assert (ran.attentions(), ran.products()) == (0, stock_ran.products())
    loss = model(**batch()).loss
    # an input, and of attention its output and the sums
    assert len(waiting()) == 3 * LAYERS and sum(on_the_device(waiting())) == 3
    assert [recording.kept_bytes() for recording in recordings()] == [0] * LAYERS
    loss.backward()
    assert waiting() == []


def test_attention_takes_no_room():
    model = checkpointed(LLAMA.make())
    stock, stock_ran = step(model)
    given = batch()
    rows, config = given["input_ids"].numel(), model.config
    kv = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    products = 4 * rows * (2 * config.hidden_size + 2 * kv + 2 * config.intermediate_size)
    report = ds_fused.apply(model, {}, recompute={"keep_mb": 1, **OFFLOAD})
    claim = report.claims[0]
    claim.allotment._keep_bytes = products  # room for one layer's
    step(model)
    for _ in range(2):
        found, ran = step(model)
        assert_same(found, stock)
    assert (ran.attentions(), ran.products()) == (0, stock_ran.products() - PER_LAYER)
    assert f"attention of {LAYERS} and products of 1 of {LAYERS} layers kept" in str(report)


def test_attention_written_over_in_place_is_computed_again():
    model = checkpointed(LLAMA.make())

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            with torch.no_grad():
                x.mul_(2)
            return y

    for layer in model.model.layers:
        layer.self_attn.o_proj.__class__ = Scaled
        layer.self_attn.o_proj.weight.requires_grad_(False)
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute={"level": "attention", **OFFLOAD})
    for _ in range(2):
        found, ran = step(model)
        assert_same(found, stock)
        assert ran.attentions() == LAYERS


@pytest.mark.parametrize("level", LEVELS[:2], ids=str)
def test_a_second_backward(level):
    model = checkpointed(LLAMA.make())
    stock, _ = step(model, retain=True)
    ds_fused.apply(model, {}, recompute=level)
    assert_same(step(model, retain=True)[0], stock)


def test_two_forwards_before_their_backwards():
    model = checkpointed(LLAMA.make())

    def gradients() -> list[Tensor]:
        model.zero_grad()
        losses = [model(**batch()).loss, 2 * model(**batch()).loss]
        for loss in losses:
            loss.backward()
        # one that is never gone back through
        _ = model(**batch()).loss
        return [p.grad.clone() for p in model.parameters()]

    stock = gradients()
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    for _ in range(2):
        assert_same(gradients(), stock)
    assert waiting() == []


class Card:
    """Memory of which nothing is needed beside what is kept."""

    def __init__(self) -> None:
        self.room = 2**40

    def available(self) -> float:
        return self.room / SHARE

    def held(self) -> int:
        return 0

    peak = troubles = held

    def forget_peak(self) -> None:
        pass


@pytest.fixture
def card(monkeypatch) -> Card:
    made = Card()
    monkeypatch.setattr(allotment, "memory_of", lambda _: made)
    return made


@pytest.fixture
def copies(monkeypatch) -> list[torch.Size]:
    """Of what was sent to the host."""
    made: list[torch.Size] = []
    in_memory = offload.Lane.room
    monkeypatch.setattr(offload.Lane, "room", lambda self, x: made.append(x.shape) or in_memory(self, x))
    return made


class Late(offload.Lane):
    """Copies when somebody waits for it, and no sooner; until then nothing of it is there."""

    def copy(self, into: list[Tensor], sources: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        for target in into:
            if target.is_floating_point():
                target.fill_(float("nan"))
        return list(zip(into, sources, strict=True))

    def wait(self, event: list[tuple[Tensor, Tensor]]) -> None:
        for target, source in event:
            target.copy_(source)
        event.clear()


FIT = {"level": "fit", "offload": "fit"}


@pytest.mark.parametrize("name", ["llama", "dropout in attention", "experts"])
def test_as_memory_allows_it_is_stock_to_the_last_bit(name, card, copies, monkeypatch):
    monkeypatch.setattr(offload, "Lane", Late)
    model = checkpointed(MODELS[name]())
    long = batch()
    short = {key: value[:, :6] for key, value in long.items()}
    stock = [step(model, given=given)[0] for given in (long, short)]
    report = ds_fused.apply(model, {}, recompute=FIT)
    allotted = report.claims[0].allotment

    def sent(given: dict[str, Tensor]) -> int:
        """By the forward of a step."""
        copies.clear()
        assert_same(step(model, given=given)[0], stock[given is short])
        return len(copies)

    for _ in range(MEASURED + 1):
        assert sent(long) == 0
    assert f"products of {LAYERS} of {LAYERS} layers kept" in str(report) and "on the host" not in str(report)
    # room for what three quarters of the tokens keep
    card.room = 0.75 * long["input_ids"].numel() * sum(allotted._attention + allotted._matmuls)
    # inputs, and of attention its output and the sums; with dropout nothing is kept of this
    of_long = LAYERS * (1 if "dropout" in name else 3)
    assert sent(long) == of_long  # measured
    for given in (long, short, long, short, short, long):
        assert sent(given) == (of_long if given is long else 0)
        assert ("inputs and attention on the host" in str(report)) == (given is long)
        with torch.no_grad():
            assert model(**given).loss.isfinite()
    assert waiting() == []
    # the memory of others is free again
    card.room = 2**40
    assert sent(long) == 0


def test_of_two_forwards_the_second_waits_on_the_host(card, copies):
    model = checkpointed(LLAMA.make())
    given = batch()

    def gradients() -> tuple[list[Tensor], list[int]]:
        model.zero_grad()
        copies.clear()
        first = model(**given).loss
        sent = [len(copies)]
        second = 2 * model(**given).loss
        sent.append(len(copies))
        first.backward()
        second.backward()
        return [p.grad.clone() for p in model.parameters()], sent

    stock, _ = gradients()
    ds_fused.apply(model, {}, recompute=FIT)
    for _ in range(MEASURED + 1):
        step(model)
    for sent in ([0, LAYERS], [LAYERS, 2 * LAYERS]):
        assert (found := gradients())[1] == sent
        assert_same(found[0], stock)
    assert waiting() == []


def test_lora_and_frozen_embeddings():
    peft = pytest.importorskip("peft")
    model = checkpointed(peft.get_peft_model(LLAMA.make(), peft.LoraConfig(target_modules=["q_proj", "down_proj"])))
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    assert_same(step(model)[0], stock)


def test_layers_of_two_stacks_that_return_tuples():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    model = checkpointed(transformers.T5ForConditionalGeneration(config))
    ids = torch.randint(2, 64, (2, 9))
    given = {"input_ids": ids, "labels": ids}
    stock, _ = step(model, given=given)
    report = ds_fused.apply(model, {}, recompute=OFFLOAD)
    assert sorted(len(claim.paths) for claim in report.claims) == [2, 2]
    assert_same(step(model, given=given)[0], stock)
    report.restore()
    # room is made in one stack
    report = ds_fused.apply(model, {}, recompute={"keep_mb": 1, "offload": "auto"})
    (claim,) = report.claims
    for room, on_host in ((2**20, False), (1, True), (2**20, False)):
        claim.allotment._keep_bytes = room
        for _ in range(2):
            assert_same(step(model, given=given)[0], stock)
        assert claim.allotment.on_host == on_host


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(7, 10),
        lambda: torch.randn(7, 10).t(),
        lambda: torch.randn(2, 3, 5, 4).transpose(1, 2),
        lambda: torch.randn(7, 20)[:, ::2],
        lambda: torch.randn(7, 1).expand(7, 10),
        lambda: torch.randn(8, 10)[1:],
        lambda: torch.randn(0, 10),
        lambda: torch.randn(()),
    ],
)
def test_what_comes_back_is_what_left(make, monkeypatch):
    monkeypatch.setattr(offload, "PIECE", 36)  # nine numbers
    stack, x = offload.Offload(), make()
    group = stack.begin()
    sent = group.sent((x, 3), [])
    next_one = stack.begin()  # lets the first go
    if isinstance(sent[0], OnHost):
        assert sent[0]._x is None
        assert all(piece.numel() <= 9 for piece in sent[0]._host)
    for _ in range(2):
        back, three = offload.taken(sent)
        assert three == 3 and torch.equal(back, x) and back.dtype == x.dtype
        assert back.is_contiguous() or back.stride() == x.stride()
    del next_one


class Named(nn.Module):
    """A model that gives its layers all they need by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states=x, scale=2.0)
        return x


class Layer(transformers.modeling_layers.GradientCheckpointingLayer):
    gradient_checkpointing = True

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
        self.spoils = False

    def forward(self, hidden_states: Tensor, scale: float) -> Tensor:
        y = scale * self.linear(hidden_states).relu()
        if self.spoils:
            with torch.no_grad():
                hidden_states.add_(1)
        return y


def test_what_is_given_by_name():
    torch.manual_seed(0)
    model = Named().train()
    x = torch.randn(5, 4, requires_grad=True)

    def gradients(on_host: int) -> list[Tensor]:
        y = model(x)
        assert len(waiting()) == on_host
        return list(torch.autograd.grad(y.square().sum(), [x, *model.parameters()]))

    stock = gradients(on_host=0)
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    assert_same(gradients(on_host=3), stock)


def test_an_input_that_is_changed_in_place_is_an_error():
    torch.manual_seed(0)
    model = Named().train()
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    # the last layer's, and one that has left the device since
    for i in (2, 1):
        model.layers[i].spoils = True
        y = model(torch.randn(5, 4, requires_grad=True))
        with pytest.raises(RuntimeError, match=r"recompute\.offload: the input \(5, 4\) .* was changed in place"):
            y.sum().backward()
        model.layers[i].spoils = False


def test_a_copy_offloads_too():
    model = checkpointed(LLAMA.make())
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    assert_same(step(model)[0], stock)
    copied = copy.deepcopy(model)
    for each in (copied, model):
        assert_same(step(each)[0], stock)
        given = batch()
        loss = each(**given).loss
        assert len(waiting()) == LAYERS
        del loss
    assert copied.model.layers[0].fused_offload is not model.model.layers[0].fused_offload


def test_a_host_without_memory_is_an_error(monkeypatch):
    model = checkpointed(LLAMA.make())
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    size = 4 * batch()["input_ids"].numel() * model.config.hidden_size
    # of the first forward of that length each layer asks; who comes again has his memory
    left, asked = [offload.LEFT + size] * 2, []
    monkeypatch.setattr(offload, "available_bytes", lambda: asked.append(None) or left[0])
    for _ in range(2):
        assert_same(step(model)[0], stock)
    assert len(asked) == model.config.num_hidden_layers
    left[0] -= 1
    longer = {name: x.repeat(1, 2) for name, x in batch().items()}
    with pytest.raises(RuntimeError, match=r"recompute.offload: no .* MiB more .* are left, of which 1024 are for"):
        model(**longer)
    # what was not taken is not given back
    assert_same(step(model)[0], stock)
    assert waiting() == []


def test_without_gradients_nothing_leaves():
    model = checkpointed(LLAMA.make())
    given = batch()
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    with torch.no_grad():
        kept = model(**given).loss
    assert waiting() == [] and kept.isfinite()
    assert_same(step(uncheckpointed(model))[0], step(model)[0])


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_forwards_on_the_device_and_on_the_host_by_turns_on_a_gpu():
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8}
    model = checkpointed(LLAMA.make(torch.bfloat16, **sizes).cuda())
    ids = torch.randint(3, 128, (4, 1024), device="cuda")
    given = {"input_ids": ids, "labels": ids}
    stock, _ = step(model, given=given)
    report = ds_fused.apply(model, {}, recompute={"keep_mb": 1, "offload": "auto"})
    allotted, found = report.claims[0].allotment, []
    # one after the other without waiting for the device; 2**26: for one or two layers' products
    for keep_bytes in (0, 0, 2**40, 0, 2**40, 2**26, 2**26, 0, 2**40):
        allotted._keep_bytes = keep_bytes
        found.append((step(model, given=given)[0], allotted.on_host))
    for gradients, _ in found:
        assert_same(gradients, stock)
    assert [on_host for _, on_host in found[1:]] == [True, False, True, False, True, True, True, False]


@pytest.mark.gpu
def test_memory_and_bits_on_a_gpu():
    """Layers' inputs are most of what a forward leaves; two of them at most are on the device."""
    layers, rows = 8, 4096
    sizes = {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 512}
    model = checkpointed(LLAMA.make(torch.bfloat16, **sizes).cuda())
    ids = torch.randint(0, model.config.vocab_size, (1, rows), device="cuda")
    size = rows * 256 * 2

    def run() -> tuple[list[Tensor], int]:
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = model.model(ids).last_hidden_state.float().square().mean()
        held = torch.cuda.memory_allocated() - before
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.model.parameters())], held

    run()
    stock, held = run()
    ds_fused.apply(model, {}, recompute=OFFLOAD)
    for _ in range(5):
        found, now = run()
        assert_same(found, stock)
    # the last layer's input is what else there is of theirs
    assert held - now >= (layers - 1.5) * size
