"""Layers that keep a part of their forward under gradient checkpointing: the same losses and gradients to the last bit,
fewer products in backward, and no more bytes than was said."""

from __future__ import annotations

import copy
import functools
import gc
from collections import Counter

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ds_fused
from ds_fused.modules.layers.tiled_mlp import TiledMLP
from ds_fused.modules.memory import intercept
from ds_fused.modules.memory.allotment import MEASURED
from ds_fused.modules.memory.kept import Recording
from ds_fused.modules.memory.recompute import FUNCTION, Recompute
from ds_fused.policies.recompute import Recomputing, recomputing
from tests.policies.tiny import LAYERS, LLAMA, NAMED, batch

KEPT = ["attention", "matmuls", {"keep_mb": 1}, {"keep_mb": 0}]
PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten._grouped_mm.default")
# of Llama: q, k, v and o, gate and up; the repetition ends before down
PER_LAYER = 6


class Counting(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops[str(op)] += 1
        return op(*args, **(kwargs or {}))

    def products(self) -> int:
        return sum(self.ops[name] for name in PRODUCTS)

    def attentions(self) -> int:
        return sum(n for name, n in self.ops.items() if "_scaled_dot_product_" in name and "backward" not in name)


def checkpointed(model: nn.Module, **options: object) -> nn.Module:
    model.gradient_checkpointing_enable({"use_reentrant": False, **options})
    return model.train()


def step(model: nn.Module, retain: bool = False, given: dict[str, Tensor] | None = None) -> tuple[list, Counting]:
    """The loss and all gradients, and what ran in backward."""
    model.zero_grad()
    torch.manual_seed(3)  # of dropout
    loss = model(**(given or batch())).loss
    with Counting() as counting:
        loss.backward(retain_graph=retain)
        if retain:
            loss.backward()
    drawn = torch.rand(1)
    return [loss.detach(), drawn, *(p.grad.clone() for p in model.parameters() if p.grad is not None)], counting


def assert_same(got: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(got) == len(wanted) > 2
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


MODELS = {
    "llama": LLAMA.make,
    # without an attention mask that sdpa is given, it is one op on the CPU as well
    "dropout in attention": lambda: LLAMA.make(attention_dropout=0.2),
    "dropout behind the last product": lambda: NAMED["Phi"].make(resid_pdrop=0.2),
    "biases": lambda: NAMED["Qwen2"].make(),
    "experts": lambda: NAMED["Mixtral"].make(),
    "grouped experts": lambda: NAMED["Qwen3Moe"].make(experts_implementation="grouped_mm"),
    "experts in a loop": lambda: NAMED["Qwen3Moe"].make(experts_implementation="eager"),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("level", KEPT, ids=str)
def test_a_step_is_stock_to_the_last_bit(name, level):
    model = checkpointed(MODELS[name]())
    # fused layers in both: what is compared is what is kept
    ds_fused.apply(model)
    stock, stock_ran = step(model)
    report = ds_fused.apply(model, {}, recompute=level)
    # the first step learns what a repetition needs, the second makes use of it
    for _ in range(3):
        found, ran = step(model)
        assert_same(found, stock)
    if level == "matmuls":
        assert ran.products() < stock_ran.products()
        assert ran.products() == step(uncheckpointed(model))[1].products()
    report.restore()


def uncheckpointed(model: nn.Module) -> nn.Module:
    made = copy.deepcopy(model)
    made.gradient_checkpointing_disable()
    return made


def test_what_is_kept_is_not_computed_again():
    model = checkpointed(LLAMA.make())
    ran = {}
    for level in ("full", *KEPT[:2]):
        report = ds_fused.apply(model, {}, recompute=level)
        step(model)
        ran[level] = step(model)[1]
        report.restore()
    stock = step(model)[1].products()
    assert [ran[level].products() for level in ran] == [stock, stock, stock - PER_LAYER * LAYERS]
    assert [ran[level].attentions() for level in ran] == [LAYERS, 0, 0]


def recordings() -> list[Recording]:
    gc.collect()
    return [x for x in gc.get_objects() if type(x) is Recording]


def test_what_is_kept_is_what_was_said_and_is_gone_after_the_backward():
    model = checkpointed(LLAMA.make())
    ds_fused.apply(model, recompute="matmuls")
    step(model)
    given = batch()
    loss = model(**given).loss
    rows, config = given["input_ids"].numel(), model.config
    kv = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    # q, o and attention; k and v; gate and up; attention's log-sum-exp
    widths = 3 * config.hidden_size + 2 * kv + 2 * config.intermediate_size + config.num_attention_heads
    found = recordings()
    assert [recording.kept_bytes() for recording in found] == LAYERS * [4 * rows * widths]
    del found
    loss.backward()
    assert recordings() == []


def test_a_second_backward_computes_all_of_it_again():
    model = checkpointed(LLAMA.make())
    stock, _ = step(model, retain=True)
    ds_fused.apply(model, dict.fromkeys(("rms_norm",), True), recompute="matmuls")
    step(model)
    found, _ = step(model, retain=True)
    fused, _ = step(uncheckpointed(model), retain=True)
    assert_same(found, fused)
    assert torch.allclose(found[0], stock[0])


def test_results_written_over_in_place_are_computed_again():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mul_(2)

    model = checkpointed(LLAMA.make())
    for layer in model.model.layers:
        layer.mlp.up_proj.__class__ = Scaled
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute="matmuls")
    for _ in range(2):
        assert_same(step(model)[0], stock)


def test_a_last_product_that_comes_to_be_needed_is_computed():
    model = checkpointed(NAMED["Phi"].make(resid_pdrop=0.0))
    ds_fused.apply(model, {}, recompute="matmuls")
    step(model)
    for p in (0.5, 0.0):
        for layer in model.model.layers:
            layer.resid_dropout.p = p
        found, _ = step(model)
        assert_same(found, step(uncheckpointed(model))[0])


class LastLinear(torch.autograd.Function):
    """As ZeRO-3's: what backward needs is saved when the product has been made."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x.matmul(weight.t())
        if bias is not None:
            y += bias
        return y

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        rows = dy.flatten(0, -2)
        return dy @ weight, rows.t() @ x.flatten(0, -2), None if bias is None else rows.sum(0)


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_that_saves_late_is_not_computed_for_nothing(monkeypatch, family, bias):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias=None: LastLinear.apply(x, weight, bias))
    model = checkpointed(NAMED[family].make(**({"mlp_bias": bias} if family == "Llama" else {})))
    stock, ran = step(model)
    counts = []
    for level in KEPT[:2]:
        report = ds_fused.apply(model, {}, recompute=level)
        for _ in range(3):
            found, ran_now = step(model)
            assert_same(found, stock)
        counts.append(ran.products() - ran_now.products())
        report.restore()
    # down is put off for good, in both
    assert counts == [LAYERS, LAYERS * (PER_LAYER + 1)]


def test_a_product_put_off_is_computed_where_it_is_read(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias=None: LastLinear.apply(x, weight, bias))
    model = checkpointed(NAMED["Phi"].make(resid_pdrop=0.0))
    ds_fused.apply(model, {}, recompute="attention")
    step(model)
    for layer in model.model.layers:
        layer.resid_dropout.p = 0.5
    found, _ = step(model)
    assert_same(found, step(uncheckpointed(model))[0])


def test_autocast():
    model = checkpointed(LLAMA.make())
    with torch.autocast("cpu", torch.bfloat16):
        stock, _ = step(model)
        ds_fused.apply(model, {}, recompute="matmuls")
        for _ in range(2):
            found, ran = step(model)
            assert_same(found, stock)
    assert ran.attentions() == 0


NOTHING = {"level": "fit", "keep_mb": 0}
TILES = 3


def down_rows(model: nn.Module) -> list[int]:
    """Filled with how many rows each call of the first layer's last product has."""
    rows: list[int] = []
    mlp = next(module for module in model.modules() if isinstance(module, TiledMLP))
    mlp.down_proj.register_forward_hook(lambda module, args, y: rows.append(y.shape[-2]))
    return rows


@pytest.mark.parametrize("level", ["matmuls", "attention", NOTHING], ids=str)
def test_tiled_mlps_run_twice(level):
    model = checkpointed(LLAMA.make())
    ds_fused.apply(model, {"swiglu": True}, tiles=TILES)
    rows, tokens = down_rows(model), batch()["input_ids"].numel()
    stock, stock_ran = step(model)
    assert sum(rows) == 3 * tokens
    report = ds_fused.apply(model, {}, recompute=level)
    assert_same(step(model)[0], stock)
    for _ in range(2):
        rows.clear()
        found, ran = step(model)
        assert_same(found, stock)
        assert sum(rows) == 2 * tokens and len(rows) == 2 * TILES
    # gate, up and down; of q, k, v and o what is kept
    spared = LAYERS * (3 * TILES + (4 if level == "matmuls" else 0))
    assert stock_ran.products() - ran.products() == spared
    report.restore()
    assert_same(step(model)[0], stock)


def test_a_tiled_mlp_whose_result_is_read_is_computed():
    # behind it is a norm, which keeps it
    model = checkpointed(NAMED["Gemma2"].make())
    ds_fused.apply(model, {"geglu": True}, tiles=TILES)
    rows, tokens = down_rows(model), batch()["input_ids"].numel()
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute=NOTHING)
    for _ in range(3):
        rows.clear()
        assert_same(step(model)[0], stock)
        assert sum(rows) == 3 * tokens


def test_a_tiled_mlp_that_comes_to_be_needed_is_computed():
    model = checkpointed(LLAMA.make())
    reads = False
    for layer in model.model.layers:
        # what is saved are the values
        layer.mlp.register_forward_hook(lambda module, args, y: torch.dropout(y.sin(), 0.5, True) if reads else y)
    ds_fused.apply(model, {"swiglu": True}, tiles=TILES)
    wanted = {}
    for reads in (False, True):
        wanted[reads] = step(model)[0]
    ds_fused.apply(model, {}, recompute=NOTHING)
    for reads in (False, False, True, True, False, False):
        assert_same(step(model)[0], wanted[reads])


def test_tiled_mlps_under_autocast():
    model = checkpointed(LLAMA.make())
    ds_fused.apply(model, {"swiglu": True}, tiles=TILES)
    with torch.autocast("cpu", torch.bfloat16):
        stock, _ = step(model)
        ds_fused.apply(model, {}, recompute=NOTHING)
        for _ in range(2):
            assert_same(step(model)[0], stock)


def test_tiled_mlps_with_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj", "down_proj"], lora_dropout=0.2)
    model = peft.get_peft_model(LLAMA.make(), config)
    model.enable_input_require_grads()
    model = checkpointed(model)
    ds_fused.apply(model, {"swiglu": True}, tiles=TILES)
    rows, tokens = down_rows(model), batch()["input_ids"].numel()
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute=NOTHING)
    for again in (3, 2, 2):
        rows.clear()
        assert_same(step(model)[0], stock)
        assert sum(rows) == again * tokens


def test_with_nothing_to_keep_every_stack_leaves_out_what_nobody_reads():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    report = ds_fused.apply(transformers.T5ForConditionalGeneration(config), {}, recompute=NOTHING)
    assert sorted(len(claim.paths) for claim in report.claims) == [2, 3]
    assert not [row for row in report.left if "largest stack" in row.reason]
    assert "nothing kept, and what nobody reads is not computed again" in str(report)


def test_lora():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(LLAMA.make(), peft.LoraConfig(target_modules=["q_proj", "down_proj"], lora_dropout=0.2))
    model.enable_input_require_grads()
    model = checkpointed(model)
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute="matmuls")
    for _ in range(2):
        assert_same(step(model)[0], stock)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("last", ["down_proj", "q_proj"])
def test_a_layer_and_its_adapter_are_kept_as_one(last, dropout):
    peft = pytest.importorskip("peft")
    targets = list(dict.fromkeys(("q_proj", "up_proj", last)))
    config = peft.LoraConfig(target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    model = peft.get_peft_model(LLAMA.make(), config)
    model.enable_input_require_grads()
    model = checkpointed(model)
    report = ds_fused.apply(model, {"lora": True})
    assert [(claim.key, len(claim.paths)) for claim in report.claims] == [("lora", len(targets) * LAYERS)]
    stock, stock_ran = step(model)
    ds_fused.apply(model, {}, recompute="matmuls")
    for _ in range(2):
        found, ran = step(model)
        assert_same(found, stock)
    # of a layer with an adapter x A^T alone is computed again, also of down_proj, behind which the repetition ends
    assert stock_ran.products() - ran.products() == LAYERS * (PER_LAYER + (last == "down_proj"))
    added = "aten.addmm_.default"
    assert ran.ops[added] == stock_ran.ops[added] - LAYERS * len(targets)


def test_layers_that_return_tuples():
    config = transformers.T5Config(
        vocab_size=64,
        d_model=16,
        d_ff=24,
        d_kv=8,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    model = checkpointed(transformers.T5ForConditionalGeneration(config))
    ids = torch.randint(2, 64, (2, 9))
    given = {"input_ids": ids, "labels": ids}
    stock, stock_ran = step(model, given=given)
    ds_fused.apply(model, {}, recompute="matmuls")
    for _ in range(2):
        found, ran = step(model, given=given)
        assert_same(found, stock)
    assert ran.products() < stock_ran.products()


def test_without_gradients_and_in_eval_nothing_is_kept():
    model = checkpointed(LLAMA.make())
    given = batch()
    with torch.no_grad():
        stock = model(**given).logits
    ds_fused.apply(model, {}, recompute="matmuls")
    with torch.no_grad():
        assert torch.equal(model(**given).logits, stock)
    model.eval()
    assert torch.equal(model(**given).logits, stock)
    assert recordings() == []
    ids = given["input_ids"][:, :4]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > 4


def test_functions_of_torch_are_exchanged_while_a_layer_runs_only():
    places = [(home, name) for home, name, _ in intercept.PLACES]
    before = {(home, name): getattr(__import__(home, fromlist=[name]), name, None) for home, name in places}
    model = checkpointed(LLAMA.make())
    ds_fused.apply(model, {}, recompute="matmuls")
    seen = []
    layer = model.model.layers[0]
    layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(torch.nn.functional.linear))
    step(model)
    assert seen and all(function is not before["torch.nn.functional", "linear"] for function in seen)
    assert before == {key: getattr(__import__(key[0], fromlist=["x"]), key[1], None) for key in before}

    def fail(*_: object) -> None:
        raise KeyError("in a layer")

    layer.mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(KeyError):
        step(model)
    assert before == {key: getattr(__import__(key[0], fromlist=["x"]), key[1], None) for key in before}


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"context_fn": torch.utils.checkpoint.noop_context_fn}])
def test_other_checkpointing_stays_and_that_is_said(options, caplog):
    model = checkpointed(LLAMA.make(), **options)
    stock, stock_ran = step(model)
    ds_fused.apply(model, {}, recompute="matmuls")
    from ds_fused.ops.common._say import say_once

    say_once.cache_clear()
    found, ran = step(model)
    assert_same(found, stock)
    assert ran.products() == stock_ran.products()
    assert "use_reentrant=False, and nothing of it is kept" in caplog.text


def test_checkpointing_may_be_switched_on_and_off_behind_it():
    model = LLAMA.make().train()
    report = ds_fused.apply(model, {}, recompute="matmuls")
    plain, _ = step(model)
    checkpointed(model)
    step(model)
    found, ran = step(model)
    assert_same(found, plain)
    model.gradient_checkpointing_disable()
    assert_same(step(model)[0], plain)
    checkpointed(model)
    report.restore()
    layer = model.model.layers[0]
    assert not isinstance(layer, Recompute) and type(layer).__name__ == "LlamaDecoderLayer"
    assert isinstance(vars(layer)[FUNCTION], functools.partial)
    assert vars(layer)[FUNCTION].func is torch.utils.checkpoint.checkpoint
    _, again = step(model)
    assert again.products() == ran.products() + PER_LAYER * LAYERS


def test_a_compiled_model_is_compiled_as_without():
    found = []
    for level in ("full", "matmuls"):
        model = checkpointed(LLAMA.make(use_cache=False))
        ds_fused.apply(model, {}, recompute=level)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(2):
            model.zero_grad()
            loss = compiled(**batch()).loss
            loss.backward()
        outcome = [loss.detach(), *(p.grad for p in model.parameters())]
        found.append((outcome, torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    (stock, graphs), (kept_outcome, kept_graphs) = found
    assert_same(kept_outcome, stock)
    assert kept_graphs == graphs == 1


def test_a_copy_keeps_too():
    model = checkpointed(LLAMA.make())
    stock, _ = step(model)
    ds_fused.apply(model, {}, recompute={"keep_mb": 1})
    for _ in range(2):
        assert_same(step(model)[0], stock)
    copied = copy.deepcopy(model)
    for each in (copied, model):
        assert_same(step(each)[0], stock)


def test_the_report_says_what_is_kept(caplog):
    model = checkpointed(LLAMA.make())
    report = ds_fused.apply(model, {}, recompute={"level": "auto", "keep_mb": 1})
    assert "which the first steps measure" in str(report)
    for _ in range(2):
        step(model)
    said = f"at 22 tokens attention of {LAYERS} and products of {LAYERS} of {LAYERS} layers kept"
    assert said in str(report) and said in caplog.text
    assert "recompute: no layer of those that transformers would checkpoint" in str(
        ds_fused.apply(nn.Linear(2, 2), {}, recompute="matmuls")
    )


def test_only_the_largest_stack_makes_room():
    config = transformers.T5Config(
        vocab_size=64, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_decoder_layers=3, num_heads=2
    )
    report = ds_fused.apply(transformers.T5ForConditionalGeneration(config), {}, recompute={"keep_mb": 1})
    assert [len(claim.paths) for claim in report.claims] == [3]
    assert [row.count for row in report.left if "largest stack" in row.reason] == [2]


@pytest.mark.parametrize(
    "given, wanted",
    [
        ("full", Recomputing()),
        ({}, Recomputing()),
        ("auto", Recomputing("auto")),
        ("fit", Recomputing("auto")),
        ({"level": "fit", "keep_mb": 5}, Recomputing("auto", 5)),
        ({"keep_mb": 5}, Recomputing("auto", 5)),
        ({"level": "matmuls"}, Recomputing("matmuls")),
        ({"offload": True}, Recomputing("full", None, True)),
        ({"keep_mb": 0, "offload": True}, Recomputing("auto", 0, True)),
        ({"level": "fit", "offload": "fit"}, Recomputing("auto", None, "auto")),
        ({"keep_mb": 7, "offload": "auto"}, Recomputing("auto", 7, "auto")),
    ],
)
def test_values(given, wanted):
    assert recomputing(given) == wanted


@pytest.mark.parametrize(
    "given, says",
    [
        (True, 'must be .*"fit" or an object of level, keep_mb, offload, got True'),
        ("some", "must be \"full\" or .*got 'some'"),
        ({"kept": 1}, "unknown key 'kept'; known keys: level, keep_mb, offload"),
        ({"keep_mb": -1}, "recompute.keep_mb must be an integer, at least 0, got -1"),
        ({"keep_mb": 1.5}, "got 1.5"),
        ({"offload": 1}, 'recompute.offload must be true or false or "auto" or "fit", got 1'),
        ({"offload": "host"}, "recompute.offload must be true or .*, got 'host'"),
        ({"offload": "auto"}, "recompute.offload 'auto' goes by the room that level \"auto\" finds, .* level 'full'"),
        ({"level": "matmuls", "offload": "fit"}, "recompute.offload 'fit' goes by the room .* level 'matmuls'"),
        ({"level": "fit", "keep_mb": 0, "offload": "fit"}, "'fit' goes by the room .* got it with keep_mb 0"),
        ({"level": "full", "keep_mb": 1}, "is for the level \"auto\", got it with 'full'"),
    ],
)
def test_malformed_values(given, says):
    with pytest.raises(ValueError, match=says):
        ds_fused.apply(nn.Linear(2, 2), {}, recompute=given)


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_on_a_gpu_as_much_is_kept_as_has_room():
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    model = checkpointed(LLAMA.make(torch.bfloat16, **sizes).cuda())
    ids = torch.randint(3, 128, (2, 512), device="cuda")
    given = {"input_ids": ids, "labels": ids}
    ds_fused.apply(model)
    stock, stock_ran = step(model, given=given)
    for level in ("attention", "matmuls", "auto"):
        report = ds_fused.apply(model, {}, recompute=level)
        for _ in range(MEASURED + 1):
            found, ran = step(model, given=given)
        assert_same(found, stock)
        assert ran.attentions() == 0
        assert stock_ran.products() - ran.products() == (0 if level == "attention" else 4 * PER_LAYER)
        assert level != "auto" or "products of 4 of 4 layers kept" in str(report)
        report.restore()


@pytest.mark.gpu
@pytest.mark.usefixtures("deterministic")
def test_tiled_mlps_run_twice_on_a_gpu():
    model = checkpointed(LLAMA.make(torch.bfloat16, hidden_size=256, intermediate_size=512).cuda())
    ids = torch.randint(3, 128, (2, 512), device="cuda")
    given = {"input_ids": ids, "labels": ids}
    ds_fused.apply(model, tiles=TILES)
    rows = down_rows(model)
    stock, _ = step(model, given=given)
    ds_fused.apply(model, {}, recompute=NOTHING)
    for again in (3, 2, 2):
        rows.clear()
        assert_same(step(model, given=given)[0], stock)
        assert sum(rows) == again * ids.numel()


def test_layers_that_are_not_ours_to_change_are_left():
    model = checkpointed(LLAMA.make())
    layer = model.model.layers[0]
    layer.forward = layer.forward
    stock, _ = step(model)
    report = ds_fused.apply(model, {}, recompute="matmuls")
    assert [claim.paths for claim in report.claims] == [("model.layers.1",)]
    assert [(row.what, row.count) for row in report.left if "forward of its own" in row.reason] == [
        ("LlamaDecoderLayer", 1)
    ]
    assert_same(step(model)[0], stock)
