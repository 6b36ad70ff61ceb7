"""linear_log_probs: both outputs and all gradients against fp64, with upstream gradients that differ by token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, nan_filled, randn
from allocations import Allocations
from heads import MANY, as_accurate_under_autocast, over_two_to_the_31_logits
from shards import Shard
from three_slabs import ThreeSlabs

from ds_fused.ops.common import _tiles
from ds_fused.ops.losses import _cross_entropy_kernels
from ds_fused.ops.vocab.linear_log_probs import linear_log_probs, linear_log_probs_reference

MB = 2**-20  # chunk_mb and keep_mb in bytes
# one tile; slabs of 4 rows made again; slabs of which some are kept; every logit kept
CUTS = [
    {"chunk_mb": 1, "keep_mb": 0},
    {"chunk_mb": MB, "keep_mb": 0},
    {"chunk_mb": MB, "keep_mb": 180 * MB},
    {"chunk_mb": MB, "keep_mb": 1},
]
EVERYTHING = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.4, "ignore_index": 3}

pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)
only_kernels = pytest.mark.parametrize("where", ["kernels"], indirect=True)


def ours(x, weight, labels, bias=None, **options):
    return linear_log_probs(x, weight, labels, bias=bias, **options)


def theirs(x, weight, labels, bias=None, chunk_mb=0, keep_mb=0, **options):
    return linear_log_probs_reference(x, weight, labels, bias=bias, **options)


def in_slabs(x, weight, labels, bias=None, **options):
    return linear_log_probs(x, ThreeSlabs(weight, weight.requires_grad), labels, bias=bias, **options)


def some(m, h, v, device, ignore_index=-100, labels_dtype=torch.int64):
    generator = torch.Generator().manual_seed(m + v)
    labels = torch.randint(0, v, (m,), generator=generator)
    labels[1::4] = ignore_index
    return [
        2 * randn(m, h, device=device), randn(v, h, device=device), labels.to(device, labels_dtype),
        randn(v, device=device),
    ]  # fmt: skip


# least; odd, with a rest of a slab
@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 3, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_log_probs(dtype, sizes, where):
    as_accurate(ours, theirs, some(*sizes, where), dtype, entropy=True, **CUTS[1])


def test_without_an_entropy(where):
    # it is a switch of the kernels; the rest of these tests has it on
    as_accurate(ours, theirs, some(4, 3, 11, where), torch.bfloat16, **CUTS[1])


@only_plain
@pytest.mark.parametrize("options", [*({k: v} for k, v in EVERYTHING.items()), EVERYTHING])
def test_options(options, where):
    inputs = some(6, 5, 23, where, options.get("ignore_index", -100))
    as_accurate(ours, theirs, inputs, torch.bfloat16, entropy=True, **options, **CUTS[2])


@only_plain
@pytest.mark.parametrize("cut", CUTS)
def test_cuts(cut, where):
    as_accurate(ours, theirs, some(11, 5, 29, where), torch.float32, entropy=True, **cut)


@pytest.mark.all
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("options", [{}, {"entropy": True}, {"entropy": True, **EVERYTHING}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_product(dtype, options, cut, where):
    as_accurate(ours, theirs, some(6, 5, 23, where, options.get("ignore_index", -100)), dtype, **options, **cut)


@only_kernels
def test_options_in_kernels(where):
    as_accurate(ours, theirs, some(4, 3, 23, where, 3), torch.bfloat16, entropy=True, **EVERYTHING, **CUTS[2])


@only_kernels
def test_rows_of_several_blocks(where, monkeypatch):
    monkeypatch.setattr(_cross_entropy_kernels, "FWD_BLOCK", 8)
    monkeypatch.setattr(_cross_entropy_kernels, "BWD_BLOCK", 8)
    x, weight, labels, bias = some(4, 3, 23, where)
    bias[8:16] = float("-inf")  # a whole block of it
    bias[3], bias[20] = 20.0, 30.0  # maxima that come late
    labels[0], labels[2] = 3, 22
    as_accurate(ours, theirs, [x, weight, labels, bias], torch.float32, frozen=(2,), entropy=True, **CUTS[0])


@only_plain
@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 1), (1, 3), (0, 3)])
def test_frozen(frozen, where):
    as_accurate(ours, theirs, some(6, 3, 29, where), torch.bfloat16, frozen=frozen, entropy=True, **CUTS[2])


def test_slabs(where):
    options = {**EVERYTHING, "ignore_index": 0}
    as_accurate(in_slabs, theirs, some(3, 3, 29, where, 0), torch.bfloat16, entropy=True, **options)


@only_plain
@pytest.mark.parametrize("n_tokens", [0, 6])
def test_slabs_are_called_in_an_order_that_no_token_changes(n_tokens, where):
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(6, 3, 29, where))
    slabs = ThreeSlabs(weight)
    sum(linear_log_probs(x[:n_tokens], slabs, labels[:n_tokens], entropy=True)).sum().backward()
    assert [call for call in slabs.calls if "prefetch" not in call] == [
        "gather 0", "gather 1", "gather 2", "scatter 2", "scatter 1", "scatter 0", "finish",
    ]  # fmt: skip
    assert slabs.grad.isfinite().all()


def where_it_stays(x, weight, labels, bias=None, **options):
    return linear_log_probs(x, Shard(weight, 0, len(weight)), labels, bias=bias, **options)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_stays_on_its_ranks(dtype, entropy, where):
    inputs = some(6, 3, 29, where, EVERYTHING["ignore_index"])
    as_accurate(where_it_stays, theirs, inputs, dtype, entropy=entropy, chunk_mb=MB, **EVERYTHING)


@only_plain
def test_one_output_alone_may_be_differentiated(where):
    x, weight, labels, _ = some(6, 3, 29, where)
    for i in (0, 1):
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        again = [t.clone().requires_grad_() for t in (x, weight)]
        ours(*leaves, labels, entropy=True, **CUTS[2])[i].sum().backward()
        theirs(*again, labels, entropy=True)[i].sum().backward()
        for mine, exact in zip(leaves, again, strict=True):
            torch.testing.assert_close(mine.grad, exact.grad)


def test_masked_vocabulary(where):
    x, weight, _, bias = some(3, 3, 23, where)
    bias[:5], bias[14:] = float("-inf"), float("-inf")  # whole slabs of it, the first among them
    labels = torch.tensor([5, -100, 13], device=where)
    as_accurate(ours, theirs, [x, weight, labels, bias], torch.float32, entropy=True, **CUTS[1])


def test_a_sure_token_keeps_its_small_entropy(where):
    # logits of some hundreds: lse - sum(p z) in fp32 would be off by 1e-5
    x, weight, labels, bias = some(4, 3, 23, where)
    bias[7], bias[:3] = 300.0, 285.0
    inputs = [t.float() if t.is_floating_point() else t for t in (x, weight, labels, bias)]
    wide = [t.double() if t.is_floating_point() else t for t in inputs]
    entropy, exact = ours(*inputs, entropy=True, **CUTS[1])[1], theirs(*wide, entropy=True)[1]
    assert 1e-6 < exact.max() < 1e-3
    torch.testing.assert_close(entropy.double(), exact, rtol=1e-4, atol=3e-7)


def test_int32_labels_and_leading_dimensions(where):
    x, weight, labels, _ = some(6, 5, 23, where, labels_dtype=torch.int32)
    x = x.view(3, 2, 5).transpose(0, 1)  # not contiguous
    as_accurate(ours, theirs, [x, weight, labels.view(2, 3)], torch.bfloat16, entropy=True, **CUTS[2])


def test_ignored_tokens_are_exactly_zero(where):
    x, weight, labels, _ = some(5, 5, 23, where)
    x, weight = x.bfloat16(), weight.bfloat16()
    x[1::4] = float("nan")  # their logits are NaN, and nobody looks
    x.requires_grad_()
    outputs = ours(x, weight, labels, entropy=True, **CUTS[2])
    with nan_filled():
        (dx,) = torch.autograd.grad(sum(outputs).sum(), x)
    assert not dx[1::4].any() and dx.isfinite().all()
    assert all(not y[1::4].any() and y.isfinite().all() for y in outputs)


@pytest.mark.parametrize("cut", CUTS[:2])
def test_empty_batch(cut, where):
    x, weight = torch.empty(0, 3, device=where, requires_grad=True), torch.ones(13, 3, device=where, requires_grad=True)
    log_probs, entropy = ours(x, weight, torch.empty(0, dtype=torch.int64, device=where), entropy=True, **cut)
    with nan_filled():
        (log_probs.sum() + entropy.sum()).backward()
    assert log_probs.shape == entropy.shape == (0,) and x.grad.shape == (0, 3) and not weight.grad.any()


def test_second_backward(where):
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(5, 3, 23, where))
    weight.requires_grad_()
    log_probs = ours(x, weight, labels, **CUTS[1])
    first, second = (torch.autograd.grad(log_probs.sum(), weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    log_probs = ours(x, weight, labels, **CUTS[2])
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_log_probs: a second backward.*keep_mb=0"):
        log_probs.sum().backward()


@only_plain
def test_autocast(where):
    as_accurate_under_autocast(ours, theirs, some(11, 5, 29, where), entropy=True, **CUTS[2])


@only_plain
def test_compiled_without_graph_breaks(where):
    x, weight, labels, bias = (t.float() if t.is_floating_point() else t for t in some(6, 5, 8, where))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step(x, weight, labels, bias):
        log_probs, entropy = ours(x, weight, labels, bias, entropy=True, **CUTS[2])
        return (log_probs * torch.arange(6) - 0.1 * entropy).sum()

    expected = torch.autograd.grad(step(x, weight, labels, bias), leaves)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, exact in zip(torch.autograd.grad(compiled(x, weight, labels, bias), leaves), expected, strict=True):
        torch.testing.assert_close(mine, exact)


@only_plain
def test_scratch_is_bounded(where, monkeypatch):
    h, m, v = 32, 32, 512
    x, weight, labels, _ = some(m, h, v, where)
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    monkeypatch.setattr(_tiles, "LEAST_SIDE", 32)
    with Allocations() as made:
        sum(ours(x, weight, labels, entropy=True, chunk_mb=MB, keep_mb=0)).sum().backward()
    # dweight; never M x V
    assert sum(n >= v * h for n, _, _ in made.seen.values()) == 2
    assert max(n for n, _, _ in made.seen.values()) == v * h


@only_plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 7])}, r"label 7 lies outside \[0, 7\)"),
        ({"weight": torch.zeros(7, 4)}, r"x \(2, 3\) and weight \(7, 4\) must be \[..., H\] and \[V, H\]"),
        ({"weight": torch.zeros(7, 3, dtype=torch.bfloat16)}, "x is torch.float32 and weight is torch.bfloat16"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"softcap": -1.0}, "softcap is -1.0"),
        ({"chunk_mb": 0}, "chunk_mb=0 must be positive"),
    ],
)
def test_errors(changes, message, where):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(7, 3), "labels": torch.tensor([0, 1]), **changes}
    with pytest.raises(ValueError, match=f"linear_log_probs: .*{message}"):
        linear_log_probs(arguments.pop("x"), arguments.pop("weight"), arguments.pop("labels"), **arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
@pytest.mark.parametrize("keep_mb", [0, 1024])
def test_real_size(keep_mb, where, monkeypatch):
    monkeypatch.undo()  # the sides of real life
    x, weight, labels, _ = some(2048, 4096, 128256, where)
    as_accurate(ours, theirs, [x, 0.02 * weight, labels], torch.bfloat16, entropy=True, chunk_mb=128, keep_mb=keep_mb)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
def test_over_two_to_the_31_elements(where, monkeypatch):
    monkeypatch.undo()
    labels = torch.randint(0, MANY[1], MANY[:1], device=where)
    over_two_to_the_31_logits(
        lambda x, w, tokens: linear_log_probs(x, w, labels[tokens], entropy=True, chunk_mb=8192, keep_mb=8192),
        lambda x, w, tokens: linear_log_probs_reference(x, w, labels[tokens], entropy=True), where,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_cross_entropy_scaled_by_its_probabilities(reduction, where):
    """Liger's use_token_scaling, as the README composes it: each token's loss times its probability, held constant."""
    x, weight, labels, _ = some(12, 5, 29, where)
    inputs = [t.float().requires_grad_() for t in (x, weight)]
    found = []
    for composed in (True, False):
        if composed:
            log_probs = linear_log_probs(*inputs, labels)
            loss = -(log_probs.exp().detach() * log_probs).sum()
        else:
            logits = F.linear(*inputs)
            losses = F.cross_entropy(logits, labels, reduction="none")  # 0 where a label is ignored
            probabilities = logits.softmax(-1).gather(-1, labels.clamp_min(0)[:, None])[:, 0]
            loss = (losses * probabilities.detach()).sum()
        if reduction == "mean":
            loss = loss / (labels != -100).sum()
        found.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def _sequences(log_probs):
    """Of [4, 6]: two chosen answers, and two rejected ones to the same prompts."""
    return log_probs.sum(-1).split(2)


def dpo(log_probs, reference):
    (chosen, rejected), (was_chosen, was_rejected) = _sequences(log_probs), _sequences(reference)
    return -F.logsigmoid(0.3 * (chosen - rejected - was_chosen + was_rejected)).mean()


def ipo(log_probs, reference):
    # of mean log-probabilities
    (chosen, rejected), (was_chosen, was_rejected) = _sequences(log_probs / 6), _sequences(reference / 6)
    return (chosen - rejected - was_chosen + was_rejected - 1 / 0.6).square().mean()


def kto(log_probs, reference):
    chosen, rejected = _sequences(log_probs - reference)
    kl = (log_probs - reference).sum(-1).mean().detach().clamp_min(0)
    return 2 - torch.sigmoid(0.3 * (chosen - kl)).mean() - torch.sigmoid(0.3 * (kl - rejected)).mean()


def orpo(log_probs, reference):
    chosen, rejected = _sequences(log_probs / 6)
    odds = chosen - rejected - torch.log1p(-chosen.exp()) + torch.log1p(-rejected.exp())
    return -chosen.mean() - 0.1 * F.logsigmoid(odds).mean()


def grpo(log_probs, reference):
    advantages = torch.tensor([[1.0], [-0.5], [0.3], [-1.2]], dtype=log_probs.dtype, device=log_probs.device)
    ratio = (log_probs - log_probs.detach() + 0.3).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    apart = reference - log_probs
    return (0.04 * (apart.exp() - apart - 1) - gain).mean()


@only_plain
@pytest.mark.parametrize("loss", [dpo, ipo, kto, orpo, grpo], ids=lambda loss: loss.__name__)
def test_every_loss_of_log_probs(loss, where):
    """What trainers of preferences and rewards make of them: the gradients are those through all logits."""
    x, weight, labels, bias = some(24, 5, 29, where)
    reference = -3 - randn(4, 6, device=where).abs()
    found = []
    for log_probs_of in (linear_log_probs, linear_log_probs_reference):
        inputs = [tensor.double().requires_grad_() for tensor in (x.view(4, 6, 5), weight, bias)]
        log_probs = log_probs_of(inputs[0], inputs[1], labels.view(4, 6), bias=inputs[2])
        value = loss(log_probs, reference.to(log_probs))
        found.append([value.detach(), *torch.autograd.grad(value, inputs)])
    for ours_, theirs_ in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-6, atol=1e-8)
