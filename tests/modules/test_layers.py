"""The mix-ins by themselves: what they read from a layer, and the exchanged forward of attention."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ds_fused.modules.attention import apply_rotary_pos_emb, exchanged, same_arguments, stock_rope
from ds_fused.modules.mlp import act_of
from ds_fused.modules.norm import eps_name


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
        (ACT2FN["relu"], None),
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
        assert stock_rope(cls) is rotary
        made = exchanged(cls.forward, "apply_rotary_pos_emb", replacement)
        layer = cls()
        assert made(layer, 3) == expected
        assert layer.forward(3)[0] == 3  # the class's own is what it was
        assert (made.__name__, made.__qualname__) == (cls.forward.__name__, cls.forward.__qualname__)
        if name == "Decorated":
            assert layer.calls == 4  # both decorators, in both calls


def test_exchanged_forward_keeps_its_closure() -> None:
    cls = SCOPE["WithClosure"]
    assert exchanged(cls.forward, "apply_rotary_pos_emb", replacement)(cls(), 3) == ("exchanged", 3, cls)


def test_forward_that_can_not_be_exchanged() -> None:
    assert stock_rope(SCOPE["Super"]) is None
    assert stock_rope(nn.Linear) is None


def test_arguments() -> None:
    assert same_arguments(rotary) and same_arguments(apply_rotary_pos_emb)
    assert not same_arguments(lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1: (q, k))
