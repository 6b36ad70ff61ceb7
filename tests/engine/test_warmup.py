"""``"warmup": true``: one rank of a host has kernels compiled, the others wait for it."""

from __future__ import annotations

import logging
import threading
from types import SimpleNamespace

import pytest
import torch
from torch import distributed as dist
from torch import nn
from transformers import LlamaConfig

from ds_fused.engine import warmup

BLOCK = {"enabled": True, "warmup": True}


class Model(nn.Module):
    config = LlamaConfig()


def engine(rank: int, device: str = "cuda") -> SimpleNamespace:
    return SimpleNamespace(
        device=torch.device(device),
        global_rank=rank,
        train_micro_batch_size_per_gpu=lambda: 4,
        zero_optimization_stage=lambda: 3,
    )


@pytest.fixture(autouse=True)
def host(monkeypatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(warmup, "target_here", lambda: "sm90")


def test_one_rank_compiles_and_the_others_wait(monkeypatch, capsys):
    events: list[object] = []
    both_wait = threading.Event()

    def compile(config: object, ds_config: dict, target: str, ranks: int, lora_ranks: list[int]) -> str:
        events.append((config.model_type, ds_config, target, ranks, lora_ranks))
        # until both others have said that they wait
        assert both_wait.wait(30)
        events.append("compiled")
        return "what was compiled\n"

    def count(message: str, *_: object) -> None:
        waiting.append(message)
        if len(waiting) == 2:
            both_wait.set()

    waiting: list[str] = []
    monkeypatch.setattr(warmup.log, "warning", count)
    monkeypatch.setattr(warmup, "_compile", compile)
    # each rank is a process, with a count of its own
    monkeypatch.setattr(warmup, "_made", iter([0, 0, 0]))

    def rank(i: int) -> None:
        warmup.warm_up(engine(i), Model(), BLOCK, torch.bfloat16)
        events.append(i)

    threads = [threading.Thread(target=rank, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all("waits for the warm-up" in message for message in waiting)
    asked, compiled, *ended = events
    expected = {"ds_fused": BLOCK, "train_micro_batch_size_per_gpu": 4, "bf16": {"enabled": True}}
    assert asked == ("llama", expected | {"zero_optimization": {"stage": 3}}, "sm90", 3, [])
    assert compiled == "compiled" and sorted(ended) == [0, 1, 2]
    assert capsys.readouterr().out == "what was compiled\n"


def test_a_failure_is_a_line_and_nobody_waits(monkeypatch, caplog):
    def compile(*_: object) -> str:
        raise RuntimeError("no space left")

    monkeypatch.setattr(warmup, "_compile", compile)
    monkeypatch.setattr(warmup, "_made", iter([0, 0]))
    with caplog.at_level(logging.WARNING, "ds_fused"):
        for rank in (0, 1):
            warmup.warm_up(engine(rank), Model(), BLOCK, torch.float16)
    assert "the warm-up failed: no space left" in caplog.text


@pytest.mark.parametrize(
    "device, model, reason",
    [("cpu", Model(), "there is no GPU"), ("cuda", nn.Linear(1, 1), "Linear has no config of HuggingFace's")],
)
def test_where_nothing_can_be_warmed_up_it_says_so(device, model, reason, monkeypatch, caplog):
    monkeypatch.setattr(warmup, "_compile", lambda *_: pytest.fail("compiled"))
    with caplog.at_level(logging.WARNING, "ds_fused"):
        warmup.warm_up(engine(0, device), model, BLOCK, torch.float32)
    assert f"no kernels are warmed up: {reason}" in caplog.text


def test_the_command_gets_the_config(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    # of the head alone: tests/test_warmup.py has layers compiled
    block = {"enabled": True, "verify": False, "rope": False, "rms_norm": False, "swiglu": False}
    said = warmup._compile(config, warmup._ds_config(engine(0), block, torch.bfloat16), "sm90", 2, [4])
    assert "LlamaForCausalLM in bfloat16 on sm90" in said and list(tmp_path.rglob("*.cubin"))
    # of the head's rows, which stay on their two ranks
    assert "_merge_kernel" in said
    # of an adapter on a layer
    assert "_narrow_times_kernel" in said
    with pytest.raises(RuntimeError, match="^ds_fused.warmup: ds_fused: unknown key 'speed'"):
        warmup._compile(config, {"ds_fused": {"speed": 1}}, "sm90", 1)
