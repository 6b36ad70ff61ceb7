"""The repeated layers of a model are found by what they are."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from ds_fused.policies.blocks import blocks

SIZES = {
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "lfm2", "gpt_neox"]
)
def test_of_a_causal_model(kind):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES))
    found = blocks(model)
    assert [name.rpartition(".")[2] for name in found] == ["0", "1", "2"]
    assert len({name.rpartition(".")[0] for name in found}) == 1
    assert all(model.get_submodule(name) is layer for name, layer in found.items())


def test_within_a_wrapper():
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(target_modules=["q_proj"]))
    assert list(blocks(model)) == [f"base_model.model.model.layers.{i}" for i in range(3)]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(4))

    def forward(self, x):
        return sum(expert(x) for expert in self.experts)


@pytest.mark.parametrize(
    "layers, n",
    [
        ([Block(), Block()], 2),
        # one is not repeated, what has no children is a layer's part, and a list is not called
        ([Block()], 0),
        ([nn.Linear(2, 2), nn.Linear(2, 2)], 0),
        ([nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList([nn.Linear(2, 2)])], 0),
        # one layer in two places is one
        ([Block()] * 2, 0),
    ],
)
def test_of_a_list(layers, n):
    model = nn.Module()
    model.layers = nn.ModuleList(layers)
    found = blocks(model)
    # experts of a layer that is not repeated are the outermost list themselves
    assert sum(isinstance(layer, Block) for layer in found.values()) == n
