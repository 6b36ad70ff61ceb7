"""Rotary frequencies that zero.Init has rounded: found, said, computed again and put back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ds_fused.engine.zero3.frequencies import _off, claims_of

SCALED = {"rope_type": "linear", "rope_theta": 1e4, "factor": 8.0}


def llama(**more: object) -> LlamaRotaryEmbedding:
    return LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=1, **more))


def rounded(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> nn.ModuleDict:
    """As zero.Init leaves it, in a model."""
    return nn.ModuleDict({"rotary": module.to(dtype), "other": nn.Linear(2, 2, dtype=dtype)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "made",
    [llama, lambda: llama(rope_parameters=SCALED), lambda: Gemma3RotaryEmbedding(Gemma3TextConfig(head_dim=32))],
    ids=["llama", "scaled", "gemma3, of two kinds of layers"],
)
def test_frequencies_are_computed_again_and_put_back(made, dtype):
    wanted, model = dict(made().named_buffers()), rounded(made(), dtype)
    were = dict(model.rotary.named_buffers())
    x, places = torch.ones(1, 9, 2), torch.arange(4000, 4009)[None]
    ((claim,), left) = claims_of(model, wanted=True)
    assert left == [] and claim.paths == ("rotary",) and claim.original.endswith(type(model.rotary).__name__)
    assert not claim.in_place() and claim.prove(torch.device("cpu"), dtype) is None
    claim.commit()
    now = dict(model.rotary.named_buffers())
    assert claim.in_place() and now.keys() == wanted.keys() == were.keys()
    assert all(torch.equal(now[name], wanted[name]) and now[name].dtype == torch.float32 for name in wanted)
    if made is llama:
        assert all(torch.equal(a, b) for a, b in zip(model.rotary(x, places), made()(x, places), strict=True))
    assert model.rotary.state_dict() == {}
    claim.restore()
    assert all(model.rotary.get_buffer(name) is buffer for name, buffer in were.items())


def test_frequencies_that_overflow_on_the_way():
    """In fp16 500000 is infinite, and 1 over it 0; and where a head is turned in part, some are 0."""
    exact = llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    model = rounded(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), torch.float16)
    for buffer in model.rotary.buffers():
        buffer[1:] = 0
    _, (left,) = claims_of(model, wanted=False)
    assert "in float16, as DeepSpeed has made them and stock has them, up to 100 % off" in left.reason
    ((claim,), _) = claims_of(model, wanted=True)
    claim.commit()
    assert torch.equal(model.rotary.inv_freq, exact.inv_freq)
    # bf16 has room for them
    model = rounded(llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    model.rotary.inv_freq[1:] = 0
    _, (left,) = claims_of(model, wanted=True)
    assert "inv_freq is none that its configuration gives" in left.reason
    assert _off(torch.zeros(2), torch.zeros(2)) == 0


def test_what_stays_is_said():
    claims, (left,) = claims_of(rounded(llama()), wanted=False)
    assert claims == [] and (left.what, left.count) == ("LlamaRotaryEmbedding", 1)
    assert left.reason == (
        "rotary_frequencies: its frequencies are in bfloat16, as DeepSpeed has made them and stock has them, "
        'up to 0.365 % off; "rotary_frequencies": "fp32" has them computed again'
    )


@pytest.mark.parametrize("wanted", [True, False])
def test_in_fp32_there_is_nothing_to_say(wanted):
    assert claims_of(nn.ModuleDict({"rotary": llama()}), wanted) == ([], [])


class Vision(nn.Module):
    """Without a configuration, as the towers of some have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", torch.ones(4), persistent=False)


class Other(LlamaRotaryEmbedding):
    """Its frequencies are not those of its configuration any more."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.inv_freq = self.inv_freq[:3]


class Picky(LlamaRotaryEmbedding):
    def __init__(self, config: LlamaConfig, more: int) -> None:
        super().__init__(config)


class Attention(LlamaRotaryEmbedding):
    """That has its frequencies itself."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.q_proj = nn.Linear(4, 4)


CONFIG = LlamaConfig(hidden_size=64, num_attention_heads=1)


def moved() -> LlamaRotaryEmbedding:
    module = llama()
    module.inv_freq.mul_(1.1)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Vision(), "it has no configuration that they could be computed from"),
        (moved(), "inv_freq is none that its configuration gives"),
        (Picky(CONFIG, 1), "they can't be computed from its configuration: TypeError: "),
        (Attention(CONFIG), "it has weights besides"),
    ],
    ids=["no configuration", "others", "another constructor", "with weights"],
)
def test_what_cannot_be_computed_again_stays_and_says_why(module, reason):
    claims, (left,) = claims_of(rounded(module), wanted=True)
    assert claims == [] and left.reason.startswith("rotary_frequencies: its frequencies stay in bfloat16, since ")
    assert reason in left.reason
    _, (unasked,) = claims_of(rounded(module), wanted=False)
    assert unasked.reason == "rotary_frequencies: its frequencies are in bfloat16"


def test_a_class_that_makes_others_now():
    module = Other(CONFIG)
    module._buffers["inv_freq"] = llama().inv_freq
    _, (left,) = claims_of(rounded(module), wanted=True)
    assert "its configuration gives no inv_freq like this in fp32" in left.reason
