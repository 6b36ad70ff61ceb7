"""A divergence of two heads with its gradients made in the forward: against fp64, and the memory it takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accuracy import as_accurate, nan_filled, randn
from allocations import Peak
from heads import as_accurate_under_autocast
from torch import Tensor

from ds_fused.ops.common._tiles import MOST_ROUNDINGS
from ds_fused.ops.vocab import _linear_divergence, one_pass
from ds_fused.ops.vocab.linear_cosine import linear_cosine
from ds_fused.ops.vocab.linear_jsd import linear_jsd, linear_jsd_reference
from ds_fused.ops.vocab.linear_kl_div import linear_kl_div

TEACHER = (3, 4, 5)  # the places of its tensors

pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)
only_kernels = pytest.mark.parametrize("where", ["kernels"], indirect=True)


def ours(x, weight, bias, tx, tweight, tbias, labels=None, **options):
    return linear_jsd(x, weight, tx, tweight, labels, student_bias=bias, teacher_bias=tbias, **options)


def theirs(x, weight, bias, tx, tweight, tbias, labels=None, **options):
    return linear_jsd_reference(x, weight, tx, tweight, labels, student_bias=bias, teacher_bias=tbias, **options)


def some(m: int, h: int, v: int, device: torch.device, ignore_index: int = -100) -> list[Tensor]:
    labels = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(m + v))
    labels[1::4] = ignore_index
    student = [randn(m, h, device=device), randn(v, h, device=device), randn(v, device=device)]
    wide = h + 1  # another width than the student's
    teacher = [randn(m, wide, device=device, seed=1), randn(v, wide, device=device), randn(v, device=device, seed=1)]
    return [*student, *teacher, labels.to(device)]


def as_dtype(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in inputs]


# one token; a rest behind chunks of 4
@pytest.mark.parametrize("m", [1, 6])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(dtype, reduction, m, where):
    # a random number comes from upstream
    as_accurate(ours, theirs, some(m, 3, 23, where), dtype, frozen=TEACHER, reduction=reduction)


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0])
def test_betas(beta, where):
    inputs = some(6, 3, 23, where, ignore_index=3)
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=TEACHER, beta=beta, temperature=1.7, ignore_index=3)


@only_plain
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen(frozen, where):
    as_accurate(ours, theirs, some(11, 5, 23, where), torch.bfloat16, frozen=(*frozen, *TEACHER))


def test_without_labels_and_biases(where):
    inputs = some(6, 3, 11, where)[:6]
    inputs[2] = inputs[5] = None
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=TEACHER)


@only_plain
def test_leading_dimensions_and_strides(where):
    x, weight, bias, tx, tweight, tbias, labels = some(6, 5, 23, where)
    x, tx = x.view(3, 2, 5).transpose(0, 1), randn(2, 3, 12, device=where)[..., ::2]  # not contiguous; columns apart
    inputs = [x, weight, bias, tx, tweight, tbias, labels.view(2, 3).int()]
    as_accurate(ours, theirs, inputs, torch.float32, frozen=TEACHER)


@only_plain
def test_autocast(where):
    as_accurate_under_autocast(ours, theirs, some(11, 5, 23, where), frozen=TEACHER)


@only_plain
@pytest.mark.parametrize("tokens", [4 * MOST_ROUNDINGS, 256])  # as many chunks as are added up in bf16, and many more
def test_dweight_is_at_most_twice_as_far_off_as_one_product(tokens, where):
    as_accurate(ours, theirs, some(tokens, 16, 48, where), torch.bfloat16, frozen=TEACHER, reduction="sum")


def test_ignored_tokens_are_exactly_zero(where):
    x, *rest, labels = as_dtype(some(6, 5, 23, where), torch.bfloat16)
    x[1::4], rest[2][1::4] = float("nan"), float("nan")  # their logits are NaN, and nobody looks
    with nan_filled():
        loss = ours(x.requires_grad_(), *rest, labels)
        (dx,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and not dx[1::4].any() and dx.isfinite().all() and dx[::4].any()


def test_all_ignored(where):
    *tensors, labels = as_dtype(some(5, 3, 13, where), torch.float32)
    leaves = [t.requires_grad_() for t in tensors[:3]]
    loss = ours(*tensors, torch.full_like(labels, -100))
    loss.backward()
    assert loss.isnan() and not any(t.grad.any() for t in leaves)


def test_empty_batch(where):
    x, weight = torch.empty(0, 3, device=where, requires_grad=True), torch.ones(13, 3, device=where, requires_grad=True)
    tx, tweight = torch.empty(0, 4, device=where), torch.ones(13, 4, device=where)
    assert linear_jsd(x, weight, tx, tweight).isnan()
    with nan_filled():
        linear_jsd(x, weight, tx, tweight, reduction="sum").backward()
    assert x.grad.shape == (0, 3) and not weight.grad.any()


@only_plain
@pytest.mark.parametrize("op", [linear_jsd, linear_kl_div, linear_cosine])
def test_second_backward(op, where):
    x, weight, _, tx, tweight, *_ = as_dtype(some(5, 3, 23, where), torch.float32)
    loss = op(x.requires_grad_(), weight, tx, tweight)
    torch.autograd.grad(loss, x, retain_graph=True)
    with pytest.raises(RuntimeError, match=f"{op.__name__}: a second backward.*grad_in_forward=False"):
        loss.backward()


@only_plain
def test_what_it_is_not_for_is_computed_in_the_backward(where, monkeypatch):
    monkeypatch.delattr(_linear_divergence, "OnePassFunction")
    inputs = some(5, 3, 23, where)
    as_accurate(ours, theirs, inputs, torch.float32, frozen=TEACHER, reduction="none")
    as_accurate(ours, theirs, inputs, torch.float16, frozen=TEACHER)
    with torch.no_grad():
        assert ours(*as_dtype(inputs, torch.float32)).isfinite()


# a loss's result is dx [M, H] and dweight [V, H]
M, H, V = 64, 32, 256
ITEM = 2


@only_kernels
@pytest.mark.parametrize("op", [linear_jsd, partial(linear_kl_div, reverse=True), linear_cosine])
def test_peak_of_memory(op, where):
    x, weight, _, tx, tweight, _, labels = as_dtype(some(M, H, V, where), torch.bfloat16)
    tx, tweight = tx[:, :H].contiguous(), tweight[:, :H].contiguous()
    x.requires_grad_(), weight.requires_grad_()
    with Peak(x, weight, tx, tweight, labels) as peak:
        op(x, weight, tx, tweight, labels).backward()
    result = ITEM * (M * H + V * H)
    # H/4 tokens' logits of both models, which are half of the weight; numbers of each token
    assert result + ITEM * V * H // 2 <= peak.bytes <= result + ITEM * V * H // 2 + 64 * M + 1024


# tokens of a chunk: both models' logits take 501 MiB of memory beside the result, and 297
@only_plain
@pytest.mark.parametrize(("m", "h", "v", "cut"), [(4096, 4096, 128256, 1024), (4096, 2048, 151936, 512)])
def test_cuts_of_real_sizes(m, h, v, cut, where, monkeypatch):
    monkeypatch.undo()  # the sides of real life
    x, weight = (torch.empty(n, h, dtype=torch.bfloat16, device="meta") for n in (m, v))
    assert _linear_divergence._cut(x, weight, 512, dweight=True) == (cut, True)


@only_plain
def test_an_fp32_sum_of_dweight_is_for_larger_chunks(where, monkeypatch):
    monkeypatch.undo()
    x, weight = (torch.empty(n, 2048, dtype=torch.bfloat16, device="meta") for n in (32768, 151936))
    # 64 chunks of 512 tokens would be too many roundings, 8 of 4096 take more memory than the sum
    assert _linear_divergence._cut(x, weight, 1024, dweight=True) == (1024, False)
    assert one_pass.cut(32768, 151936, 2048, 4, 2**20 * 297, "auto", trains=True) == (512, False)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_real_size(beta, where, monkeypatch):
    monkeypatch.undo()
    x, weight, _, tx, tweight, _, labels = some(2048, 4096, 128256, where)
    inputs = [x, 0.02 * weight, None, tx, 0.02 * tweight, None, labels]
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=TEACHER, reduction="sum", beta=beta)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
def test_memory_of_a_real_size(where, monkeypatch):
    monkeypatch.undo()
    x, tx = (torch.randn(4096, 4096, device=where, dtype=torch.bfloat16) for _ in range(2))
    weight, tweight = (torch.randn(128256, 4096, device=where, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_(), weight.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_jsd(x, weight, tx, tweight).backward()
    # Liger 0.8.5 takes 1598 MiB (benchmarks/results/h100/later/ops.md)
    assert torch.cuda.max_memory_allocated() - before < 1598 * 2**20
