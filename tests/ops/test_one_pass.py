"""linear_cross_entropy with its gradients made in the forward: against fp64, whatever comes from upstream."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, nan_filled, randn
from heads import MANY, as_accurate_under_autocast, over_two_to_the_31_logits
from torch import Tensor

from ds_fused.ops.common._tiles import MOST_ROUNDINGS
from ds_fused.ops.vocab import one_pass
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

MB = 2**-20
# all in one chunk; chunks of 4 tokens
CUTS = [{"chunk_mb": 1}, {"chunk_mb": MB}]
EVERYTHING = {"label_smoothing": 0.3, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 0.7, "ignore_index": 3}

pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)


def ours(x, weight, labels, bias=None, **options):
    return linear_cross_entropy(x, weight, labels, bias=bias, grad_in_forward=True, **options)


def theirs(x, weight, labels, bias=None, chunk_mb=0, **options):
    return linear_cross_entropy_reference(x, weight, labels, bias=bias, **options)


def some(m: int, h: int, v: int, device: torch.device, ignore_index: int = -100) -> list[Tensor]:
    labels = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(m + v))
    labels[1::4] = ignore_index
    return [2 * randn(m, h, device=device), randn(v, h, device=device), labels.to(device), randn(v, device=device)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(dtype, reduction, cut, where):
    inputs = some(5, 3, 23, where, EVERYTHING["ignore_index"])
    # a random number comes from upstream
    as_accurate(ours, theirs, inputs, dtype, reduction=reduction, **EVERYTHING, **cut)


@only_plain
@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 1), (1, 3), (0, 3)])
def test_frozen(frozen, where):
    as_accurate(ours, theirs, some(11, 5, 29, where), torch.bfloat16, frozen=frozen, **CUTS[1])


@only_plain
@pytest.mark.parametrize("tokens", [32, 128])  # as many chunks as are added up in bf16, and many more
def test_dweight_is_at_most_twice_as_far_off_as_one_product(tokens, where):
    x, weight, labels, _ = some(4 * tokens, 16, 48, where)
    as_accurate(ours, theirs, [x, weight, labels], torch.bfloat16, reduction="sum", **CUTS[1])


def test_few_chunks_are_added_up_in_bf16_and_many_in_fp32(where, monkeypatch):
    seen = []

    def product(out: Tensor, *args: Tensor, **options: object) -> None:
        seen.append(out.dtype)
        return whole(out, *args, **options)

    whole = one_pass.product
    monkeypatch.setattr(one_pass, "product", product)
    # 4 tokens fit. Few chunks; larger ones of 6, which take less memory than a sum in fp32; 16 would take more
    cases = ((4 * MOST_ROUNDINGS, torch.bfloat16, MOST_ROUNDINGS), (40, torch.bfloat16, 7), (128, torch.float32, 32))
    for n_tokens, dtype, chunks in cases:
        seen.clear()
        x, weight, labels, _ = (t.bfloat16() if t.is_floating_point() else t for t in some(n_tokens, 3, 23, where))
        ours(x, weight.requires_grad_(), labels, **CUTS[1])
        assert set(seen) == {dtype} and len(seen) == chunks


@only_plain
@pytest.mark.parametrize(
    ("m", "h", "v", "how"),
    [
        (4096, 4096, 32000, (4096, True)),  # all logits fit: the three products of a plain head
        (8192, 4096, 128256, (2048, True)),
        (8192, 2048, 256000, (1024, True)),
        (131072, 4096, 32000, (8192, False)),  # 16 chunks, too many to be added up in bf16
        (8192, 4096, 2**24, (1024, True)),  # more than chunk_mb, which is little beside dweight in fp32
    ],
)
def test_cuts_of_real_sizes(m, h, v, how, where, monkeypatch):
    monkeypatch.undo()  # the sides of real life
    assert one_pass.cut(m, v, h, 2, 512 * 2**20, "auto", trains=True) == how


def test_the_last_chunk_may_be_smaller_and_labels_all_ignored(where):
    x, weight, labels, bias = some(6, 3, 13, where)
    as_accurate(ours, theirs, [x, weight, labels, bias], torch.float32, **CUTS[1])
    x, weight, bias = (t.float().requires_grad_() for t in (x, weight, bias))
    loss = ours(x, weight, torch.full_like(labels, -100), bias, **CUTS[1])
    loss.backward()
    assert loss.isnan() and not any(t.grad.any() for t in (x, weight, bias))


def test_empty_batch(where):
    x, weight = torch.empty(0, 3, device=where, requires_grad=True), torch.ones(13, 3, device=where, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64, device=where)
    assert ours(x, weight, labels).isnan()
    with nan_filled():
        ours(x, weight, labels, reduction="sum").backward()
    assert x.grad.shape == (0, 3) and not weight.grad.any()


def test_second_backward(where):
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(5, 3, 23, where))
    loss = ours(x, weight.requires_grad_(), labels)
    torch.autograd.grad(loss, weight, retain_graph=True)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: a second backward.*=False and keep_mb=0"):
        loss.backward()


@only_plain
def test_what_it_is_not_for_is_computed_in_the_backward(where):
    x, weight, labels, _ = some(5, 3, 23, where)
    as_accurate(ours, theirs, [x, weight, labels], torch.float32, reduction="none", **CUTS[1])
    as_accurate(ours, theirs, [x, weight, labels], torch.float16, **CUTS[1])
    with torch.no_grad():
        assert ours(x.float(), weight.float(), labels).isfinite()


@only_plain
@pytest.mark.parametrize("cut", CUTS)
def test_autocast(cut, where):
    as_accurate_under_autocast(ours, theirs, some(11, 5, 29, where), **cut)


@only_plain
def test_compiled_without_graph_breaks(where):
    x, weight, labels, bias = (t.float() if t.is_floating_point() else t for t in some(6, 5, 8, where))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step(x, weight, labels, bias):
        return ours(x, weight, labels, bias, **CUTS[1])

    expected = torch.autograd.grad(step(x, weight, labels, bias), leaves)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, exact in zip(torch.autograd.grad(compiled(x, weight, labels, bias), leaves), expected, strict=True):
        torch.testing.assert_close(mine, exact)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("where", ["kernels"], indirect=True)
def test_memory_of_a_real_size(where, monkeypatch):
    monkeypatch.undo()
    x = torch.randn(8192, 4096, device=where, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 4096, device=where, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 128256, (8192,), device=where)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours(x, weight, labels, chunk_mb=512).backward()
    outputs = (x.numel() + weight.numel()) * 2
    peak = torch.cuda.max_memory_allocated() - before - outputs
    # a chunk of logits, and a little for cuBLAS and the allocator
    assert peak < 512 * 2**20 + 96 * 2**20


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("where", ["kernels"], indirect=True)
def test_over_two_to_the_31_elements(where, monkeypatch):
    """All logits in one chunk, which the gradient is written over."""
    monkeypatch.undo()
    labels = torch.randint(0, MANY[1], MANY[:1], device=where)
    over_two_to_the_31_logits(
        lambda x, w, tokens: ours(x, w, labels[tokens], reduction="sum", chunk_mb=8192),
        lambda x, w, tokens: theirs(x, w, labels[tokens], reduction="sum"), where,
    )  # fmt: skip
