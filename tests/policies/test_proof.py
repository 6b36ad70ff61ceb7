"""The proof: forged layers stay stock with the reason, honest ones pass, nothing of model or process is touched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

import ds_fused
from ds_fused.modules.attention import exchanged
from ds_fused.policies.kinds import Way, choose, find
from tests.policies.tiny import LAYER_KEYS, LLAMA, classes, counts

CPU = torch.device("cpu")


def outcome(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Way | str:
    """The way that the layer is replaced, or why it stays."""
    kind = find(layer)
    ways = kind.ways(layer)
    return ways if isinstance(ways, str) else choose(kind, layer, ways, CPU, dtype)


class SignFlipped(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return -super().forward(hidden_states)


class WeightSquared(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return self.weight * super().forward(hidden_states)


class EpsOutside(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        x = hidden_states.float()
        return self.weight * (x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)).to(
            hidden_states.dtype
        )


class EpsForgotten(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        x = hidden_states.float()
        return self.weight * (x * x.pow(2).mean(-1, keepdim=True).rsqrt()).to(hidden_states.dtype)


class Dropped(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return F.dropout(super().forward(hidden_states), 0.1, self.training)


# so rare that small random data would hardly show it
class RarelyDropped(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return F.dropout(super().forward(hidden_states), 1e-6, self.training)


class Biased(LlamaRMSNorm):
    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.bias = nn.Parameter(torch.zeros(32))

    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return super().forward(hidden_states) + self.bias


class GradientStopped(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return super().forward(hidden_states.detach()) + 0 * hidden_states


class WithResidual(LlamaRMSNorm):
    def forward(self, hidden_states, residual=None):  # noqa: ANN001, ANN201
        return super().forward(hidden_states if residual is None else hidden_states + residual)


class Broken(LlamaRMSNorm):
    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        raise RuntimeError("not this one")


class Honest(LlamaRMSNorm):
    """The same computation in other words."""

    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return F.rms_norm(hidden_states, hidden_states.shape[-1:], None, self.variance_epsilon) * self.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (LlamaRMSNorm, None),
        (Honest, None),
        (SignFlipped, "output differs"),
        (WeightSquared, "output differs"),
        (EpsOutside, "output differs"),
        (EpsForgotten, "output differs"),
        (Dropped, "random numbers"),
        (RarelyDropped, "random numbers"),
        (Biased, "output differs"),
        (GradientStopped, "gradient of x differs"),
        (WithResidual, "its forward takes (hidden_states, residual)"),
    ],
)
def test_norm(cls: type, reason: str | None, dtype: torch.dtype) -> None:
    found = outcome(RMS_NORM_LLAMA, cls(32), dtype)
    assert found is None if reason is None else reason in found


def test_llama_and_gemma_are_told_apart() -> None:
    assert outcome(RMS_NORM_GEMMA, GemmaRMSNorm(32)) is None
    assert "differs" in outcome(RMS_NORM_GEMMA, LlamaRMSNorm(32))
    assert "differs" in outcome(RMS_NORM_LLAMA, GemmaRMSNorm(32))


# where the result is rounded: by so little that only its dtype tells, with weights in fp32
def test_cast_order_shows_in_16_bits() -> None:
    class RoundedEarly(GemmaRMSNorm):
        def forward(self, x):  # noqa: ANN001, ANN202
            return (1.0 + self.weight) * self._norm(x.float()).type_as(x)

    assert "float32" in outcome(RMS_NORM_GEMMA, RoundedEarly(32), torch.bfloat16)


def llama_mlp(cls: type = LlamaMLP, act: str = "silu") -> nn.Module:
    config = LLAMA.make().config
    config.hidden_act = act
    return cls(config)


class Swapped(LlamaMLP):
    def forward(self, x):  # noqa: ANN001, ANN201
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


class DroppedInside(LlamaMLP):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.1).eval()  # as in a model that was loaded for evaluation

    def forward(self, x):  # noqa: ANN001, ANN201
        return self.dropout(super().forward(x))


class Gated(LlamaMLP):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.gain = nn.Linear(config.hidden_size, 1)

    def forward(self, x):  # noqa: ANN001, ANN201
        return self.gain(x) * super().forward(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "act", "reason"),
    [
        (LlamaMLP, "silu", None),
        (LlamaMLP, "gelu", None),
        (LlamaMLP, "gelu_pytorch_tanh", None),
        (LlamaMLP, "gelu_new", None),
        (LlamaMLP, "relu2", "ReLUSquaredActivation"),
        (Swapped, "silu", "output differs"),
        (DroppedInside, "silu", "random numbers"),
        (DroppedInside, "gelu", "random numbers"),
    ],
)
def test_mlp(cls: type, act: str, reason: str | None, dtype: torch.dtype) -> None:
    found = outcome(GATED_MLP, llama_mlp(cls, act), dtype)
    assert found is None if reason is None else reason in found


# by so little that 16 bits round it away
def test_activation_that_is_not_what_its_name_says() -> None:
    class GELUTanh(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    layer = llama_mlp()
    layer.act_fn = GELUTanh()
    assert "differs" in outcome(GATED_MLP, layer, torch.bfloat16)


def test_mlp_whose_activation_carries_a_hook() -> None:
    layer = llama_mlp()
    layer.act_fn.register_forward_hook(lambda *_: None)
    assert "hooks" in outcome(GATED_MLP, layer)


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return x * cos.unsqueeze(unsqueeze_dim) + rotated * sin.unsqueeze(unsqueeze_dim)

    return turn(q), turn(k)


def opposite(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)


def with_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):  # noqa: ANN001, ANN201
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (apply_rotary_pos_emb, None),
        (interleaved, "output 0 differs"),
        (opposite, "output 0 differs"),
        (with_positions, "position_ids"),
    ],
)
def test_rope(function: Callable, reason: str | None, dtype: torch.dtype) -> None:
    class Attention(LlamaAttention):
        forward = exchanged(LlamaAttention.forward, NAME, function)

    found = outcome(ROPE_HALF, Attention(LLAMA.make().config, 0), dtype)
    assert found is None if reason is None else reason in found


def with_forged_layers() -> nn.Module:
    model = LLAMA.make()
    model.model.norm.__class__ = SignFlipped
    model.model.layers[0].mlp.__class__ = Swapped
    model.model.layers[1].mlp = Gated(model.config)
    model.model.layers[1].input_layernorm.__class__ = Broken
    return model


def test_forged_layers_are_left_and_the_rest_is_replaced() -> None:
    model = with_forged_layers()
    before = dict(zip(model.modules(), classes(model), strict=True))
    report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == {"rms_norm": 3, "rope": 2}
    reasons = {row.what: row.reason for row in report.left}
    assert set(reasons) == {"SignFlipped", "Swapped", "Gated", "Broken"}
    assert "differs" in reasons["SignFlipped"] and "differs" in reasons["Swapped"]
    assert "'gain'" in reasons["Gated"]
    assert "RuntimeError: not this one" in reasons["Broken"]
    for layer, cls in before.items():
        assert (type(layer) is cls) == (cls not in (LlamaRMSNorm, LlamaAttention))


def test_without_proof_the_name_is_taken_at_its_word() -> None:
    assert counts(ds_fused.apply(with_forged_layers(), LAYER_KEYS, verify=False)) == {
        "rms_norm": 5,
        "rope": 2,
        "swiglu": 2,
    }


# one class, but each instance has its own number: the proof of one says nothing about the other
def test_instances_that_differ_are_proven_apart() -> None:
    class Scaled(LlamaRMSNorm):
        scale = 1.0

        def forward(self, hidden_states):  # noqa: ANN001, ANN202
            return self.scale * super().forward(hidden_states)

    model = LLAMA.make()
    for layer, scale in zip(model.model.layers, (1.0, 0.5), strict=True):
        layer.input_layernorm.__class__ = Scaled
        layer.input_layernorm.scale = scale
    report = ds_fused.apply(model, {"rms_norm": True})
    assert counts(report) == {"rms_norm": 4}
    assert [(row.what, row.count) for row in report.left] == [("Scaled", 1)]


def test_touches_nothing() -> None:
    model = LLAMA.make()
    versions = {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()}
    state = torch.get_rng_state()
    hooks: list[str] = []
    for module in model.modules():
        module.register_forward_hook(lambda *_: hooks.append("forward"))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        ds_fused.apply(model)
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: tensor._version for name, tensor in model.state_dict(keep_vars=True).items()} == versions
    assert all(p.grad is None for p in model.parameters())
    assert hooks == []


def test_in_inference_mode() -> None:
    model = LLAMA.make()
    with torch.inference_mode():
        assert counts(ds_fused.apply(model, LAYER_KEYS)) == LLAMA.counts


# as deepspeed.zero.Init leaves them: no values, the shape elsewhere
def test_parameters_without_values() -> None:
    model = LLAMA.make()
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert counts(ds_fused.apply(model, LAYER_KEYS)) == LLAMA.counts


def test_parameters_on_meta() -> None:
    model = LLAMA.make().to("meta")
    assert counts(ds_fused.apply(model, LAYER_KEYS)) == LLAMA.counts
