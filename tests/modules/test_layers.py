"""The mix-ins by themselves: what they read from a layer, and the exchanged forward of attention."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ds_fused.modules.layers.attention import exchanged, rotary_functions
from ds_fused.modules.layers.mlp import act_of
from ds_fused.modules.layers.norm import GroupNorm, LayerNorm, PyTorchRMSNorm, eps_name
from ds_fused.modules.layers.product import Product
from ds_fused.modules.layers.rotary import roles_of
from ds_fused.modules.swap import swap
from ds_fused.ops import glu


def test_eps_under_either_name() -> None:
    layer = nn.Module()
    assert eps_name(layer) is None
    layer.eps = 1e-5
    assert eps_name(layer) == "eps"
    layer.variance_epsilon = 1e-5
    assert eps_name(layer) == "variance_epsilon"
    layer.eps = 1e-6  # which of the two its forward reads can't be known
    assert eps_name(layer) is None


@pytest.mark.parametrize(
    ("act", "name"),
    [
        (ACT2FN["silu"], "silu"),
        (ACT2FN["swish"], "silu"),
        (ACT2FN["gelu_pytorch_tanh"], "gelu_tanh"),
        (ACT2FN["gelu_new"], "gelu_tanh"),
        (ACT2FN["gelu"], "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU("tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (F.gelu, "gelu"),
        (functools.partial(F.gelu, approximate="tanh"), "gelu_tanh"),
        (functools.partial(F.gelu, approximate="none"), None),
        (ACT2FN["relu"], "relu"),
        (ACT2FN["relu2"], "relu2"),
        (F.relu, "relu"),
        (ACT2FN["quick_gelu"], None),
        (ACT2FN["gelu_10"], None),
        (torch.tanh, None),
        (None, None),
    ],
)
def test_activation(act: object, name: str | None) -> None:
    assert act_of(act) == name


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    return q, k


def counted(forward):  # noqa: ANN001, ANN201
    """A decorator as transformers has several: functools.wraps around a closure."""

    @functools.wraps(forward)
    def wrapper(self, *args, **named):  # noqa: ANN001, ANN002, ANN003, ANN202
        self.calls = getattr(self, "calls", 0) + 1
        return forward(self, *args, **named)

    return wrapper


SCOPE: dict[str, object] = {"Module": nn.Module, "counted": counted, "apply_rotary_pos_emb": rotary}
exec(  # the names of a modelling file, apart from those of this one
    """
class Plain(Module):
    def forward(self, q, *, scale=2):
        return apply_rotary_pos_emb(q, q * scale, None, None)
class Sub(Plain):
    pass
class Super(Plain):
    def forward(self, q):
        return super().forward(q)
class WithClosure(Module):
    def forward(self, q):
        return apply_rotary_pos_emb(q, __class__, None, None)
class Decorated(Module):
    @counted
    @counted
    def forward(self, q):
        return apply_rotary_pos_emb(q, q, None, None)
""",
    SCOPE,
)


def replacement(q: object, k: object, cos: object, sin: object) -> tuple[str, object, object]:
    return "exchanged", q, k


def test_exchanged_forward() -> None:
    for name, expected in (
        ("Plain", ("exchanged", 3, 6)),
        ("Sub", ("exchanged", 3, 6)),
        ("Decorated", ("exchanged", 3, 3)),
    ):
        cls = SCOPE[name]
        assert rotary_functions(cls) == {"apply_rotary_pos_emb": rotary}
        made = exchanged(cls.forward, {"apply_rotary_pos_emb": replacement})
        layer = cls()
        assert made(layer, 3) == expected
        assert layer.forward(3)[0] == 3  # the class's own is what it was
        assert (made.__name__, made.__qualname__) == (cls.forward.__name__, cls.forward.__qualname__)
        if name == "Decorated":
            assert layer.calls == 4  # both decorators, in both calls
        # what is asked of the copy is told of the copy, under its decorators too
        of_made = type(name, (nn.Module,), {"forward": made})
        assert rotary_functions(of_made) == {"apply_rotary_pos_emb": replacement}


def test_exchanged_forward_keeps_its_closure() -> None:
    cls = SCOPE["WithClosure"]
    assert exchanged(cls.forward, {"apply_rotary_pos_emb": replacement})(cls(), 3) == ("exchanged", 3, cls)


def test_forward_that_can_not_be_exchanged() -> None:
    assert rotary_functions(SCOPE["Super"]) == {}
    assert rotary_functions(nn.Linear) == {}


def test_arguments() -> None:
    assert list(roles_of(rotary).values()) == ["q", "k", "cos", "sin", "unsqueeze_dim"]
    assert list(roles_of(lambda xq, xk, freqs_cis: xq).values()) == ["q", "k", "angles"]
    assert list(roles_of(lambda tensor, sin, cos: tensor).values()) == ["q", "sin", "cos"]
    assert roles_of(lambda q, k, cos, sin, scale: q) is None
    assert roles_of(lambda q, k, cos: q) is None
    assert roles_of(lambda q, x, cos, sin: q) is None  # two that could be q
    assert roles_of(lambda q, k, cos, sin, **named: q) is None


class AnyForward(nn.Module):
    """Whatever its forward does with an activation."""

    def __init__(self, forward: object) -> None:
        super().__init__()
        self.act_fn = nn.SiLU()
        self.does = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.act_fn, x)


# glu where it multiplies a tensor of its shape, the activation's own output in all other cases
@pytest.mark.parametrize(
    ("forward", "products"),
    [
        (lambda act, x: act(x) * x, 1),
        (lambda act, x: x * act(x), 1),
        (lambda act, x: torch.mul(x, act(x)), 1),
        (lambda act, x: torch.mul(act(x), x), 1),
        (lambda act, x: act(x).mul(x), 0),
        (lambda act, x: (act(x) * x) * act(2 * x), 2),
        (lambda act, x: act(x) * 2.0, 0),
        (lambda act, x: 2.0 * act(x), 0),
        (lambda act, x: act(x) * x[:1], 0),
        (lambda act, x: act(x) * act(x), 0),
        (lambda act, x: act(x) + x, 0),
        (lambda act, x: x - act(x), 0),
        (lambda act, x: F.linear(act(x), torch.ones(3, 6)), 0),
        (lambda act, x: torch.cat([act(x), x]), 0),
        (lambda act, x: act(x)[0] * act(x).shape[0], 0),
        (lambda act, x: act(act(x)) * x, 1),
    ],
)
def test_postponed_product(forward, products, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr("ds_fused.modules.layers.product.glu", lambda *args: calls.append(args) or glu(*args))
    layer, x = AnyForward(forward), torch.randn(2, 6, requires_grad=True)
    expected = layer(x)
    swap(layer, Product, ("act_fn",), fused_act="silu")
    found = layer(x)
    assert type(found) is Tensor and len(calls) == products
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (found, expected)))
    torch.compiler.reset()  # one forward with too many layers would end compilation
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
@pytest.mark.parametrize(
    ("mixin", "layer", "state"),
    [
        (LayerNorm, nn.LayerNorm(4), {}),
        (GroupNorm, nn.GroupNorm(2, 4), {}),
        (PyTorchRMSNorm, nn.RMSNorm(4), {"fused_eps": "eps", "fused_offset": 0.0, "fused_cast": "after_weight"}),
    ],
)
def test_what_is_no_real_number_is_the_originals(
    mixin: type, layer: nn.Module, state: dict, dtype: torch.dtype
) -> None:
    x, said = torch.arange(8).view(2, 4).to(dtype), []
    fused = copy.deepcopy(layer)
    swap(fused, mixin, **state)
    for each in (layer, fused):
        try:
            said.append(each(x))
        except (RuntimeError, NotImplementedError) as error:
            said.append(str(error))
    if isinstance(said[0], Tensor):
        torch.testing.assert_close(*said)
    else:
        assert said[0] == said[1]


def test_a_norm_of_a_nested_tensor() -> None:
    layer = nn.LayerNorm(4)
    x = torch.nested.nested_tensor([torch.randn(n, 4) for n in (2, 3)])
    wanted = layer(x)
    swap(layer, LayerNorm)
    for one, other in zip(layer(x).unbind(), wanted.unbind(), strict=True):
        assert torch.equal(one, other)
