"""Models that PyTorch's FSDP2 shards, before or after they are fused: they train as stock, and what is left is said."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import ds_fused
from tests.launching import launch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
# a model, and what of it is replaced besides norms and the head
MODELS = {
    "dense": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), {"rope", "swiglu"}),
    "mixture": (lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MIXTURE)), {"qk_norm_rope", "experts"}),
}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, mesh: DeviceMesh, head_alone: bool) -> None:
    for layer in (*model.model.layers, *([model.lm_head] if head_alone else []), model):
        fully_shard(layer, mesh=mesh)


def step(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.arange(18).view(2, 9)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {
        name: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for name, p in model.named_parameters()
    }


@pytest.mark.parametrize("head_alone", [False, True])
@pytest.mark.parametrize("fused_first", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_trains_as_stock(kind, fused_first, head_alone, mesh):
    torch.manual_seed(0)
    make, keys = MODELS[kind]
    stock = make()
    model = copy.deepcopy(stock)
    if fused_first:
        report = ds_fused.apply(model)
        shard(model, mesh, head_alone)
    else:
        shard(model, mesh, head_alone)
        report = ds_fused.apply(model)
    found = {claim.key: claim for claim in report.claims}
    assert keys | {"rms_norm"} <= found.keys()
    torch.testing.assert_close(step(model), step(stock))
    head = found.get("fused_linear_cross_entropy")
    if fused_first:
        assert head.site.scope.fused
    else:
        assert head is None and "head lm_head: its weight is a DTensor of torch.float32" in str(report)


def test_logits_are_read_when_their_weight_is_sharded_again():
    ended = launch(Path(__file__).with_name("fsdp_ranks.py"), ranks=2)
    lines = [line for each in ended for line in each.output.splitlines() if line.startswith("SAID ")]
    first, second = (json.loads(line.removeprefix("SAID ")) for line in lines)
    for rank in (first, second):
        for dtype, tolerance in (("fp32", 1e-5), ("bf16", 3e-2)):
            for key in ("defer", "keep"):
                assert rank[f"{dtype} {key}"] == pytest.approx(rank[f"{dtype} stock"], rel=tolerance)
    assert "on 1 of 2 ranks within 1 s. Under FSDP" in first["alone"] and second["alone"] == ""
