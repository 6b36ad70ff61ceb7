"""A head that is not trained: loss and gradient of x against fp64, each slab and each logit looked at once."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, nan_filled, randn
from three_slabs import ThreeSlabs

from ds_fused.ops.vocab import frozen_head
from ds_fused.ops.vocab.frozen_head import FrozenHeadFunction
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ds_fused.ops.vocab.linear_log_probs import linear_log_probs

MB = 2**-20  # chunk_mb in bytes
# one tile; chunks of few tokens
CUTS = [{"chunk_mb": 1}, {"chunk_mb": MB}]
# so many rows that the worst error of PyTorch is no luck
M = 24
OPTIONS = [
    {},
    {"label_smoothing": 0.3, "z_loss": 0.02},
    {"softcap": 5.0, "logit_scale": 0.7, "z_loss": 0.1, "ignore_index": 3},
    {"reduction": "none"},
]
pytestmark = pytest.mark.usefixtures("where")


def some(m, h, v, device, ignore_index=-100):
    labels = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(m + v))
    labels[1::4] = ignore_index
    return [2 * randn(m, h, device=device), randn(v, h, device=device), labels.to(device)]


def ours(x, weight, labels, **options):
    # else a whole weight's gradients are made in the forward, token after token (one_pass.py)
    return linear_cross_entropy(x, weight, labels, grad_in_forward=False, **options)


def theirs(x, weight, labels, chunk_mb=0, **options):
    return linear_cross_entropy_reference(x, weight, labels, **options)


def in_slabs(x, weight, labels, **options):
    return linear_cross_entropy(x, ThreeSlabs(weight, requires_grad=False), labels, **options)


@pytest.fixture(autouse=True)
def used(monkeypatch):
    """How often the way was taken."""
    seen = []
    forward = FrozenHeadFunction.forward
    monkeypatch.setattr(FrozenHeadFunction, "forward", staticmethod(lambda *args: (seen.append(1), forward(*args))[1]))
    return seen


# each option with one of the cuts, and each with the other for --all
@pytest.mark.parametrize(
    "options, cut",
    [
        pytest.param(options, cut, marks=[] if (i + k) % len(CUTS) == 0 else [pytest.mark.all])
        for i, options in enumerate(OPTIONS)
        for k, cut in enumerate(CUTS)
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", [ours, in_slabs])
def test_gradient_of_x(way, dtype, options, cut, where, used):
    inputs = some(M, 3, 29, where, options.get("ignore_index", -100))
    as_accurate(way, theirs, inputs, dtype, frozen=(1,), **options, **cut)
    assert used


@pytest.mark.parametrize("way", [ours, in_slabs])
def test_a_mean_over_no_token(way, where):
    x, weight, labels = some(6, 3, 29, where)
    x, weight = x.float().requires_grad_(), weight.float()
    loss = way(x, weight, torch.full_like(labels, -100))
    assert loss.isnan() and not torch.autograd.grad(loss, x)[0].any()


def test_fp16(where):
    as_accurate(in_slabs, theirs, some(M, 3, 29, where), torch.float16, frozen=(1,), reduction="none", chunk_mb=MB)


@pytest.mark.parametrize("way", [ours, in_slabs])
def test_a_bias_that_is_not_trained_either(way, where, used):
    bias = randn(29, device=where)

    def with_bias(function):
        return lambda x, weight, labels, bias, **options: function(x, weight, labels, bias=bias, **options)

    as_accurate(
        with_bias(way), with_bias(theirs), [*some(M, 3, 29, where), bias], torch.float32, frozen=(1, 3), chunk_mb=MB
    )
    assert used


def test_a_confident_token_keeps_its_bits(where):
    """p of the label within 1e-3 of 1: what is left of it is no difference of numbers of bf16."""
    x, weight, labels = some(6, 8, 29, where)
    labels = torch.arange(6, device=where)
    x = 0.1 * x + weight[:6] * (8.0 / weight[:6].square().sum(1, keepdim=True).sqrt())
    as_accurate(in_slabs, theirs, [x, weight, labels], torch.bfloat16, frozen=(1,), chunk_mb=1)


def test_each_slab_is_gathered_once_and_each_logit_computed_once(where, monkeypatch):
    x, weight, labels = (t.float() if t.is_floating_point() else t for t in some(6, 5, 29, where))
    products = []
    for name in ("logits_of", "product"):
        function = getattr(frozen_head, name)
        monkeypatch.setattr(frozen_head, name, lambda *a, f=function, n=name, **k: (products.append(n), f(*a, **k))[1])
    slabs = ThreeSlabs(weight, requires_grad=False)
    loss = linear_cross_entropy(x.requires_grad_(), slabs, labels, chunk_mb=1)
    loss.backward()
    assert slabs.calls == [f"{what} {k}" for k, what in ((0, "prefetch"), (0, "gather"), (1, "prefetch"), (1, "gather"),
                                                         (2, "prefetch"), (2, "gather"))]  # fmt: skip
    assert products == ["logits_of", "product"] * 3


def test_backward_again_is_right(where):
    x, weight, labels = (t.float() if t.is_floating_point() else t for t in some(6, 5, 29, where))
    loss = ours(x.requires_grad_(), weight, labels)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x, torch.tensor(0.5, device=where))
    assert torch.equal(0.5 * first, second)


@pytest.mark.parametrize("labels", [[-100] * 4, []])
def test_nothing_counts(labels, where, used):
    labels = torch.tensor(labels, dtype=torch.int64, device=where)
    x = randn(len(labels), 5, device=where).float().requires_grad_()
    with nan_filled():
        loss = ours(x, randn(29, 5, device=where).float(), labels, reduction="sum", label_smoothing=0.1)
        loss.backward()
    assert loss == 0 and not x.grad.any() and used


def test_what_it_does_not_take(where, used):
    """Another way is as right: a softcap with smoothing, entropies, smoothed classes of a weight, a trained bias."""
    x, weight, labels = some(5, 3, 29, where)
    both = {"softcap": 5.0, "label_smoothing": 0.1}
    as_accurate(ours, theirs, [x, weight, labels], torch.float32, frozen=(1,), **both)
    smoothed = {"class_weight": torch.rand(29, device=where), "label_smoothing": 0.1}
    linear_cross_entropy(x.float().requires_grad_(), weight.float(), labels, **smoothed).backward()
    linear_log_probs(x.float().requires_grad_(), weight.float(), labels, entropy=True)[1].sum().backward()
    bias = randn(29, device=where).float().requires_grad_()
    linear_cross_entropy(x.float().requires_grad_(), weight.float(), labels, bias=bias).backward()
    assert not used
    linear_log_probs(x.float().requires_grad_(), weight.float(), labels).sum().backward()
    assert used
