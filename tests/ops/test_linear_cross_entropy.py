"""linear_cross_entropy: loss and all gradients against fp64 however the logits are cut, and what it costs in memory."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, nan_filled, randn
from allocations import Allocations
from heads import MANY, as_accurate_under_autocast, gathered_anew, over_two_to_the_31_logits
from three_slabs import ThreeSlabs

from ds_fused.ops.common import _tiles
from ds_fused.ops.common._tiles import Tiling, tiling
from ds_fused.ops.common._triton import runs_kernels
from ds_fused.ops.vocab import one_pass, two_pass
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

MB = 2**-20  # chunk_mb and keep_mb in bytes
# one tile; slabs of 4 rows made again; slabs of which some are kept; every logit kept
CUTS = [
    {"chunk_mb": 1, "keep_mb": 0},
    {"chunk_mb": MB, "keep_mb": 0},
    {"chunk_mb": MB, "keep_mb": 180 * MB},
    {"chunk_mb": MB, "keep_mb": 1},
]
EVERYTHING = {"label_smoothing": 0.3, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 0.7, "ignore_index": 3}


pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)
only_kernels = pytest.mark.parametrize("where", ["kernels"], indirect=True)


def ours(x, weight, labels, bias=None, **options):
    return linear_cross_entropy(x, weight, labels, bias=bias, **{"grad_in_forward": False, **options})


def theirs(x, weight, labels, bias=None, chunk_mb=0, keep_mb=0, accumulate="", grad_in_forward=False, **options):
    return linear_cross_entropy_reference(x, weight, labels, bias=bias, **options)


def some(m, h, v, device, ignore_index=-100, labels_dtype=torch.int64):
    generator = torch.Generator().manual_seed(m + v)
    labels = torch.randint(0, v, (m,), generator=generator)
    labels[1::4] = ignore_index
    labels = labels.to(device, labels_dtype)
    return [2 * randn(m, h, device=device), randn(v, h, device=device), labels, randn(v, device=device)]


def judged(where, dtype, sizes=(11, 5, 29), bias=True, frozen=(), **options):
    inputs = some(*sizes, where, options.get("ignore_index", -100))
    as_accurate(ours, theirs, inputs if bias else inputs[:3], dtype, frozen=frozen, **options)


def test_tiling(monkeypatch):
    monkeypatch.undo()  # the sides of real life
    cut = dict(dx=True, dweight=True)
    # Llama-3-8B, 8192 tokens: along the vocabulary, in even parts; two of the four are kept
    assert tiling(8192, 128256, 2, 512 * 2**20, 1024 * 2**20, **cut) == Tiling(8192, 32256, 2)
    assert tiling(8192, 128256, 2, 512 * 2**20, 2048 * 2**20, **cut) == Tiling(8192, 128256, 1)
    # more tokens than vocabulary: along the tokens, so that the fp32 sum is the smaller one
    assert tiling(65536, 32000, 2, 512 * 2**20, 0, **cut) == Tiling(8192, 32000, 0)
    # a frozen weight needs no fp32 sum at all along the tokens; nor does a frozen trunk along the vocabulary
    assert tiling(8192, 128256, 2, 512 * 2**20, 0, dx=True, dweight=False) == Tiling(2048, 128256, 0)
    assert tiling(65536, 32000, 2, 512 * 2**20, 0, dx=False, dweight=True) == Tiling(65536, 4096, 0)
    # a weight that is cast is cast slab by slab
    assert tiling(8192, 128256, 2, 512 * 2**20, 0, dx=False, dweight=False, casts=True) == Tiling(8192, 32256, 0)
    # slabs of their own are cut along the tokens
    assert tiling(8192, 128256, 2, 128 * 2**20, 0, **cut, slab_rows=16032) == Tiling(4096, 16032, 0)
    # nine, of which the first two are small: together they fit
    nine = dict(slab_rows=16896, n_slabs=9)
    assert tiling(8192, 128256, 2, 512 * 2**20, 2048 * 2**20, **cut, **nine) == Tiling(8192, 16896, 9)
    assert tiling(8192, 128256, 2, 512 * 2**20, 2000 * 2**20, **cut, **nine) == Tiling(8192, 16896, 7)
    # a little more than chunk_mb
    assert tiling(16384, 128256, 2, 512 * 2**20, 0, **cut, slab_rows=16896) == Tiling(16384, 16896, 0)
    assert tiling(0, 7, 2, 1, 0, **cut) == Tiling(1, 7, 0)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuts(dtype, cut, where):
    interpreted = torch.device("cpu") == where and runs_kernels(torch.empty(0))
    judged(where, dtype, sizes=(5, 3, 23) if interpreted else (11, 5, 29), reduction="none", **cut)


@only_plain
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, *({k: v} for k, v in EVERYTHING.items()), EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(dtype, options, cut, where):
    judged(where, dtype, **options, **cut)


@only_kernels
@pytest.mark.parametrize("cut", CUTS[:3:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_options_in_kernels(dtype, cut, where):
    judged(where, dtype, sizes=(5, 3, 23), **EVERYTHING, **cut)


# along the tokens: fp32 sums of dweight. 11 tokens in 4, 4, 3; of the chunks none or the first is kept
@pytest.mark.parametrize("keep_mb", [0, 100 * MB])
def test_more_tokens_than_vocabulary(keep_mb, where):
    judged(where, torch.bfloat16, sizes=(11, 5, 7), bias=False, reduction="none", chunk_mb=MB, keep_mb=keep_mb)


# oneDNN's products in bf16 with so many rows of an odd length read beyond each row, where it has room behind it
@only_plain
@pytest.mark.parametrize("cut", CUTS[::3])
@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_what_lies_behind_a_row_of_logits(grad_in_forward, cut, where):
    judged(where, torch.bfloat16, sizes=(40, 32, 101), bias=False, grad_in_forward=grad_in_forward, **cut)


def test_masked_vocabulary(where):
    x, weight, _, bias = some(3, 3, 23, where)
    bias[:5], bias[14:] = float("-inf"), float("-inf")  # whole slabs of it, the first among them
    labels = torch.tensor([5, -100, 13], device=where)
    as_accurate(ours, theirs, [x, weight, labels, bias], torch.float32, **CUTS[1])


def test_a_vocabulary_masked_by_the_least_number(where):
    x, weight, _, bias = some(3, 3, 23, where)
    bias = torch.full_like(bias, torch.finfo(torch.bfloat16).min)
    labels = torch.tensor([5, -100, 13], device=where)
    loss = ours(x.bfloat16(), weight.bfloat16(), labels, bias.bfloat16(), **CUTS[1])
    torch.testing.assert_close(loss.float(), torch.tensor(23.0, device=where).log().expand_as(loss))


@only_plain
@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 1), (1, 3), (0, 3)])
@pytest.mark.parametrize("cut", CUTS)
def test_frozen(frozen, cut, where):
    judged(where, torch.bfloat16, frozen=frozen, **cut)


def test_int32_labels_and_leading_dimensions(where):
    x, weight, labels, _ = some(6, 5, 23, where, labels_dtype=torch.int32)
    x = x.view(3, 2, 5).transpose(0, 1)  # not contiguous
    as_accurate(ours, theirs, [x, weight, labels.view(2, 3)], torch.bfloat16, reduction="none", **CUTS[2])


@only_plain
def test_dweight_is_as_good_as_one_product(where):
    # 64 chunks, each rounded to bf16 when added, would be several times worse
    x, weight, labels, _ = some(512, 16, 48, where)
    as_accurate(ours, theirs, [x, weight, labels], torch.bfloat16, reduction="sum", chunk_mb=8 * 96 * MB, keep_mb=0)


def rms_error_of_dweight(loss_of, n_chunks, where, **options):
    """Of dweight in bf16 from chunks of 32 tokens, over that of one product."""
    x, weight, labels, _ = some(32 * n_chunks, 16, 64, where)
    # a trunk that trains has the tokens cut, where they are more than the words
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    (mine,) = torch.autograd.grad(loss_of(x, weight, labels, **options), weight)
    (once,) = torch.autograd.grad(theirs(x, weight, labels), weight)
    wide = weight.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(theirs(x.double(), wide, labels), wide)
    return float((mine - exact).square().mean().sqrt() / (once - exact).square().mean().sqrt())


@only_plain
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize(
    ("accumulate", "n_chunks", "least", "most"),
    [
        # one rounding, as of one product
        ("fp32", 8, 0.0, 1.2),
        ("fp32", 64, 0.0, 1.2),
        # at most twice as far off, however many chunks
        ("auto", 8, 0.0, 2.0),
        ("auto", 16, 0.0, 2.0),
        ("auto", 64, 0.0, 2.0),
        # each sum rounded: exactness is what is traded for the memory of the fp32 copy
        ("native", 16, 1.1, 2.0),
        ("native", 64, 2.0, 4.0),
    ],
)
def test_exactness_of_what_is_added_up(accumulate, n_chunks, least, most, in_forward, where):
    # 32 rows of 64 words, and no fewer
    options = {"accumulate": accumulate, "grad_in_forward": in_forward, "chunk_mb": 32 * 64 * 2 * MB, "keep_mb": 0}
    assert least <= rms_error_of_dweight(ours, n_chunks, where, **options) <= most


@pytest.mark.parametrize("accumulate", ["auto", "native", "fp32"])
def test_added_up_in_slabs(accumulate, where):
    # two chunks a slab
    inputs = some(6, 3, 29, where)
    options = {"accumulate": accumulate, "chunk_mb": MB, "keep_mb": 0, "reduction": "sum"}
    as_accurate(in_slabs, theirs, inputs, torch.bfloat16, **options)


@pytest.mark.parametrize(
    ("accumulate", "dtype"), [("auto", torch.float32), ("native", torch.bfloat16), ("fp32", torch.float32)]
)
@pytest.mark.parametrize("in_forward", [False, True])
def test_native_needs_no_wide_sum(in_forward, accumulate, dtype, where, monkeypatch):
    seen = []

    def product(out, *args, **options):
        if out.shape == weight.shape:
            seen.append(out.dtype)
        return whole(out, *args, **options)

    file = one_pass if in_forward else two_pass
    whole = file.product
    monkeypatch.setattr(file, "product", product)
    # more chunks than "auto" takes natively, and too many tokens for larger ones
    x, weight, labels, _ = some(160, 3, 16, where)
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    ours(x, weight, labels, accumulate=accumulate, grad_in_forward=in_forward, chunk_mb=MB, keep_mb=0).backward()
    assert seen == [dtype] * 40


@only_plain
def test_accumulation_over_micro_batches(where):
    x, weight, labels, _ = some(24, 5, 29, where)
    expected = torch.autograd.grad(theirs(x, weight.requires_grad_(), labels), weight)[0]
    head = weight.detach().float().requires_grad_()
    count = (labels != -100).sum()
    for part in range(4):
        rows = slice(6 * part, 6 * part + 6)
        (ours(x[rows].float(), head, labels[rows], reduction="sum", **CUTS[2]) / count).backward()
    torch.testing.assert_close(head.grad.double(), expected, rtol=1e-5, atol=1e-6)


def test_fp16_under_a_loss_scale(where):
    x, weight, labels, _ = (t.half() if t.is_floating_point() else t for t in some(5, 5, 23, where))
    x.requires_grad_(), weight.requires_grad_()
    (1024.0 * ours(x, weight, labels, **CUTS[1])).backward()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    (1024.0 * theirs(*wide, labels)).backward()
    for mine, exact in zip((x.grad, weight.grad), (t.grad for t in wide), strict=True):
        assert mine.isfinite().all()
        assert (mine - exact).abs().max() < 4e-3 * exact.abs().max()


def test_ignored_tokens_are_exactly_zero(where):
    x, weight, labels, _ = some(5, 5, 23, where)
    x, weight = x.bfloat16(), weight.bfloat16().requires_grad_()
    x[1::4] = float("nan")  # their logits are NaN, and nobody looks
    x.requires_grad_()
    loss = ours(x, weight, labels, reduction="none", **CUTS[2])
    with nan_filled():
        (dx,) = torch.autograd.grad(loss.sum(), x)
    assert not loss[1::4].any() and not dx[1::4].any() and loss.isfinite().all() and dx.isfinite().all()


@only_plain
@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_what_lies_between_rows_of_logits_is_in_no_gradient(grad_in_forward, where, monkeypatch):
    monkeypatch.undo()  # the sides of real life, at which a CPU that has instructions for products in bf16 takes them
    x, weight, labels, _ = some(74, 64, 131, where)
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    with nan_filled():
        loss = ours(x, weight, labels, grad_in_forward=grad_in_forward)
        gradients = torch.autograd.grad(loss, (x, weight))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_all_ignored(where):
    x, weight, labels, bias = (t.requires_grad_() if t.is_floating_point() else t for t in some(5, 3, 13, where))
    x, weight, bias = (t.detach().float().requires_grad_() for t in (x, weight, bias))
    labels = torch.full_like(labels, -100)
    loss = ours(x, weight, labels, bias, **CUTS[1])
    loss.backward()
    assert loss.isnan() and not any(t.grad.any() for t in (x, weight, bias))


@pytest.mark.parametrize("cut", CUTS[:2])
def test_empty_batch(cut, where):
    x, weight = torch.empty(0, 3, device=where, requires_grad=True), torch.ones(13, 3, device=where, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64, device=where)
    assert ours(x, weight, labels, **cut).isnan()
    with nan_filled():
        ours(x, weight, labels, reduction="sum", **cut).backward()
    assert x.grad.shape == (0, 3) and not weight.grad.any()


def test_second_backward(where):
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(5, 3, 23, where))
    weight.requires_grad_()
    loss = ours(x, weight, labels, **CUTS[1])
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    loss = ours(x, weight, labels, **CUTS[2])
    assert torch.equal(torch.autograd.grad(loss, weight, retain_graph=True)[0], first)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: a second backward.*=False and keep_mb=0"):
        loss.backward()


@only_plain
@pytest.mark.parametrize("cut", CUTS)
def test_storage_of_the_weight_may_change_between_the_passes(cut, where):
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(11, 5, 29, where))
    weight = torch.nn.Parameter(weight)
    expected = torch.autograd.grad(theirs(x, weight, labels), weight)[0]
    loss = ours(x, weight, labels, **cut)
    gathered_anew(weight)
    loss.backward()
    torch.testing.assert_close(weight.grad, expected)


@only_plain
@pytest.mark.parametrize("cut", CUTS)
def test_autocast(cut, where):
    as_accurate_under_autocast(ours, theirs, some(11, 5, 29, where), **cut)


def weighted(loss_of):
    """Takes class weights as an input, after the bias."""

    def run(x, weight, labels, bias, class_weight, **options):
        return loss_of(x, weight, labels, bias, class_weight=class_weight, **options)

    return run


@only_plain
@pytest.mark.parametrize("cut", CUTS[1:3])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, EVERYTHING])
def test_class_weights(options, cut, where):
    inputs = [*some(5, 3, 23, where, options.get("ignore_index", -100)), randn(23, device=where, seed=5).abs()]
    for loss_of in (ours, in_slabs) if cut is CUTS[1] else (ours,):
        as_accurate(weighted(loss_of), weighted(theirs), inputs, torch.bfloat16, frozen=(4,), **options, **cut)


@only_kernels
def test_class_weights_in_kernels(where):
    inputs = [*some(5, 3, 11, where), randn(11, device=where, seed=5).abs()]
    options = {**EVERYTHING, "ignore_index": -100, **CUTS[1]}
    as_accurate(weighted(ours), weighted(theirs), inputs, torch.bfloat16, frozen=(4,), **options)


def shared_peaks(m, h, v, where):
    """Logits of which some are won by a tie with another row of the weight, of the same slab or not."""
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(m, h, v, where))
    weight[v // 2 :] = weight[: v - v // 2].clone()
    labels[0::2] = torch.nn.functional.linear(x, weight).argmax(-1)[0::2].int().to(labels.dtype)
    labels[2] += v // 2 if int(labels[2]) < v // 2 else 0
    return x, weight, labels


@pytest.mark.parametrize("cut", CUTS[:2])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_what_else_is_returned(label_smoothing, cut, where):
    x, weight, labels = shared_peaks(11, 5, 22, where)
    weight.requires_grad_()
    options = {"z_loss": 0.1, "label_smoothing": label_smoothing, "return_z_loss": True, "return_accuracy": True}
    _, z_exact, accuracy_exact = theirs(x.double(), weight.detach().double(), labels, **options)
    with nan_filled():
        loss, z_losses, accuracy = ours(x, weight, labels, **options, **cut)
        (dweight,) = torch.autograd.grad(loss, weight)
    alone = ours(x, weight, labels, z_loss=0.1, label_smoothing=label_smoothing, **cut)
    assert torch.equal(loss, alone) and torch.equal(dweight, torch.autograd.grad(alone, weight)[0])
    torch.testing.assert_close(z_losses, z_exact.float())
    assert torch.allclose(accuracy, accuracy_exact.float()) and 0.2 < accuracy < 0.9
    assert not z_losses.requires_grad and not accuracy.requires_grad
    # rows out of order: without ties the argmax is one and the same
    x = 1.01 * x
    weight = weight.detach() + 0.1 * randn(*weight.shape, device=where, seed=9).float()
    sums = torch.nn.functional.linear(x, weight)
    labels[0::2] = sums.argmax(-1)[0::2].to(labels.dtype)
    options = {**options, "ignore_index": 3}
    _, z_exact, accuracy_exact = theirs(x, weight, labels.clamp_min(0), **options)
    _, z_losses, accuracy = in_slabs(x, weight, labels.clamp_min(0), **options, **cut)
    torch.testing.assert_close((z_losses, accuracy), (z_exact, accuracy_exact))


def in_slabs(x, weight, labels, bias=None, **options):
    return linear_cross_entropy(x, ThreeSlabs(weight, weight.requires_grad), labels, bias=bias, **options)


@pytest.mark.parametrize("cut", CUTS[:3])
@pytest.mark.parametrize("options", [{"reduction": "none"}, {**EVERYTHING, "ignore_index": 0}])
def test_slabs(options, cut, where):
    sizes = (6, 3, 29)
    inputs = some(*sizes, where, options.get("ignore_index", -100))
    for dtype in (torch.float32, torch.bfloat16):
        as_accurate(in_slabs, theirs, inputs, dtype, **options, **cut)


@only_plain
@pytest.mark.parametrize(("frozen", "ends"), [((1,), 0), ((0,), 1), ((0, 3), 1)])
def test_frozen_slabs(frozen, ends, where):
    as_accurate(in_slabs, theirs, some(6, 3, 29, where), torch.float32, frozen=frozen, **CUTS[1])


@only_plain
@pytest.mark.parametrize("n_tokens", [0, 6])
@pytest.mark.parametrize(
    ("kept", "backward"),
    [
        # with the rows that it still has, and back
        (1, "prefetch 1, scatter 2, gather 1, prefetch 0, scatter 1, gather 0, scatter 0, finish"),
        (2, "scatter 2, prefetch 0, scatter 1, gather 0, scatter 0, finish"),
        # all, where they are no more
        (4, "scatter 2, scatter 1, scatter 0, finish"),
    ],
)
def test_slabs_are_called_in_an_order_that_no_token_changes(n_tokens, kept, backward, where, monkeypatch):
    monkeypatch.setattr(_tiles, "KEPT_SLABS", kept)
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(6, 3, 29, where))
    slabs = ThreeSlabs(weight)
    loss = linear_cross_entropy(x[:n_tokens], slabs, labels[:n_tokens], reduction="sum")
    loss.backward()
    forward = "prefetch 0, gather 0, prefetch 1, gather 1, prefetch 2, gather 2"
    assert ", ".join(slabs.calls) == f"{forward}, {backward}"
    assert slabs.grad.isfinite().all()


@only_plain
@pytest.mark.parametrize("kept", [0, 1])
def test_slabs_whose_rows_come_again_in_backward(kept, where, monkeypatch):
    monkeypatch.setattr(_tiles, "KEPT_SLABS", kept)
    as_accurate(in_slabs, theirs, some(6, 3, 29, where), torch.float32, **CUTS[1])


@only_plain
@pytest.mark.parametrize("cut", CUTS[1:3])
def test_compiled_without_graph_breaks(cut, where):
    # two slabs, and one kept of two: tracing takes its time
    x, weight, labels, bias = (t.float() if t.is_floating_point() else t for t in some(6, 5, 8, where))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def step(x, weight, labels, bias):
        return ours(x, weight, labels, bias, **cut)

    expected = torch.autograd.grad(step(x, weight, labels, bias), leaves)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, exact in zip(torch.autograd.grad(compiled(x, weight, labels, bias), leaves), expected, strict=True):
        torch.testing.assert_close(mine, exact)


@only_plain
@pytest.mark.parametrize(
    ("m", "v", "sums"),
    [(96, 800, 0), (800, 96, 1)],  # along the vocabulary no dweight in fp32; along the tokens one
)
def test_scratch_is_bounded(m, v, sums, where, monkeypatch):
    h = 64
    x, weight, labels, _ = some(m, h, v, where)
    x, weight = x.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_()
    lent = {t.untyped_storage().data_ptr() for t in (x, weight)}
    # the plain passes and products make fp32 copies of a tile, which the kernels don't: let them be the smaller matter
    monkeypatch.setattr(_tiles, "LEAST_SIDE", 32)
    with Allocations() as made:
        ours(x, weight, labels, chunk_mb=MB, keep_mb=0).backward()
    sizes = [(n, dtype) for at, (n, dtype, _) in made.seen.items() if at not in lent]
    assert max(n for n, dtype in sizes) <= max(v * h, m * h)  # M x V is more than any
    assert m * v > max(v * h, m * h)
    assert sum(n >= v * h and dtype == torch.float32 for n, dtype in sizes) <= sums
    assert sum(n >= v * h for n, _ in sizes) == 1 + sums + (m > v)  # dweight, its sum; dx is larger where M > V


@only_plain
def test_nothing_is_kept_where_no_gradient_is_wanted(where):
    x, weight, labels, _ = (t.float() if t.is_floating_point() else t for t in some(64, 8, 128, where))
    weight.requires_grad_()
    with torch.no_grad(), Allocations() as made:
        ours(x, weight, labels, chunk_mb=MB, keep_mb=1)
    assert max(n for n, _, _ in made.seen.values()) <= 4 * 128 + 512  # one chunk of 4 tokens


@only_plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 7])}, r"label 7 lies outside \[0, 7\)"),
        ({"labels": torch.tensor([[0, 1]])}, r"labels \(1, 2\) must have the shape of the tokens, \(2,\)"),
        ({"weight": torch.zeros(7, 4)}, r"x \(2, 3\) and weight \(7, 4\) must be \[..., H\] and \[V, H\]"),
        ({"weight": torch.zeros(7, 3, dtype=torch.bfloat16)}, "x is torch.float32 and weight is torch.bfloat16"),
        ({"bias": torch.zeros(3)}, r"bias \(3,\) must be one number for each of the 7 rows"),
        ({"bias": torch.zeros(7, dtype=torch.float16)}, "x is torch.float32 and bias is torch.float16"),
        ({"weight": torch.zeros(7, 3, device="meta")}, "weight is on meta, x on cpu"),
        ({"reduction": "avg"}, "reduction is 'avg'"),
        ({"chunk_mb": 0}, "chunk_mb=0 must be positive"),
        ({"class_weight": torch.ones(3)}, r"class_weight is torch.float32 \(3,\); .*each of the 7 classes"),
        ({"keep_mb": -1}, "keep_mb=-1 not negative"),
        ({"chunk_mb": float("nan")}, "chunk_mb=nan must be positive .*, both finite"),
        ({"keep_mb": float("inf")}, "keep_mb=inf not negative, both finite"),
        ({"accumulate": "fp64"}, "accumulate is 'fp64'; it must be 'auto', 'native' or 'fp32'"),
    ],
)
def test_errors(changes, message, where):
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(7, 3), "labels": torch.tensor([0, 1]), **changes}
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(arguments.pop("x"), arguments.pop("weight"), arguments.pop("labels"), **arguments)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
@pytest.mark.parametrize("keep_mb", [0, 256, 1024])
def test_real_size(keep_mb, where, monkeypatch):
    monkeypatch.undo()  # the sides of real life
    x, weight, labels, _ = some(2048, 4096, 128256, where)
    inputs = [x, 0.02 * weight, labels]
    as_accurate(ours, theirs, inputs, torch.bfloat16, chunk_mb=128, keep_mb=keep_mb, reduction="sum")


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
@pytest.mark.parametrize("grad_in_forward", [False, True])
def test_memory_of_a_real_size(grad_in_forward, where, monkeypatch):
    monkeypatch.undo()
    x = torch.randn(8192, 4096, device=where, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(128256, 4096, device=where, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, 128256, (8192,), device=where)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    options = {"keep_mb": 0, "grad_in_forward": grad_in_forward}
    linear_cross_entropy(x, weight, labels, chunk_mb=256, **options).backward()
    outputs = (x.numel() + weight.numel()) * 2
    peak = torch.cuda.max_memory_allocated() - before - outputs
    # one tile, dx in fp32 where slabs are added up in it, and a little for cuBLAS and the allocator
    assert peak < 256 * 2**20 + (0 if grad_in_forward else x.numel() * 4) + 96 * 2**20


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
def test_over_two_to_the_31_elements(where, monkeypatch):
    monkeypatch.undo()
    labels = torch.randint(0, MANY[1], MANY[:1], device=where)
    options = {"reduction": "none", "grad_in_forward": False}
    over_two_to_the_31_logits(
        lambda x, w, tokens: linear_cross_entropy(x, w, labels[tokens], chunk_mb=8192, keep_mb=8192, **options),
        lambda x, w, tokens: linear_cross_entropy_reference(x, w, labels[tokens], reduction="none"), where,
    )  # fmt: skip
