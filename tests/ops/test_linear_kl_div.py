"""linear_kl_div: it is PyTorch's KL divergence, either way round. How it is cut is tested in test_linear_jsd.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, randn
from heads import MANY, as_accurate_under_autocast, over_two_to_the_31_logits

from ds_fused.ops.vocab.linear_kl_div import linear_kl_div, linear_kl_div_reference

pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)


def theirs(*inputs, chunk_mb=0, grad_in_forward=True, **options):
    return linear_kl_div_reference(*inputs, **options)


def some(m, h, v, device):
    labels = torch.arange(m, device=device) % v
    labels[1::4] = -100
    student, teacher = [randn(m, h, device=device), randn(v, h, device=device)], randn(m + v, h + 1, device=device)
    return [*student, teacher[:m], teacher[m:], labels]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 3, 11)])  # least; odd
def test_linear_kl_div(sizes, dtype, reverse, where):
    options = {"reverse": reverse, "temperature": 1.5, "chunk_mb": 2**-20}
    # of one word both log-probabilities are 0
    floor = 2.0**-24 if sizes[-1] == 1 else 0.0
    as_accurate(linear_kl_div, theirs, some(*sizes, where), dtype, frozen=(2, 3), floor=floor, **options)


@pytest.mark.parametrize("reverse", [False, True])
def test_leading_dimensions_and_strides(reverse, where):
    x, weight, _, tweight, labels = some(6, 5, 23, where)
    x = x.view(3, 2, 5).transpose(0, 1)  # not contiguous
    tx = randn(2, 3, 12, device=where).bfloat16()[..., ::2]  # columns apart
    inputs = [x, weight, tx, tweight, labels.view(2, 3).int()]
    as_accurate(linear_kl_div, theirs, inputs, torch.bfloat16, frozen=(2, 3), reverse=reverse, reduction="none")


@pytest.mark.parametrize("reverse", [False, True])
def test_without_tokens(reverse, where):
    options = {"reverse": reverse, "reduction": "sum"}
    as_accurate(linear_kl_div, theirs, some(0, 3, 11, where), torch.float32, frozen=(2, 3), **options)


@only_plain
@pytest.mark.parametrize("reverse", [False, True])
def test_autocast(reverse, where):
    as_accurate_under_autocast(linear_kl_div, theirs, some(11, 5, 23, where), frozen=(2, 3), reverse=reverse)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("where", ["kernels"], indirect=True)
@pytest.mark.parametrize("reverse", [False, True])
def test_over_two_to_the_31_elements(reverse, where, monkeypatch):
    monkeypatch.undo()
    tx, tweight = (torch.randn(n, 8, device=where, dtype=torch.bfloat16) for n in MANY)
    options = {"reverse": reverse, "reduction": "none"}
    room = {"chunk_mb": 8192, "keep_mb": 8192}
    over_two_to_the_31_logits(
        lambda x, w, tokens: linear_kl_div(x, w, tx[tokens], tweight, **options, **room),
        lambda x, w, tokens: theirs(x, w, tx[tokens].double(), tweight.double(), **options), where,
    )  # fmt: skip


@only_plain
@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_the_kl_divergence_of_pytorch(reverse, where):
    x, weight, tx, tweight, _ = some(5, 3, 11, where)
    student, teacher = (F.linear(a, b).div(2.0).log_softmax(-1) for a, b in ((x, weight), (tx, tweight)))
    of, to = (student, teacher) if reverse else (teacher, student)
    expected = F.kl_div(to, of, log_target=True, reduction="none").sum(-1)
    loss = linear_kl_div(x, weight, tx, tweight, reverse=reverse, temperature=2.0, reduction="none")
    torch.testing.assert_close(loss, expected)


@only_plain
def test_errors(where):
    x, weight, tx, tweight, _ = (t.float() if t.is_floating_point() else t for t in some(5, 3, 11, where))
    with pytest.raises(ValueError, match="linear_kl_div: temperature is -1.0; it must be positive"):
        linear_kl_div(x, weight, tx, tweight, temperature=-1.0)
    with pytest.raises(ValueError, match="linear_kl_div: teacher_weight requires a gradient"):
        linear_kl_div(x, weight, tx, tweight.requires_grad_())
