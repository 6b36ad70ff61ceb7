"""linear_cosine: it is PyTorch's cosine similarity. How heads of two models are cut is tested in test_linear_jsd.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, randn
from heads import MANY, as_accurate_under_autocast, over_two_to_the_31_logits

from ds_fused.ops.vocab import _cosine
from ds_fused.ops.vocab.linear_cosine import linear_cosine, linear_cosine_reference

MB = 2**-20  # chunk_mb and keep_mb in bytes
# all kept; none, in chunks of 4 tokens and slabs of 4 words; some
CUTS = [{"chunk_mb": 1, "keep_mb": 1}, {"chunk_mb": MB, "keep_mb": 0}, {"chunk_mb": MB, "keep_mb": 300 * MB}]

pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)
only_kernels = pytest.mark.parametrize("where", ["kernels"], indirect=True)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks so small that a row of 11 has whole ones and a rest."""
    monkeypatch.setattr(_cosine, "FWD_BLOCK", 8)
    monkeypatch.setattr(_cosine, "BWD_BLOCK", 8)


def ours(x, weight, bias, tx, tweight, tbias, labels=None, **options):
    return linear_cosine(x, weight, tx, tweight, labels, student_bias=bias, teacher_bias=tbias, **options)


def theirs(x, weight, bias, tx, tweight, tbias, labels=None, chunk_mb=0, keep_mb=0, **options):
    return linear_cosine_reference(x, weight, tx, tweight, labels, student_bias=bias, teacher_bias=tbias, **options)


def some(m, h, v, device):
    """Of the student, and of a wider teacher that agrees with it to some extent."""
    labels = torch.arange(m, device=device) % v
    labels[1::4] = -100
    x, weight, bias = randn(m, h, device=device), randn(v, h, device=device), randn(v, device=device)
    more = [randn(n, 1, device=device) for n in (m, v)]
    teacher = [torch.cat((x, more[0]), -1), torch.cat((weight, more[1]), -1), -bias]
    return [x, weight, bias, *teacher, labels]


def judged(where, dtype, sizes, frozen=(), **options):
    # an exact 0 is left of two numbers of one sign
    floor = 1e-6 if sizes == (1, 1, 1) else 0.0
    as_accurate(ours, theirs, some(*sizes, where), dtype, frozen=(*frozen, 3, 4, 5), floor=floor, **options)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 11)])  # least; odd, with a rest
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_cosine(dtype, sizes, where, blocks):
    judged(where, dtype, sizes, **CUTS[1])


@pytest.mark.parametrize("cut", CUTS)
def test_cuts(cut, where, blocks):
    judged(where, torch.bfloat16, (6, 3, 11), reduction="none", **cut)


@only_plain
@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1)])
def test_frozen(frozen, where):
    judged(where, torch.bfloat16, (6, 3, 11), frozen=frozen, **CUTS[2])


def test_without_labels_and_biases(where):
    inputs = some(3, 3, 11, where)[:6]
    inputs[2] = inputs[5] = None
    as_accurate(ours, theirs, inputs, torch.float32, frozen=(3, 4), reduction="sum")


def test_without_tokens(where):
    as_accurate(ours, theirs, some(0, 3, 11, where), torch.float32, frozen=(3, 4, 5), reduction="sum")


def test_leading_dimensions_and_strides(where):
    x, weight, bias, _, tweight, tbias, labels = some(6, 5, 23, where)
    x = x.view(3, 2, 5).transpose(0, 1)  # not contiguous
    tx = randn(2, 3, 12, device=where).bfloat16()[..., ::2]  # columns apart
    inputs = [x, weight, bias, tx, tweight, tbias, labels.view(2, 3).int()]
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=(3, 4, 5), reduction="none")


@only_plain
def test_autocast(where):
    as_accurate_under_autocast(ours, theirs, some(11, 5, 23, where), frozen=(3, 4, 5))


def test_ignored_tokens_are_not_read(where):
    x, weight, _, tx, tweight, _, labels = (t.float() if t.is_floating_point() else t for t in some(5, 3, 11, where))
    ignored = labels == -100
    x[ignored] = tx[ignored] = float("nan")
    x.requires_grad_()
    for cut in CUTS:
        loss = linear_cosine(x, weight, tx, tweight, labels, **cut)
        (dx,) = torch.autograd.grad(loss, x)
        assert loss.isfinite() and dx.isfinite().all() and not dx[ignored].any() and dx[~ignored].any()


@pytest.mark.parametrize("nobodys", [(0,), (1,), (0, 1)])
def test_logits_of_zero(nobodys, where):
    x, weight, _, tx, tweight, *_ = (t.float() for t in some(4, 3, 11, where))
    for i in nobodys:
        (x, tx)[i].zero_()
    for loss in (linear_cosine, linear_cosine_reference):
        assert loss(x, weight, tx, tweight).item() == 1.0


@only_plain
def test_it_is_the_cosine_of_pytorch(where):
    x, weight, bias, tx, tweight, tbias, _ = some(5, 3, 11, where)
    expected = 1 - F.cosine_similarity(F.linear(x, weight, bias), F.linear(tx, tweight, tbias), -1)
    torch.testing.assert_close(ours(x, weight, bias, tx, tweight, tbias, reduction="none"), expected)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
@pytest.mark.parametrize("keep_mb", [0, 1024])
def test_real_size(keep_mb, where, monkeypatch):
    monkeypatch.undo()  # the sides of real life
    x, weight, bias, tx, tweight, tbias, labels = some(2048, 4096, 128256, where)
    inputs = [x, 0.02 * weight, bias, tx, 0.02 * tweight, tbias, labels]
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=(3, 4, 5), chunk_mb=128, keep_mb=keep_mb)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
def test_over_two_to_the_31_elements(where, monkeypatch):
    monkeypatch.undo()
    tx, tweight = (torch.randn(n, 8, device=where, dtype=torch.bfloat16) for n in MANY)
    over_two_to_the_31_logits(
        lambda x, w, tokens: linear_cosine(x, w, tx[tokens], tweight, reduction="none", chunk_mb=8192, keep_mb=8192),
        lambda x, w, tokens: linear_cosine_reference(x, w, tx[tokens].double(), tweight.double(), reduction="none"),
        where,
    )


@only_plain
def test_errors(where):
    x, weight, _, tx, tweight, _, labels = (t.float() if t.is_floating_point() else t for t in some(5, 3, 11, where))
    with pytest.raises(ValueError, match="linear_cosine: teacher_weight requires a gradient"):
        linear_cosine(x, weight, tx, tweight.clone().requires_grad_())
    with pytest.raises(ValueError, match="linear_cosine: reduction is 'total'"):
        linear_cosine(x, weight, tx, tweight, labels, reduction="total")
    with pytest.raises(ValueError, match="must have the same tokens and the same vocabulary"):
        linear_cosine(x, weight, tx, tweight[:5])
