"""The hook on DeepSpeedEngine, seen from two CPU ranks: swap, report, agreement, errors, ZeRO-3 reads."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime import constants

import ds_fused
from ds_fused.engine import hooks, initialize
from tests.launching import launch


@pytest.fixture(scope="module")
def outputs() -> list[str]:
    return [e.output for e in launch(Path(__file__).with_name("engine_ranks.py"), ranks=2)]


@pytest.fixture(scope="module")
def cases(outputs) -> list[dict[str, dict]]:
    """Per rank: case -> what it said."""
    lines = [[json.loads(line[5:]) for line in o.splitlines() if line.startswith("SAID ")] for o in outputs]
    return [{said.pop("case"): said for said in rank} for rank in lines]


def test_without_a_block_nothing_of_us_is_imported(cases):
    for rank in cases:
        assert rank["disabled"] == {"ours": ["ds_fused.autoload", "ds_fused.engine", "ds_fused.engine.hooks"]}


@pytest.mark.parametrize("stage", [0, 3])
def test_fused_trains_as_stock(cases, stage):
    for rank in cases:
        stock, fused = rank[f"stock {stage}"], rank[f"fused {stage}"]
        assert fused["losses"] == pytest.approx(stock["losses"], rel=1e-5)
        # read after a fused loss, by every rank
        assert fused["logits"] == pytest.approx(stock["logits"], rel=1e-4)
        assert fused["replaced"]["rms_norm"] == 5
        assert fused["replaced"]["fused_linear_cross_entropy"] == 1
        assert fused["undone"] == fused["silent"] == 0


def test_engine_compile_makes_one_graph(cases):
    for rank in cases:
        stock, compiled = rank["stock 0"], rank["compiled"]
        assert compiled["losses"] == pytest.approx(stock["losses"], rel=1e-5)
        assert compiled["logits"] == pytest.approx(stock["logits"], rel=1e-4)
        assert compiled["graphs"] == 1 and stock["graphs"] == 0


def test_logits_kept(cases):
    for rank in cases:
        assert rank["keep 3"]["logits"] == pytest.approx(rank["stock 3"]["logits"], rel=1e-4)


def test_zero3_logits_read_on_one_rank_only(cases):
    assert '"logits": "keep"' in cases[0]["read_alone"]["alone"]
    assert "on 1 of 2 ranks within 1 s" in cases[0]["read_alone"]["alone"]
    assert "alone" not in cases[1]["read_alone"]
    for rank in cases:
        assert rank["read_alone"]["together"] == [2, 12]


def test_zero3_logits_read_while_the_head_is_on_its_way(cases):
    for rank in cases:
        assert rank["in_flight"] == {"before": "INFLIGHT", "after": "AVAILABLE", "read": [2, 12]}


def test_config_class_by_position(cases):
    assert [rank["by_position"] for rank in cases] == [{"stock": False}] * 2


def test_a_malformed_block(cases):
    for rank in cases:
        assert rank["malformed_here"]["error"].startswith("ValueError: ds_fused: unknown key 'rms_nrom'")


def test_a_block_malformed_on_one_rank(cases):
    assert cases[1]["malformed_on_one"]["error"].startswith("ValueError: ds_fused.strict must be")
    assert "rank 1 failed: ValueError: ds_fused.strict" in cases[0]["malformed_on_one"]["error"]


def test_ranks_that_decide_differently(cases):
    for rank in cases:
        assert "the ranks decided differently" in rank["other_ops_on_one"]["error"]
        assert "rank 1 has decisions.claims" in rank["other_ops_on_one"]["error"]
        assert rank["other_ops_on_one"]["stock"]


def test_strict_and_nothing_matched(cases):
    for rank in cases:
        assert rank["strict"]["error"].startswith("ValueError")
        assert "rms_norm" in rank["strict"]["error"]


def test_strict_goes_by_what_the_block_names(cases):
    for rank in cases:
        assert set(rank["strict_without_norms"]["replaced"]) == {
            "rope", "swiglu", "cross_entropy", "fused_linear_cross_entropy"
        }  # fmt: skip
        assert "strict, and nothing matched geglu" in rank["strict_by_name"]["error"]
        # nor what a profile adds
        assert "matched geglu," not in rank["strict_by_name"]["error"]


def test_a_model_outlives_an_engine_that_failed(cases):
    for rank in cases:
        assert "NoSuchOptimizer" in rank["broken_engine"]["error"]
        assert rank["broken_engine"]["stock"]
        assert "undone by something else before deepspeed.initialize ended" in rank["failed_at_the_end"]["error"]
        assert rank["failed_at_the_end"]["stock"]
        assert rank["failed_at_the_end"]["kept"] == [0, None]


@pytest.mark.parametrize("layers", ["default", "listed"])
def test_what_autocast_sends_in_lower_precision_is_stocks(cases, layers):
    for rank in cases:
        stock = rank["autocast"][f"{layers}, stock"]
        # linear layers, the head among them; listed, the embedding and the norms, too
        assert "lm_head.weight" in stock["marked"]
        assert len(stock["marked"]) == {"default": 15, "listed": 21}[layers]
        for mode in ("fused", "gather"):
            fused = rank["autocast"][f"{layers}, {mode}"]
            assert not fused["stock"]
            assert fused["marked"] == stock["marked"]
            # half an ulp of bf16, in which the products are rounded
            assert fused["losses"] == pytest.approx(stock["losses"], rel=4e-3)


def test_the_pipeline_engine(cases):
    for rank in cases:
        assert rank["pipeline"] == {"replaced": {"rms_norm": 1}}


def test_the_report_is_printed_by_rank_0_alone(outputs):
    # fused 0 and 3, read_alone, in_flight, by_position, pipeline; not "keep 3", which says "report": false
    assert outputs[0].count("layers replaced in") == 6
    assert "layers replaced in" not in outputs[1]
    assert "no GPU: on CPU tensors every op runs its PyTorch reference" in outputs[0]


@pytest.mark.parametrize(
    ("on", "expected"),
    [
        ("fp16_enabled", torch.float16),
        ("bfloat16_enabled", torch.bfloat16),
        ("torch_autocast_enabled", torch.bfloat16),
        ("none", torch.float32),
    ],
)
def test_the_dtype_that_layers_will_compute_in(on, expected):
    names = ("fp16_enabled", "bfloat16_enabled", "torch_autocast_enabled")
    engine = SimpleNamespace(**{name: lambda name=name: name == on for name in names})
    engine.torch_autocast_dtype = lambda: torch.bfloat16
    assert initialize.training_dtype(engine) is expected


def fake_engine_module():
    class DeepSpeedEngine:
        is_broken = False

        def __init__(self, args, model, config_class=None):
            self.args = args
            self.global_rank = 0
            self.pipeline_parallelism = False
            self._configure_distributed_model(model)

        def _configure_distributed_model(self, model):
            self.module = model

        def destroy(self):
            if self.is_broken:
                raise RuntimeError("half of it is gone")

        def __del__(self):
            self.destroy()

    return SimpleNamespace(DeepSpeedEngine=DeepSpeedEngine)


def test_hooking_twice_is_hooking_once():
    module = fake_engine_module()
    hooks.hook(module)
    once = dict(vars(module.DeepSpeedEngine))
    hooks.hook(module)
    assert vars(module.DeepSpeedEngine) == once


def test_an_engine_that_never_comes_by_says_so():
    module = fake_engine_module()
    hooks.hook(module)

    class Other(module.DeepSpeedEngine):
        def _configure_distributed_model(self, model):
            self.module = model

    with pytest.raises(RuntimeError, match="Other builds its model without"):
        Other(None, None, SimpleNamespace(_param_dict={"ds_fused": {"enabled": True}}))


@pytest.mark.parametrize("name", ["_configure_distributed_model", "destroy", "__del__"])
def test_half_a_hook_is_none(name):
    """A DeepSpeed whose engine no longer has the method that the swap goes before, or another one of ours."""
    module = fake_engine_module()
    delattr(module.DeepSpeedEngine, name)
    init = module.DeepSpeedEngine.__init__
    with pytest.raises(AttributeError):
        hooks.hook(module)
    assert module.DeepSpeedEngine.__init__ is init


def test_an_engine_that_goes_hands_back_what_it_holds():
    """After stock's own, also where that fails; collected as garbage, without the other ranks."""
    module, closed = fake_engine_module(), []
    hooks.hook(module)
    stock, fused = (module.DeepSpeedEngine(None, "a model") for _ in range(2))
    fused._ds_fused_slab_mode = SimpleNamespace(close=lambda together: closed.append(together))
    stock.destroy()
    fused.destroy()
    assert closed == [True]
    fused.is_broken = True
    with pytest.raises(RuntimeError, match="half of it is gone"):
        fused.destroy()
    fused.is_broken = False
    fused.__del__()
    assert closed == [True, True, False]


def test_without_triton_the_error_says_so(monkeypatch):
    module = fake_engine_module()
    hooks.hook(module)
    monkeypatch.setitem(sys.modules, "triton", None)
    config = SimpleNamespace(_param_dict={"ds_fused": {"enabled": True}})
    with pytest.raises(RuntimeError, match="ds_fused is enabled .* Triton can't be imported"):
        module.DeepSpeedEngine(None, None, config)


@pytest.mark.parametrize("name", ["ds_fusd", "ds-fused", "DS_Fused", "dsfused", "_ds_fused"])
def test_a_name_like_ours_is_said(name, caplog):
    assert hooks._block_of({"train_batch_size": 1, name: {"enabled": True}}) is hooks._ABSENT
    assert caplog.messages == [f'ds_fused: the configuration has "{name}" and no "ds_fused": no layer is replaced']
    # nor is anything said beside the right one, or of DeepSpeed's
    caplog.clear()
    assert hooks._block_of({name: 1, "ds_fused": 2}) == 2
    names = [value for value in vars(constants).values() if isinstance(value, str) and value.islower()]
    assert len(names) > 50 and hooks._block_of(dict.fromkeys(names)) is hooks._ABSENT
    assert not caplog.messages


def test_an_engine_is_destroyed_where_a_layer_was_given_another_class(caplog):
    """As nn.utils.parametrize does it: no error of a job that is done."""
    model = torch.nn.ModuleList([torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)])
    report = ds_fused.apply(model)
    torch.nn.utils.parametrize.register_parametrization(model[0], "weight", torch.nn.Identity())
    destroyed = []
    hooks._wrapped_destroy(destroyed.append)(SimpleNamespace(ds_fused_report=report))
    assert len(destroyed) == 1 and type(model[1]) is torch.nn.LayerNorm
    assert "not all layers could be given back: unswap: ParametrizedLayerNorm was given another class" in caplog.text


def test_another_engine_over_shared_layers_says_what_the_first_one_loses(caplog):
    """A policy and a critic with one trunk. The same model once more, or more around it, loses nothing."""
    module = fake_engine_module()
    hooks.hook(module)
    trunk = torch.nn.LayerNorm(4)
    policy = torch.nn.Sequential(trunk, torch.nn.LayerNorm(4))
    for second, said in ((policy, 0), (torch.nn.ModuleList([policy]), 0), (torch.nn.ModuleList([trunk]), 1)):
        report = ds_fused.apply(policy)
        hooks._reports.add(report)
        caplog.clear()
        module.DeepSpeedEngine(None, second)
        assert caplog.text.count("are also those of a Sequential, another engine's model") == said
        assert type(policy[0]) is type(policy[1]) is torch.nn.LayerNorm and not report.claims
