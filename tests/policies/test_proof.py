"""The proof: forged layers stay stock with the reason, honest ones pass, nothing of model or process is touched."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.loss import loss_utils
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.t5 import modeling_t5

import ds_fused
from ds_fused.modules.layers import norm
from ds_fused.modules.layers.attention import exchanged
from ds_fused.modules.layers.rotary import Turn, fused_rotary
from ds_fused.policies import loss, loss_proof, memory, plan
from ds_fused.policies.kinds import Way, choose, find, kind, norms, ropes
from ds_fused.policies.report import Claim
from tests.policies.tiny import LAYER_KEYS, LLAMA, NAMED, assert_same_step, classes, counts, twins

CPU = torch.device("cpu")


def outcome(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Way | str:
    """The way that the layer is replaced, or why it stays."""
    kind = find(layer)
    ways = kind.ways(layer)
    return ways if isinstance(ways, str) else choose(kind, layer, ways, CPU, dtype)


def assert_outcome(found: Way | str, reason: str | None) -> None:
    assert isinstance(found, Way) if reason is None else isinstance(found, str) and reason in found, found


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
        (Biased, None),
        (GradientStopped, "gradient of x differs"),
        (WithResidual, "its forward takes (hidden_states, residual)"),
    ],
)
def test_norm(cls: type, reason: str | None, dtype: torch.dtype) -> None:
    assert_outcome(outcome(cls(32), dtype), reason)


class Half(LlamaRMSNorm):
    """The same weight behind another rounding: OLMo 2's, under a name that says nothing."""

    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        x = hidden_states.float()
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * y).to(hidden_states.dtype)


class WithoutWeight(nn.Module):
    """Llama 4's norm of q and k, by the name of another."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x):  # noqa: ANN001, ANN201
        return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class MeanTaken(LlamaRMSNorm):
    """A layer norm, whatever its base says."""

    def forward(self, hidden_states):  # noqa: ANN001, ANN201
        return F.layer_norm(hidden_states.float(), (32,), self.weight.float(), None, 1e-6).to(hidden_states.dtype)


class T5LayerNorm(nn.Module):
    """Named a layer norm, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.variance_epsilon = 1e-6

    forward = LlamaRMSNorm.forward


# by what they compute, also in a model in fp32, which may come under autocast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layer", "op", "form"),
    [
        (LlamaRMSNorm(32), "rms_norm", {"fused_cast": "before_weight", "fused_offset": 0.0}),
        (GemmaRMSNorm(32), "rms_norm", {"fused_cast": "after_weight", "fused_offset": 1.0}),
        (Half(32), "rms_norm", {"fused_cast": "after_weight", "fused_offset": 0.0}),
        (type("NormOfQ", (WithoutWeight,), {})(), "rms_norm", {"fused_eps": "eps"}),
        (T5LayerNorm(), "rms_norm", {"fused_eps": "variance_epsilon"}),
        (modeling_t5.T5LayerNorm(32), "rms_norm", {"fused_eps": "variance_epsilon"}),
        (MeanTaken(32), "layer_norm", {"fused_eps": "variance_epsilon"}),
        (nn.LayerNorm(32), "layer_norm", {}),
        (nn.LayerNorm(32, elementwise_affine=False), "layer_norm", {}),
        (nn.GroupNorm(2, 32), "group_norm", {}),
    ],
)
def test_the_form_is_found(layer: nn.Module, op: str, form: dict, dtype: torch.dtype) -> None:
    found = outcome(layer, dtype)
    assert isinstance(found, Way) and found.op == op, found
    assert form.items() <= dict(found.state).items()


# torch's own classes are no more trusted than others
@pytest.mark.parametrize("of", [nn.LayerNorm(32), nn.GroupNorm(2, 32)])
def test_subclasses_of_torchs_norms(of: nn.Module) -> None:
    class Doubled(type(of)):
        def forward(self, x):  # noqa: ANN001, ANN202
            return 2 * super().forward(x)

    class Wandering(type(of)):
        def forward(self, x):  # noqa: ANN001, ANN202
            return F.dropout(super().forward(x), 1e-6, self.training)

    for cls, word in ((Doubled, "output differs"), (Wandering, "random numbers")):
        of.__class__ = cls
        assert word in outcome(of)


# where the result is rounded: by so little that only its dtype tells, with weights in fp32
def test_cast_order_shows_in_16_bits() -> None:
    class RoundedEarly(GemmaRMSNorm):
        def forward(self, x):  # noqa: ANN001, ANN202
            return (1.0 + self.weight) * self._norm(x.float()).type_as(x)

    found = outcome(RoundedEarly(32), torch.bfloat16)
    assert dict(found.state) == {"fused_eps": "eps", "fused_cast": "before_weight", "fused_offset": 1.0}


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


class Summed(LlamaMLP):
    def forward(self, x):  # noqa: ANN001, ANN201
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class Bounded(LlamaMLP):
    """Clamps what the activation gives, not what it is given."""

    def forward(self, x):  # noqa: ANN001, ANN201
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=1.0) * self.up_proj(x))


class Gated(LlamaMLP):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.gain = nn.Conv1d(config.hidden_size, config.hidden_size, 1)

    def forward(self, x):  # noqa: ANN001, ANN201
        return self.gain(super().forward(x).mT).mT


class NormedWithin(LlamaMLP):
    """As BitNet's, and scaled as Inkling's."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.sub_norm = LlamaRMSNorm(config.intermediate_size)
        self.last_norm = nn.LayerNorm(config.hidden_size)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):  # noqa: ANN001, ANN201
        y = self.down_proj(self.sub_norm(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))
        return self.last_norm(y) * self.scale


class NormedTooEarly(NormedWithin):
    def forward(self, x):  # noqa: ANN001, ANN201
        return self.down_proj(self.sub_norm(self.act_fn(self.gate_proj(x))) * self.up_proj(x))


class NormedAndSummed(NormedWithin):
    def forward(self, x):  # noqa: ANN001, ANN201
        return self.down_proj(self.sub_norm(self.act_fn(self.gate_proj(x)) + self.up_proj(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cls", "act", "reason"),
    [
        (LlamaMLP, "silu", None),
        (LlamaMLP, "gelu", None),
        (LlamaMLP, "gelu_pytorch_tanh", None),
        (LlamaMLP, "gelu_new", None),
        (LlamaMLP, "relu2", None),
        (LlamaMLP, "relu", None),
        (LlamaMLP, "tanh", "its activation Tanh is none that glu has"),
        # the forward's own code runs, with what it multiplies: all that it does besides is as it was
        (Swapped, "silu", None),
        (DroppedInside, "silu", None),
        (Summed, "silu", "output differs"),
        (Bounded, "silu", "output differs"),
        (NormedWithin, "silu", None),
        (NormedWithin, "relu2", None),
        # what a norm is given is computed, and what comes out is no activation
        (NormedTooEarly, "silu", "of the first that can be compared, its activation multiplies nothing"),
        (NormedAndSummed, "silu", "of the first that can be compared, its activation multiplies nothing"),
    ],
)
def test_mlp(cls: type, act: str, reason: str | None, dtype: torch.dtype) -> None:
    assert_outcome(outcome(llama_mlp(cls, act), dtype), reason)


# by so little that 16 bits round it away
def test_activation_that_is_not_what_its_name_says() -> None:
    class GELUTanh(nn.Module):
        def forward(self, x):
            return F.gelu(x)

    layer = llama_mlp()
    layer.act_fn = GELUTanh()
    found = outcome(layer, torch.bfloat16)
    assert isinstance(found, str) and "differs" in found


def test_mlp_whose_activation_carries_a_hook() -> None:
    layer = llama_mlp()
    layer.act_fn.register_forward_hook(lambda *_: None)
    assert "hooks" in outcome(layer)


# as of TRL's engine for the log-probabilities of a reference: the one that trains comes over it
def test_mlp_whose_activation_carries_the_hooks_of_an_engine() -> None:
    def hook(*_: object) -> None: ...

    of_deepspeed = FunctionType(hook.__code__, {"__name__": "deepspeed.runtime.zero.parameter_offload"})
    layer = llama_mlp()
    layer.act_fn.register_forward_pre_hook(torch.compiler.disable(of_deepspeed))
    layer.act_fn.register_forward_hook(of_deepspeed)
    assert isinstance(outcome(layer), Way)


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        rotated = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
        return x * cos.unsqueeze(unsqueeze_dim) + rotated * sin.unsqueeze(unsqueeze_dim)

    return turn(q), turn(k)


def opposite(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim)


def with_positions(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):  # noqa: ANN001, ANN201
    if position_ids is not None:
        cos, sin = cos[position_ids], sin[position_ids]
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)


def with_scale(q, k, cos, sin, scale=1.0):  # noqa: ANN001, ANN201
    return apply_rotary_pos_emb(scale * q, k, cos, sin)


def twice_as_far(q, k, cos, sin, unsqueeze_dim=1):  # noqa: ANN001, ANN201
    return apply_rotary_pos_emb(q, k, cos * cos - sin * sin, 2 * sin * cos, unsqueeze_dim)


def drops_rarely(q, k, cos, sin, unsqueeze_dim=1):  # noqa: ANN001, ANN201
    return apply_rotary_pos_emb(F.dropout(q, 1e-6), k, cos, sin, unsqueeze_dim)


def q_only(q, k, cos, sin, unsqueeze_dim=1):  # noqa: ANN001, ANN201
    return apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)[0], k


def rotated_attention(function: Callable) -> nn.Module:
    class Attention(LlamaAttention):
        forward = exchanged(LlamaAttention.forward, {"apply_rotary_pos_emb": function})

    return Attention(LLAMA.make().config, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "turn"),
    [
        (apply_rotary_pos_emb, Turn()),
        (interleaved, Turn(neighbours=True)),
        (opposite, Turn(opposite=True)),
        (with_positions, Turn()),
        (with_scale, "takes (q, k, cos, sin, scale=1.0)"),
        (twice_as_far, "output 0 differs"),
        (q_only, "output 1 differs"),
        (drops_rarely, "random numbers"),
    ],
)
def test_rope(function: Callable, turn: Turn | str, dtype: torch.dtype) -> None:
    layer, state = rotated_attention(function), torch.get_rng_state()
    found = outcome(layer, dtype)
    assert torch.equal(torch.get_rng_state(), state)
    if isinstance(turn, str):
        assert isinstance(found, str) and turn in found, found
    else:
        assert found.how == (("apply_rotary_pos_emb", turn),)


# cos and sin are tables then, which rope does not look up
def test_positions_go_to_the_original() -> None:
    q, k, cos, sin = (torch.randn(2, 4, 3, 8), torch.randn(2, 1, 3, 8), torch.randn(9, 8), torch.randn(9, 8))
    positions = torch.tensor([[1, 2, 8]])
    mine = fused_rotary(with_positions, Turn())(q, k, cos, sin, positions)
    assert all(map(torch.equal, mine, with_positions(q, k, cos, sin, positions)))


def with_forged_layers() -> nn.Module:
    model = LLAMA.make()
    model.model.norm.__class__ = SignFlipped
    model.model.layers[0].mlp.__class__ = Bounded
    model.model.layers[1].mlp = Gated(model.config)
    model.model.layers[1].input_layernorm.__class__ = Broken
    return model


def test_forged_layers_are_left_and_the_rest_is_replaced() -> None:
    model = with_forged_layers()
    before = dict(zip(model.modules(), classes(model), strict=True))
    report = ds_fused.apply(model, LAYER_KEYS)
    assert counts(report) == {"rms_norm": 3, "rope": 2}
    reasons = {row.what: row.reason for row in report.left}
    assert set(reasons) == {"SignFlipped", "Bounded", "Gated", "Broken"}
    assert "differs" in reasons["SignFlipped"] and "differs" in reasons["Bounded"]
    assert "'gain'" in reasons["Gated"]
    assert "RuntimeError: not this one" in reasons["Broken"]
    for layer, cls in before.items():
        assert (type(layer) is cls) == (cls not in (LlamaRMSNorm, LlamaAttention, nn.LayerNorm))


# which form it is has to be found out in any case, so the forged are found out, too
def test_without_proof_forms_are_told_apart_on_the_cpu() -> None:
    report = ds_fused.apply(with_forged_layers(), LAYER_KEYS, verify=False)
    assert counts(report) == {"rms_norm": 3, "rope": 2}


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


# a family for each kind of layer; two rotary functions in one forward; clamped experts with biases
PROVEN = ["Llama", "Mixtral", "Qwen3Next", "Cohere", "Nemotron", "Llama4Text", "DeepseekV3", "GptOss"]


@pytest.mark.parametrize("name", PROVEN)
def test_touches_nothing(name: str) -> None:
    model = NAMED[name].make()
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


def test_ranks_need_not_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """No collective: what one rank finds out, it finds out alone. Their agreement comes after it."""
    distributed = torch.distributed
    collectives = [
        name for name in dir(distributed) if re.search("gather|reduce|broadcast|scatter|barrier|to_all", name)
    ]
    assert {"all_reduce", "all_gather_into_tensor", "broadcast_object_list", "barrier"} <= set(collectives)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a collective in a proof")

    for name in collectives:
        monkeypatch.setattr(distributed, name, refused)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    for claim in claims_of(NAMED["Qwen3Next"].make()):
        assert claim.prove(CPU, torch.bfloat16) is None


def forget() -> None:
    """All proofs of this process."""
    memory._PROVEN.clear()
    for cached in (ropes._differs, loss_proof.linear_differs, loss_proof.real_differs):
        cached.cache_clear()


# all but the one that is compared anew by each apply
KEYS = plan._keys(None, {"qk_norm_rope": False})


def claims_of(model: nn.Module) -> tuple[Claim, ...]:
    """With no proof remembered."""
    forget()
    return plan.plan(model, KEYS).claims


def tensors_alive() -> int:
    # asked of the type: some objects warn when they are asked for their class
    return sum(issubclass(type(each), Tensor) for each in gc.get_objects())


@pytest.mark.parametrize("name", PROVEN)
def test_leaves_no_tensor(name: str) -> None:
    model = NAMED[name].make()
    for claim in claims_of(model):
        # whatever is made once in a process
        claim.prove(CPU, torch.bfloat16)
    claims = claims_of(model)
    gc.collect()
    gc.disable()
    try:
        before = tensors_alive()
        assert {claim.prove(CPU, torch.bfloat16) for claim in claims} == {None}
        assert tensors_alive() == before
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("name", PROVEN)
def test_on_a_gpu_it_is_short_and_leaves_nothing(name: str, device: torch.device, whole_gpu: None) -> None:
    """50 ms for each class, once its kernels are compiled; generators and memory are as before."""
    model = NAMED[name].make(torch.bfloat16).to(device)
    assert {claim.prove(device, torch.bfloat16) for claim in claims_of(model)} == {None}
    took: dict[str, float] = {}
    gc.collect()
    for _ in range(3):
        for claim in claims_of(model):
            torch.cuda.synchronize()
            memory, generators = torch.cuda.memory_allocated(), (torch.get_rng_state(), torch.cuda.get_rng_state())
            started = time.perf_counter()
            claim.prove(device, torch.bfloat16)
            torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            took[claim.original] = min(seconds, took.get(claim.original, seconds))
            # autograd's own thread lets go of the last tensors when the backward has returned
            for _ in range(200):
                if torch.cuda.memory_allocated() == memory:
                    break
                time.sleep(1e-3)
            assert torch.cuda.memory_allocated() == memory, claim.original
            assert all(map(torch.equal, generators, (torch.get_rng_state(), torch.cuda.get_rng_state())))
    assert max(took.values()) <= 0.05, {name: f"{1e3 * seconds:.0f} ms" for name, seconds in took.items()}


def test_in_inference_mode() -> None:
    model = LLAMA.make()
    with torch.inference_mode():
        assert counts(ds_fused.apply(model, LAYER_KEYS)) == LLAMA.counts


def test_once_for_each_class(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def counted(kind: object, module: nn.Module, *rest: object) -> Way | str:
        seen.append(type(module).__name__)
        return choose(kind, module, *rest)

    forget()
    monkeypatch.setattr(memory, "choose", counted)
    model = LLAMA.make()
    model.extra = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(32, eps=1e-3)])
    ds_fused.apply(model, LAYER_KEYS)
    assert sorted(seen) == ["LayerNorm", "LayerNorm", "LlamaAttention", "LlamaMLP", "LlamaRMSNorm"]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which files have compared anything, nothing being remembered when the test begins."""
    found: list[str] = []
    for home in (ropes, norms, loss_proof, kind):
        real, name = home.compare, home.__name__.rpartition(".")[2]
        monkeypatch.setattr(home, "compare", lambda *a, _n=name, _r=real, **k: found.append(_n) or _r(*a, **k))
    forget()
    return found


EVERYTHING = {"ropes", "norms", "loss_proof", "kind"}


def test_what_was_proven_is_remembered_by_the_next_apply(compared: list[str]) -> None:
    def applied(dtype: torch.dtype) -> set[str]:
        compared.clear()
        report = ds_fused.apply(LLAMA.make(dtype), **dict.fromkeys(LAYER_KEYS, True))
        assert {claim.key for claim in report.claims} >= {"rms_norm", "rope", "swiglu", loss.LINEAR, loss.REAL}
        return set(compared)

    assert applied(torch.float32) == EVERYTHING
    assert applied(torch.float32) == set()
    assert applied(torch.bfloat16) == EVERYTHING
    assert applied(torch.float32) == applied(torch.bfloat16) == set()


@pytest.mark.parametrize("name", PROVEN)
def test_every_kind_of_layer_is_remembered(name: str, compared: list[str]) -> None:
    for expected in (True, False):
        for claim in claims_of(NAMED[name].make()) if expected else plan.plan(NAMED[name].make(), KEYS).claims:
            assert claim.prove(CPU, torch.float32) is None
        assert bool(compared) == expected
        compared.clear()


# on meta nothing is proven: the launches of a proof are noted there, each time
def test_on_meta_nothing_is_remembered(compared: list[str]) -> None:
    for _ in range(2):
        ds_fused.apply(LLAMA.make(), {"rms_norm": True, "swiglu": True}, device="meta")
        assert set(compared) == {"norms", "kind"}
        compared.clear()


def patched(f: Callable) -> Callable:
    return lambda *args, **named: 2 * f(*args, **named)


# what somebody patches between two applies, and what stays stock then
PATCHES = {
    "a norm": (LlamaRMSNorm, "forward", "LlamaRMSNorm"),
    "the activation of an MLP": (SiLUActivation, "forward", "LlamaMLP"),
    "what a rotary function calls": (modeling_llama, "rotate_half", "LlamaAttention"),
    "what the loss calls": (loss_utils, "fixed_cross_entropy", "Linear"),
    "PyTorch's loss": (F, "cross_entropy", "Linear"),
    # a mistake of ours would be found as well
    "the op": (norm, "rms_norm", "LlamaRMSNorm"),
}


@pytest.mark.parametrize("what", PATCHES)
def test_what_is_patched_is_proven_anew(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, name, left = PATCHES[what]
    assert ds_fused.apply(LLAMA.make()).left == ()
    monkeypatch.setattr(home, name, patched(getattr(home, name)))
    # twice: what differed is compared again
    for _ in range(2):
        model, stock = twins(LLAMA)
        reasons = {row.what: row.reason for row in ds_fused.apply(model).left}
        assert "differs" in reasons[left], reasons
        if what != "the op":
            assert_same_step(model, stock, tolerance=1e-5)
    monkeypatch.undo()
    assert ds_fused.apply(LLAMA.make()).left == ()


# the fused attention is made of the original's code; a class that was made of it before is not the one of today
def test_an_attention_that_is_patched_runs_as_patched(monkeypatch: pytest.MonkeyPatch) -> None:
    first = LLAMA.make(attn_implementation="eager")
    assert counts(ds_fused.apply(first))["rope"] == 2
    eager = modeling_llama.eager_attention_forward
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", lambda *a, **k: (2 * eager(*a, **k)[0], None))
    model, stock = twins(LLAMA, attn_implementation="eager")
    assert counts(ds_fused.apply(model))["rope"] == 2
    assert_same_step(model, stock, tolerance=1e-5)
    assert type(model.model.layers[0].self_attn) is not type(first.model.layers[0].self_attn)


# one class, two numbers: in two models, of which the first is proven
@pytest.mark.parametrize("held", ["a number", "a tensor"])
def test_a_layer_that_holds_another_thing_is_proven_anew(held: str) -> None:
    class Scaled(LlamaRMSNorm):
        def forward(self, hidden_states):  # noqa: ANN001, ANN202
            return self.scale * super().forward(hidden_states)

    for scale, n_left in ((1.0, 0), (0.5, 1), (1.0, 0)):
        model = LLAMA.make()
        model.model.layers[0].input_layernorm.__class__ = Scaled
        model.model.layers[0].input_layernorm.scale = scale if held == "a number" else torch.tensor(scale)
        report = ds_fused.apply(model, {"rms_norm": True})
        assert [row.what for row in report.left] == ["Scaled"] * n_left


# what it is decides the comparison, not the switch
def test_a_key_that_is_off_gives_no_layer_to_another() -> None:
    for verify in (True, False):
        report = ds_fused.apply(LLAMA.make(), {"layer_norm": True}, verify=verify)
        assert counts(report) == {} and list(report.left) == []


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
