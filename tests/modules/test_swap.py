"""The exchange of a layer's class: what stays, what comes back, and what is left alone."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

from ds_fused.modules.swap import as_originals, fused_class, is_fused, original_class, swap, unswap, why_not_swapped


class Layer(nn.Module):
    """Stands for a model's layer; at module level, so that it can be pickled."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4))
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.shift


class Slotted(Layer):
    __slots__ = ("extra",)


class Doubled:
    """A mix-in whose effect is easy to see."""

    factor: float

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * (x * self.weight + self.shift)


X = torch.arange(4.0)


def test_behaviour_changes_and_nothing_else() -> None:
    layer = Layer()
    before, weight, state = layer(X), layer.weight, layer.state_dict()
    swap(layer, Doubled, factor=2.0)
    assert is_fused(layer) and isinstance(layer, Layer) and original_class(layer) is Layer
    assert torch.equal(layer(X), 2 * before)
    assert layer.weight is weight
    assert list(layer.state_dict()) == list(state)
    cls = type(layer)
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ("Layer", "Layer", Layer.__module__)
    assert repr(layer).startswith("FusedLayer(")

    unswap(layer)
    assert type(layer) is Layer
    assert vars(layer).keys() == vars(Layer()).keys()
    assert torch.equal(layer(X), before)


def test_originals_for_a_while() -> None:
    model = nn.Sequential(Layer(), Slotted())
    swap(model[0], Doubled, factor=2.0)
    fused = type(model[0])
    with pytest.raises(ArithmeticError), as_originals(model):
        assert [type(layer) for layer in model] == [Layer, Slotted]
        raise ArithmeticError
    assert [type(layer) for layer in model] == [fused, Slotted]


def test_one_class_for_all_layers_of_a_kind() -> None:
    first, second = Layer(), Layer()
    swap(first, Doubled, factor=2.0)
    swap(second, Doubled, factor=3.0)
    assert type(first) is type(second) is fused_class(Doubled, Layer)


def test_hooks_keep_firing() -> None:
    layer, seen = Layer(), []
    layer.register_forward_hook(lambda *_: seen.append("forward"))
    layer.weight.register_post_accumulate_grad_hook(lambda _: seen.append("gradient"))
    swap(layer, Doubled, factor=2.0)
    layer(X).sum().backward()
    assert seen == ["forward", "gradient"]


def test_slots() -> None:
    layer = Slotted()
    layer.extra = 5
    swap(layer, Doubled, factor=2.0)
    assert layer.extra == 5
    unswap(layer)
    assert type(layer) is Slotted and layer.extra == 5


@pytest.mark.parametrize("kind", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies_are_swapped_too(kind: str) -> None:
    layer = Layer()
    swap(layer, Doubled, factor=2.0)
    if kind == "deepcopy":
        made = copy.deepcopy(layer)
    elif kind == "copy":
        made = copy.copy(layer)
    elif kind == "pickle":
        made = pickle.loads(pickle.dumps(layer))
    else:
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    assert type(made) is type(layer)
    assert torch.equal(made(X), layer(X))
    assert (made.weight is layer.weight) == (kind == "copy")
    unswap(made)
    assert type(made) is Layer and is_fused(layer)


def test_a_swapped_layer_can_be_frozen_cast_and_compiled() -> None:
    layer = Layer()
    swap(layer, Doubled, factor=2.0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), layer(X))
    assert layer.half().weight.dtype is torch.float16
    assert not layer.requires_grad_(False).weight.requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_left_alone_with_a_reason() -> None:
    hooked = Layer()
    hooked.forward = hooked.forward  # as Accelerate's hooks and kernelize plant one
    liger = type("LigerRMSNorm", (Layer,), {"__module__": "liger_kernel.transformers.rms_norm"})()
    theirs = {"__name__": "deepspeed.ops.triton_ops.fused_rms_norm"}
    exec("def forward(self, x):\n    return x", theirs)
    # as functools.wraps leaves it: the wrapper bears the name of what it wraps
    forward = functools.wraps(Layer.forward)(theirs["forward"])
    patched = type("Norm", (Layer,), {"forward": forward})
    fused = Layer()
    swap(fused, Doubled, factor=2.0)
    cases = {
        "instance": hooked,
        "ScriptModule": torch.jit.trace(Layer(), X, check_trace=False),
        "torch.compile": torch.compile(Layer()),
        "Liger": liger,
        "DeepSpeed": patched(),
        "already": fused,
    }
    for word, layer in cases.items():
        assert word in why_not_swapped(layer), word
        with pytest.raises(ValueError, match=word):
            swap(layer, Doubled, factor=2.0)
    assert why_not_swapped(Layer()) is None


def test_refuses_to_hide_an_attribute_or_to_undo_what_is_not_there() -> None:
    with pytest.raises(ValueError, match="shift"):
        swap(Layer(), Doubled, shift=1.0)
    with pytest.raises(ValueError, match="not a swapped layer"):
        unswap(Layer())


# FSDP2 and parametrize build their class over ours: our behaviour stays live, but it can't be taken out from below
def test_another_class_over_ours() -> None:
    layer = Layer()
    swap(layer, Doubled, factor=2.0)
    expected = layer(X)
    layer.__class__ = type("FSDPLayer", (type(layer),), {})
    assert is_fused(layer) and torch.equal(layer(X), expected)
    with pytest.raises(ValueError, match="another class after the swap"):
        unswap(layer)
