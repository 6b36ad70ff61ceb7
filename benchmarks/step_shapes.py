"""Models of the whole-step benchmark: real ones' sizes, random weights, sharded as they are built.

Weights are drawn from each one's name, so every way starts from the same ones, whatever its layers' classes are.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

SEED = 1234
# standard deviation of random weights; what the models' own configurations have
STD = 0.02


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal language model of one of transformers' types."""

    type: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    experts: int = 0  # of which two take a token
    more: Mapping[str, object] = field(default_factory=dict)

    def config(self) -> object:
        from transformers import AutoConfig

        # of generation; none: an embedding has no row of its own for it
        tokens = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
        experts = {"num_local_experts": self.experts} if self.experts else {}
        return AutoConfig.for_model(
            self.type,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=1 << 20,
            use_cache=False,
            **tokens,
            **experts,
            **self.more,
        )

    def step_flops(self, batch: int, length: int, lora: bool) -> float:
        """Of one step of one rank: what the model needs, without what checkpointing computes again.

        Products with weights cost 2 FLOPs a weight and token forward and 4 backward (2 where the weight is frozen: no
        gradient of its own); scores and values of causal attention, half a square of tokens, 2 and 4 a pair each.
        """
        taken = 2 if self.experts else 1
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + taken * 3 * self.hidden * self.intermediate + self.experts * self.hidden
        weights = self.layers * layer + self.vocab * self.hidden
        pairs = self.layers * self.heads * self.head_dim * 2 * length**2 / 2
        return batch * ((4 if lora else 6) * weights * length + 6 * pairs)


_LLAMA3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
_SMOLLM2 = {"rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "rms_norm_eps": 1e-5}
_QWEN3 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}
SHAPES: Mapping[str, Shape] = {
    # Llama-3-8B, and the same with half its layers
    "8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, more=_LLAMA3),
    "8b-16layers": Shape("llama", 4096, 14336, 16, 32, 8, 128, 128256, more=_LLAMA3),
    # Llama-3.2-1B
    "1b-tied": Shape("llama", 2048, 8192, 16, 32, 8, 64, 128256, tied=True, more=_LLAMA3),
    # Gemma-2B
    "gemma-256k": Shape("gemma", 2048, 16384, 18, 8, 1, 256, 256000, tied=True),
    # Qwen3-1.7B, whose attention has norms of q and k
    "qwen3-1.7b": Shape("qwen3", 2048, 6144, 28, 16, 8, 128, 151936, tied=True, more=_QWEN3),
    # Mixtral's form in a size of its own
    "moe": Shape("mixtral", 2048, 3584, 16, 32, 8, 64, 32000, experts=8),
    # SmolLM2-135M
    "smollm2": Shape("llama", 576, 1536, 30, 9, 3, 64, 49152, tied=True, more=_SMOLLM2),
    # shows that everything runs
    "tiny": Shape("llama", 64, 128, 2, 4, 2, 16, 259),
}


def shape_of(name: str, layers: int | None) -> Shape:
    shape = SHAPES[name]
    return shape if layers is None else replace(shape, layers=layers)


def built(
    shape: Shape,
    ds_config: Mapping[str, object],
    device: torch.device,
    lora: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """The model with random weights: under ZeRO-3 each is sharded as soon as it is made, so it is nowhere whole.

    zero.Init rounds the frequencies of a rotary embedding to the dtype of the training. A model in fp32 gets those that
    one in bf16 has, so that it is the same function.
    """
    import deepspeed
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    sharded = ds_config["zero_optimization"]["stage"] == 3
    place = deepspeed.zero.Init(config_dict_or_path=dict(ds_config)) if sharded else nullcontext()
    with no_init_weights(), device, place:
        model = AutoModelForCausalLM.from_config(shape.config(), dtype=dtype, attn_implementation="sdpa")
    # what is left out with the initialization
    model.tie_weights()
    if lora:
        model = _adapted(model)
    draw(model, rounded=dtype == torch.float32)
    if sharded and dtype == torch.float32:
        with deepspeed.zero.Init(config_dict_or_path={**ds_config, "bf16": {"enabled": True}}), device:
            twins = [(m, type(m)(m.config)) for m in model.modules() if "inv_freq" in m._buffers]
        for module, twin in twins:
            module.inv_freq.copy_(twin.inv_freq)
    return model.train()


def _adapted(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=projections, task_type="CAUSAL_LM"))


@torch.no_grad()
def draw(model: nn.Module, rounded: bool = False) -> None:
    """Normal weights; vectors (of norms) keep what their layers began with, and LoRA its zeros.

    ``rounded``: those that a model in bf16 has, in any dtype.
    """
    rank = torch.distributed.get_rank()
    for name, weight in model.named_parameters():
        shard = getattr(weight, "ds_tensor", None)
        if len(getattr(weight, "ds_shape", weight.shape)) < 2 or ".lora_B." in name:
            continue
        part = weight if shard is None else shard
        # by peft's name or the model's own: the same numbers
        seed = zlib.crc32(name.encode()) + SEED + (0 if shard is None else rank)
        drawn = torch.empty_like(part, dtype=torch.bfloat16) if rounded else part
        drawn.normal_(0.0, STD, generator=torch.Generator(part.device).manual_seed(seed))
        if rounded:
            part.copy_(drawn)


@torch.no_grad()
def load(model: nn.Module, folder: Path) -> None:
    """The weights of a saved model in place of those that were drawn, each gathered by itself."""
    import deepspeed
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        there = set(file.keys())
        for name, weight in model.named_parameters():
            sharded = hasattr(weight, "ds_tensor")
            shape = list(weight.ds_shape if sharded else weight.shape)
            found = file.get_slice(name).get_shape() if name in there else "not there"
            if found != shape:
                raise ValueError(f"--weights {folder.name}: {name} of the shape is {shape}, but the file's is {found}")
            with deepspeed.zero.GatheredParameters(weight, modifier_rank=0) if sharded else nullcontext():
                if not sharded or torch.distributed.get_rank() == 0:
                    weight.copy_(file.get_tensor(name))
