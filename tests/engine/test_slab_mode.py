"""Every reason for which a weight is gathered whole in mode "stream", also those of engines that can't start here."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from torch import nn
from torch.nn.utils import parametrize, prune

from ds_fused.engine import agreement
from ds_fused.engine.zero3 import slab_mode
from ds_fused.engine.zero3.slab_mode import why_gather, why_not_looked_up

RANKS = 2
V, H = 64, 8


class SuperOffloadOptimizer_Stage3(DeepSpeedZeroOptimizer_Stage3):  # noqa: N801 (DeepSpeed's name)
    """By name; the real one starts on NVIDIA GPUs only."""


class MiCS_Optimizer(DeepSpeedZeroOptimizer_Stage3):  # noqa: N801 (DeepSpeed's name, up to 0.18)
    """By name; this version of DeepSpeed has none."""


def sharded(param: nn.Parameter, **more: object) -> nn.Parameter:
    param.ds_shape, param.ds_process_group, param.ds_persist = param.shape, None, False
    param.ds_tensor = SimpleNamespace(ds_numel=-(-param.numel() // RANKS))
    vars(param).update(more)
    return param


def engine_of(optimizer: type = DeepSpeedZeroOptimizer_Stage3, stage: int = 3, **more: object) -> SimpleNamespace:
    """What why_gather asks of an engine: ZeRO-3 and nothing else, but for ``more``."""
    of_optimizer = {"zenflow": False, "use_muon": False}
    made = object.__new__(optimizer)
    vars(made).update({name: more.pop(name, value) for name, value in of_optimizer.items()})
    said = {
        "zero_optimization_partition_weights": stage == 3,
        "zero_optimization_stage": stage,
        "zero_hpz_partition_size": 1,
        "zero_quantized_weights": False,
        "zero_quantized_nontrainable_weights": False,
        "zero_quantized_gradients": False,
        "zero_reduce_scatter": True,
        "zero_offload_param": None,
        "is_deepcompile_enabled": False,
        "autotp_size": 1,
        **more,
    }
    assert len(said) == 10, f"not asked: {more}"
    return SimpleNamespace(optimizer=made, **{name: lambda value=value: value for name, value in said.items()})


def head_of(n_vocab: int = V, **more: object) -> nn.Linear:
    head = nn.Linear(H, n_vocab, bias=False)
    sharded(head.weight, **more)
    return head


@pytest.fixture(autouse=True)
def two_ranks(monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: RANKS)


REASONS = [
    ({"stage": 2}, {}, "ZeRO stage 2 shards no weights"),
    ({"stage": 0}, {}, "ZeRO stage 0 shards no weights"),
    ({"optimizer": SuperOffloadOptimizer_Stage3}, {}, "the optimizer is SuperOffloadOptimizer_Stage3"),
    ({"optimizer": MiCS_Optimizer}, {}, "the optimizer is MiCS_Optimizer"),
    ({"zero_hpz_partition_size": 8}, {}, "zero_hpz_partition_size"),
    ({"zero_quantized_weights": True}, {}, "(zero_quantized_weights)"),
    ({"zero_quantized_nontrainable_weights": True}, {}, "(zero_quantized_nontrainable_weights)"),
    ({"zero_quantized_gradients": True}, {}, "(zero_quantized_gradients)"),
    # Muon asks for reduce_scatter off: the cause is named, not what it brings with it
    ({"use_muon": True, "zero_reduce_scatter": False}, {}, "Muon wants whole gradients"),
    ({"zero_reduce_scatter": False}, {}, "reduce_scatter is off"),
    ({"zero_offload_param": SimpleNamespace(device="nvme")}, {}, "offloaded to NVMe"),
    ({"is_deepcompile_enabled": True}, {}, "DeepCompile arranges the gathering"),
    ({"zenflow": True}, {}, "ZenFlow updates a part of the gradient"),
    ({"autotp_size": 2}, {}, "(autotp_size)"),
    ({}, {"ds_zero_placement_family": "autoep_expert"}, "AutoEP places it among the experts"),
    ({}, {"ds_persist": True}, "small enough to stay whole on every rank"),
    ({}, {"ds_z3_leaf_module": object()}, "ZeRO-3 leaf module"),
    ({}, {"ds_tensor": SimpleNamespace(ds_numel=7)}, "its shard has 7 elements where 256 were expected"),
    ({}, {"n_vocab": 1}, "a weight of 1 x 8 is too small to be cut over 2 ranks"),
]


@pytest.mark.parametrize(("of_engine", "of_weight", "words"), REASONS, ids=[row[-1] for row in REASONS])
def test_each_reason(of_engine, of_weight, words):
    assert words in why_gather(engine_of(**of_engine), head_of(**of_weight))


def test_without_a_reason_it_comes_in_slabs():
    assert why_gather(engine_of(), head_of()) is None
    assert why_gather(engine_of(zero_offload_param=SimpleNamespace(device="cpu")), head_of()) is None
    assert why_gather(engine_of(), head_of(ds_zero_placement_family="replicated")) is None


class Scaled(nn.Embedding):
    def forward(self, input):
        return torch.relu(nn.Embedding.forward(self, input))


LOOKUPS = [
    (Scaled(V, H), "it is a Scaled, which may do more than look up"),
    (nn.Embedding(V, H, max_norm=1.0), "max_norm"),
    (nn.Embedding(V, H, scale_grad_by_freq=True), "scale_grad_by_freq"),
    (nn.Embedding(V, H, sparse=True), "sparse"),
    (prune.identity(nn.Embedding(V, H), "weight"), "its weight is computed from other parameters"),
]


@pytest.mark.parametrize(("module", "words"), LOOKUPS, ids=[row[-1] for row in LOOKUPS])
def test_each_reason_of_an_embedding(module, words):
    assert words in why_not_looked_up(module)


def test_a_reason_of_one_rank_is_one_of_all(monkeypatch):
    """The ranks' own words, and which of them it was where others had nothing to say."""

    def everyone(*said: str | None) -> None:
        def gather(found: list, mine: str | None, group: object) -> None:
            found[:] = said

        monkeypatch.setattr(agreement.dist, "get_world_size", lambda group: len(said))
        monkeypatch.setattr(agreement.dist, "all_gather_object", gather)

    mode = object.__new__(slab_mode.SlabMode)
    for said, expected in (
        (("too small", "too small"), "too small"),
        ((None, "too small"), "too small (on rank 1 of 2)"),
    ):
        everyone(*said)
        assert mode._why_gather(engine_of(stage=2), head_of()) == expected


def test_each_weight_is_asked_whether_copy_engines_move_it(monkeypatch):
    monkeypatch.setattr(slab_mode, "first_of", lambda reason, group: reason)
    monkeypatch.setattr(slab_mode, "CopyEngines", object)
    why = {"all": None, "some": "the weights lie on 2 of 4 ranks"}
    monkeypatch.setattr(slab_mode.copy_engines, "why_no_engines", why.get)
    mode = object.__new__(slab_mode.SlabMode)
    mode._wants_engines, mode._mode, mode._engines = True, "stream", None
    everywhere, elsewhere = (head_of(ds_process_group=group).weight for group in why)
    engines, reason = mode._engines_for(everywhere)
    assert engines is not None and reason is None
    assert mode._engines_for(elsewhere) == (None, why["some"])
    # one communicator, for all of them
    assert mode._engines_for(everywhere) == (engines, None)


class Tower(nn.Module):
    """A part of a model that has no embedding, and says so as transformers' models do."""

    def get_input_embeddings(self):
        raise NotImplementedError


class Text(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.tower, self.embed, self.other = Tower(), embedding, nn.Embedding(V, H)

    def get_input_embeddings(self):
        return self.embed


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Embedding(V, H)


class Unread(nn.Module):
    """A parametrization that changes with each reading, as spectral_norm does."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        raise AssertionError("a weight was read")


def test_a_parametrized_table_is_not_read():
    embedding = nn.Embedding(V, H)
    parametrize.register_parametrization(embedding, "weight", Unread(), unsafe=True)
    mode = object.__new__(slab_mode.SlabMode)
    mode._embeddings, mode._heads = False, {}
    assert list(mode._tables(Text(embedding), [nn.Linear(H, V)])) == []
    assert "more than look up" in mode._why_gather(engine_of(), embedding, why_not_looked_up(embedding))


@pytest.mark.parametrize("embedding", [nn.Embedding(V, H), Wrapped()], ids=["plain", "wrapped"])
def test_the_input_embeddings_of_a_model_are_asked_for(embedding):
    """One that is wrapped as well: it is refused with a reason, not passed over."""
    mode = object.__new__(slab_mode.SlabMode)
    mode._embeddings, mode._heads = True, {}
    assert list(mode._tables(Text(embedding), [])) == [("embed", embedding)]
    assert (why_not_looked_up(embedding) is None) == isinstance(embedding, nn.Embedding)
