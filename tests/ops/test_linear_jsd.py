"""linear_jsd: loss and all gradients against fp64 however the logits are cut and whatever is kept."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, nan_filled, randn
from allocations import Allocations
from heads import as_accurate_under_autocast, gathered_anew
from three_slabs import ThreeSlabs
from torch import Tensor

from ds_fused.ops.common import _tiles
from ds_fused.ops.common._tiles import Tiling
from ds_fused.ops.losses import _divergence_kernels
from ds_fused.ops.vocab._linear_divergence import _plan
from ds_fused.ops.vocab.linear_jsd import linear_jsd, linear_jsd_reference

MB = 2**-20  # chunk_mb and keep_mb in bytes
# gradients made in the backward; test_divergence_in_forward.py has the others. All at once, kept or made again; chunks
# of 4 tokens and slabs of 4 words made again; some kept; chunks, all kept
CUTS = [
    {"chunk_mb": chunk, "keep_mb": keep, "grad_in_forward": False}
    for chunk, keep in ((1, 1), (1, 0), (MB, 0), (MB, 300 * MB), (MB, 1))
]
BETAS = [0.0, 0.1, 0.5, 1.0]  # the ends are other functions

pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)
only_kernels = pytest.mark.parametrize("where", ["kernels"], indirect=True)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks so small that a row of 11 or 23 has whole ones and a rest."""
    monkeypatch.setattr(_divergence_kernels, "FWD_BLOCK", 8)
    monkeypatch.setattr(_divergence_kernels, "BWD_BLOCK", 8)


def ours(x, weight, bias, tx, tweight, tbias, labels=None, **options):
    return linear_jsd(x, weight, tx, tweight, labels, student_bias=bias, teacher_bias=tbias, **options)


def theirs(x, weight, bias, tx, tweight, tbias, labels=None, chunk_mb=0, keep_mb=0, grad_in_forward=False, **options):
    return linear_jsd_reference(x, weight, tx, tweight, labels, student_bias=bias, teacher_bias=tbias, **options)


TEACHER = (3, 4, 5)  # the places of its tensors


def some(m, h, v, device, ignore_index=-100):
    generator = torch.Generator().manual_seed(m + v)
    labels = torch.randint(0, v, (m,), generator=generator)
    labels[1::4] = ignore_index
    student = [randn(m, h, device=device), randn(v, h, device=device), randn(v, device=device)]
    # a narrower teacher
    wide = h + 1
    teacher = [randn(m, wide, device=device, seed=1), randn(v, wide, device=device), randn(v, device=device, seed=1)]
    return [*student, *teacher, labels.to(device)]


def judged(where, dtype, sizes=(11, 5, 23), frozen=(), **options):
    inputs = some(*sizes, where, options.get("ignore_index", -100))
    as_accurate(ours, theirs, inputs, dtype, frozen=(*frozen, *TEACHER), **options)


def test_plan(monkeypatch):
    monkeypatch.undo()  # the sides of real life
    x = torch.empty(0, dtype=torch.bfloat16)
    # Llama-3-8B, 8192 tokens: all are kept, a chunk has 2048
    assert _plan(8192, 128256, x, 512, 2048, dx=True, dweight=True)[:2] == (2048, 8192)
    # twice as many: half of them; the others again, along the vocabulary, at 252 MiB for each model
    assert _plan(16384, 128256, x, 512, 2048, dx=True, dweight=True) == (2048, 8192, Tiling(8192, 16128, 0))
    assert _plan(16384, 128256, x, 512, 0, dx=True, dweight=True)[:2] == (2048, 0)


# least; odd, with a rest of every side
@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 3, 11)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_jsd(dtype, sizes, where, blocks):
    judged(where, dtype, sizes, reduction="none", **CUTS[2])


@only_plain
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("beta", BETAS[1:])
def test_cuts(beta, cut, where):
    judged(where, torch.bfloat16, beta=beta, temperature=1.7, ignore_index=3, **cut)


# in fp16 kept gradients have their headroom
@only_plain
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dtypes_of_kept_gradients(dtype, where):
    judged(where, dtype, **CUTS[3])


@only_kernels
@pytest.mark.parametrize("beta", BETAS)
def test_betas_in_kernels(beta, where, blocks):
    judged(where, torch.bfloat16, (4, 3, 11), beta=beta, temperature=0.8, ignore_index=3, **CUTS[2])


@pytest.mark.all
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_full_product(dtype, beta, cut, where, blocks):
    judged(where, dtype, beta=beta, temperature=1.7, reduction="none", **cut)


# along the tokens: fp32 sums of dweight
@only_plain
@pytest.mark.parametrize("cut", CUTS[2:4])
def test_more_tokens_than_vocabulary(cut, where):
    judged(where, torch.bfloat16, sizes=(23, 5, 7), reduction="none", **cut)


@only_plain
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen(frozen, where):
    judged(where, torch.bfloat16, sizes=(6, 3, 23), frozen=frozen, **CUTS[3])


@only_plain
def test_a_frozen_weight_costs_no_product(where, monkeypatch):
    x, weight, _, tx, tweight, _, labels = (t.float() if t.is_floating_point() else t for t in some(11, 5, 23, where))
    shapes = []
    stock = _tiles.product
    monkeypatch.setattr(
        "ds_fused.ops.vocab._linear_divergence.product",
        lambda out, *args, **options: (shapes.append(tuple(out.shape)), stock(out, *args, **options)),
    )
    linear_jsd(x.requires_grad_(), weight, tx, tweight, labels, **CUTS[0]).backward()
    assert shapes == [(11, 5)]


def test_without_labels_and_biases(where):
    inputs = some(3, 3, 11, where)
    inputs[2] = inputs[5] = None
    for cut in CUTS[:2]:
        as_accurate(ours, theirs, inputs[:6], torch.bfloat16, frozen=TEACHER, **cut)


def test_leading_dimensions_and_strides(where):
    x, weight, bias, tx, tweight, tbias, labels = some(6, 5, 23, where)
    x = x.view(3, 2, 5).transpose(0, 1)  # not contiguous
    tx = randn(2, 3, 12, device=where).bfloat16()[..., ::2]  # columns apart
    inputs = [x, weight, bias, tx, tweight, tbias, labels.view(2, 3).int()]
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=TEACHER, reduction="none", **CUTS[3])


@pytest.mark.parametrize("beta", BETAS)
def test_masked_vocabulary(beta, where, blocks):
    inputs = some(3, 3, 23, where)
    # words that neither has, whole blocks of them, and one each that only the other has where that is finite
    inputs[2][8:18] = inputs[5][8:18] = float("-inf")
    if beta != 0.0:
        inputs[2][3] = float("-inf")
    if beta != 1.0:
        inputs[5][4] = float("-inf")
    as_accurate(ours, theirs, inputs, torch.float32, frozen=TEACHER, beta=beta, **CUTS[1])


def far_apart(m, v, device):
    # whole numbers, so that logits of hundreds are exact: the mixture's exponentials underflow where the teacher's do
    x, weight, bias, _, _, _, labels = (t.round() if t.is_floating_point() else t for t in some(m, 3, v, device))
    return [x, 60 * weight, bias, -x, 40 * weight.flip(0), bias.flip(0), labels]


@only_plain
@pytest.mark.parametrize("beta", BETAS)
def test_distributions_far_apart(beta, where):
    inputs = far_apart(64, 48, where)
    as_accurate(ours, theirs, inputs, torch.float32, frozen=TEACHER, beta=beta, reduction="none", **CUTS[0])


def test_far_apart_in_kernels(where):
    inputs = far_apart(12, 23, where)
    as_accurate(ours, theirs, inputs, torch.float32, frozen=TEACHER, reduction="none", **CUTS[0])


@only_plain
@pytest.mark.parametrize("beta", BETAS)
def test_distributions_that_are_alike(beta, where):
    x, weight, bias, _, _, _, labels = some(64, 3, 48, where)
    inputs = [x, weight, bias, x.clone(), weight.clone(), bias + 1e-3 * bias.flip(0), labels]
    as_accurate(ours, theirs, inputs, torch.float32, frozen=TEACHER, beta=beta, reduction="none", **CUTS[0])


@only_plain
def test_equal_heads_have_no_divergence(where):
    x, weight, bias, *_ = (t.float() for t in some(6, 3, 23, where)[:6])
    x.requires_grad_()
    for beta in BETAS:
        loss = ours(x, weight, bias, x.detach(), weight, bias, beta=beta)
        assert loss.abs() < 1e-6 and torch.autograd.grad(loss, x)[0].abs().max() < 1e-6


@only_plain
def test_dweight_is_as_good_as_one_product(where):
    # 26 chunks, each rounded to bf16 when added, would be several times worse
    inputs = some(256, 8, 48, where)
    cut = {"chunk_mb": 16 * 96 * MB, "keep_mb": 50 * 96 * MB, "grad_in_forward": False}
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=TEACHER, reduction="sum", **cut)


# x times a large scale is beyond fp16, a small scale itself below its normal numbers
@pytest.mark.parametrize("scale", [4096.0, 2.0**-14])
def test_fp16_under_a_loss_scale(scale, where):
    x, *rest, labels = some(5, 3, 11, where)
    inputs = [100 * x, 0.01 * rest[0], *rest[1:]]
    x, weight, bias, *rest = (t.half() for t in inputs)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    (scale * ours(*leaves, *rest, labels, **CUTS[0])).backward()
    wide = [t.detach().double().requires_grad_() for t in leaves]
    (scale * theirs(*wide, *(t.double() for t in rest), labels)).backward()
    for mine, exact in zip((t.grad for t in leaves), (t.grad for t in wide), strict=True):
        assert mine.isfinite().all()
        least = torch.finfo(torch.float16).smallest_normal * 2**-10
        assert (mine - exact).abs().max() < 4e-3 * exact.abs().max() + least


@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2]])
def test_ignored_tokens_are_exactly_zero(cut, where):
    x, *rest, labels = (t.bfloat16() if t.is_floating_point() else t for t in some(5, 5, 23, where))
    x[1::4], rest[2][1::4] = float("nan"), float("nan")  # their logits are NaN, and nobody looks
    x.requires_grad_()
    loss = ours(x, *rest, labels, reduction="none", **cut)
    with nan_filled():
        (dx,) = torch.autograd.grad(loss.sum(), x)
    assert not loss[1::4].any() and not dx[1::4].any() and loss.isfinite().all() and dx.isfinite().all()


@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2]])
def test_all_ignored(cut, where):
    *tensors, labels = some(5, 3, 13, where)
    x, weight, bias = (t.float().requires_grad_() for t in tensors[:3])
    loss = ours(x, weight, bias, *(t.float() for t in tensors[3:]), torch.full_like(labels, -100), **cut)
    loss.backward()
    assert loss.isnan() and not any(t.grad.any() for t in (x, weight, bias))


@pytest.mark.parametrize("cut", [CUTS[0], CUTS[2]])
def test_empty_batch(cut, where):
    x, weight = torch.empty(0, 3, device=where, requires_grad=True), torch.ones(13, 3, device=where, requires_grad=True)
    tx, tweight = torch.empty(0, 4, device=where), torch.ones(13, 4, device=where)
    assert linear_jsd(x, weight, tx, tweight, **cut).isnan()
    with nan_filled():
        linear_jsd(x, weight, tx, tweight, reduction="sum", **cut).backward()
    assert x.grad.shape == (0, 3) and not weight.grad.any()


@pytest.mark.parametrize("cut", CUTS[2:4])
def test_a_second_backward_is_the_first(cut, where):
    x, *rest = (t.float() if t.is_floating_point() else t for t in some(5, 3, 23, where))
    x.requires_grad_()
    loss = ours(x, *rest, **cut)
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@only_plain
@pytest.mark.parametrize("cut", CUTS[::2])
def test_storage_of_the_weight_may_change_between_the_passes(cut, where):
    x, weight, *rest = (t.float() if t.is_floating_point() else t for t in some(11, 5, 23, where))
    weight = torch.nn.Parameter(weight)
    expected = torch.autograd.grad(theirs(x, weight, *rest), weight)[0]
    loss = ours(x, weight, *rest, **cut)
    gathered_anew(weight)
    loss.backward()
    torch.testing.assert_close(weight.grad, expected)


@only_plain
@pytest.mark.parametrize("cut", CUTS[::2])
def test_autocast(cut, where):
    as_accurate_under_autocast(ours, theirs, some(11, 5, 23, where), frozen=TEACHER, **cut)


@only_plain
def test_compiled_without_graph_breaks(where):
    # some kept, the others again in two chunks
    *tensors, labels = (t.float() if t.is_floating_point() else t for t in some(6, 5, 8, where))
    leaves = [t.requires_grad_() for t in tensors[:3]]

    def step(*tensors):
        return ours(*tensors, chunk_mb=2 * 8 * 4 * 4 * MB, keep_mb=2 * 8 * 4 * MB)

    expected = torch.autograd.grad(step(*tensors, labels), leaves)
    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for mine, exact in zip(torch.autograd.grad(compiled(*tensors, labels), leaves), expected, strict=True):
        torch.testing.assert_close(mine, exact)


@only_plain
@pytest.mark.parametrize("kept", [0, 16])
def test_scratch_is_bounded(kept, where, monkeypatch):
    h, m, v = 32, 48, 384
    x, weight, _, tx, tweight, _, labels = (
        t.bfloat16() if t.is_floating_point() else t for t in some(m, h, v, where)
    )  # fmt: skip
    x.requires_grad_(), weight.requires_grad_()
    lent = {t.untyped_storage().data_ptr() for t in (x, weight, tx, tweight)}
    # the plain passes and products make fp32 copies of a tile, which the kernels don't: let them be the smaller matter
    monkeypatch.setattr(_tiles, "LEAST_SIDE", 16)
    with Allocations() as made:
        options = {"chunk_mb": MB, "keep_mb": kept * v * 2 * MB, "grad_in_forward": False}
        linear_jsd(x, weight, tx, tweight, labels, **options).backward()
    sizes = [n for at, (n, _, _) in made.seen.items() if at not in lent]
    # dweight alone has V x H; the copies of the weight in fp32 are this CPU's products'
    assert max(sizes) <= v * (h + 1) < m * v
    with torch.no_grad(), Allocations() as made:
        linear_jsd(x, weight, tx, tweight, labels, chunk_mb=MB)
    assert max(n for at, (n, _, _) in made.seen.items() if at not in lent) <= 16 * v + 512


@only_plain
def test_the_teacher_of_kept_tokens_is_let_go(where):
    *tensors, labels = (t.float() if t.is_floating_point() else t for t in some(6, 5, 8, where))
    tensors[0].requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ours(*tensors, labels, **CUTS[0])
    assert not {t.data_ptr() for t in tensors[3:]} & {*saved}


@only_plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 7])}, r"label 7 lies outside \[0, 7\)"),
        ({"labels": torch.tensor([[0, 1]])}, r"labels \(1, 2\) must have the shape of the tokens, \(2,\)"),
        ({"student_weight": torch.zeros(7, 4)}, r"student_x \(2, 3\) and student_weight \(7, 4\) must be"),
        ({"teacher_weight": torch.zeros(7, 4)}, r"teacher_x \(2, 5\) and teacher_weight \(7, 4\) must be"),
        ({"teacher_weight": torch.zeros(8, 5)}, r"student \(2, 3\) with 7 words and teacher \(2, 5\) with 8 must have"),
        ({"teacher_x": torch.zeros(3, 5)}, "must have the same tokens"),
        ({"teacher_weight": torch.zeros(7, 5, requires_grad=True)}, r"teacher_weight requires a gradient, but the"),
        ({"teacher_x": torch.zeros(2, 5, requires_grad=True)}, r"teacher_x requires .* pass teacher_x.detach\(\)"),
        (
            {"student_weight": torch.zeros(7, 3).half()},
            "student_x is torch.float32 and student_weight is",
        ),
        ({"student_weight": ThreeSlabs(torch.zeros(7, 3))}, "student_weight is ThreeSlabs; a divergence needs whole"),
        ({"student_bias": torch.zeros(3)}, r"student_bias \(3,\) must be one number for each of the 7 rows"),
        ({"teacher_weight": torch.zeros(7, 5, device="meta")}, "teacher_weight is on meta, student_x on cpu"),
        ({"beta": 1.5}, r"beta is 1.5; it must lie in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"temperature": float("inf")}, "temperature is inf; it must be positive and finite"),
        ({"reduction": "batchmean"}, "reduction is 'batchmean'"),
        ({"keep_mb": -1}, "keep_mb=-1 not negative"),
    ],
)
def test_errors(changes, message, where):
    arguments = {
        "student_x": torch.zeros(2, 3), "student_weight": torch.zeros(7, 3),
        "teacher_x": torch.zeros(2, 5), "teacher_weight": torch.zeros(7, 5), **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=f"linear_jsd: .*{message}"):
        linear_jsd(**arguments)


@only_kernels
def test_kernels_refuse_fp64(where):
    wide = [torch.zeros(2, 3, dtype=torch.float64, device=where) for _ in range(4)]
    with pytest.raises(ValueError, match="linear_jsd: student_x is torch.float64"):
        linear_jsd(*wide)


@pytest.fixture(scope="module")
def of_a_real_size(device) -> list[Tensor | None]:
    """Made once: a CPU takes ten seconds for so many random numbers."""
    x, weight, _, tx, tweight, _, labels = some(2048, 4096, 128256, device)
    tensors = (x, 0.02 * weight, None, tx, 0.02 * tweight, None)
    return [*(None if t is None else t.bfloat16() for t in tensors), labels]


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("keep_mb", [0, 256, 1024])
def test_real_size(keep_mb, beta, of_a_real_size, monkeypatch):
    monkeypatch.undo()  # the sides of real life
    inputs = of_a_real_size
    options = {"chunk_mb": 256, "keep_mb": keep_mb, "reduction": "sum", "beta": beta, "grad_in_forward": False}
    as_accurate(ours, theirs, inputs, torch.bfloat16, frozen=TEACHER, **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
def test_memory_of_a_real_size(where, monkeypatch):
    monkeypatch.undo()
    x, tx = (torch.randn(8192, 4096, device=where, dtype=torch.bfloat16) for _ in range(2))
    weight, tweight = (torch.randn(128256, 4096, device=where, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_(), weight.requires_grad_()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_jsd(x, weight, tx, tweight, chunk_mb=512, keep_mb=0, grad_in_forward=False).backward()
    outputs = (x.numel() + weight.numel()) * 2
    peak = torch.cuda.max_memory_allocated() - before - outputs
    # a tile of both, dx in fp32, and a little for cuBLAS and the allocator
    assert peak < 520 * 2**20 + x.numel() * 4 + 96 * 2**20


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@only_kernels
def test_over_two_to_the_31_elements(where, device, monkeypatch):
    monkeypatch.undo()
    x, tx = (torch.randn(16800, 8, device=device, dtype=torch.bfloat16) for _ in range(2))
    weight, tweight = (torch.randn(128256, 8, device=device, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    options = {"chunk_mb": 8192, "keep_mb": 8192, "reduction": "none"}
    loss = linear_jsd(x, weight, tx, tweight, **options)
    (dx,) = torch.autograd.grad(loss.sum(), x)
    for rows in (slice(0, 4), slice(-4, None)):
        part = x.detach()[rows].double().requires_grad_()
        exact = linear_jsd_reference(part, weight.double(), tx[rows].double(), tweight.double(), reduction="none")
        (dexact,) = torch.autograd.grad(exact.sum(), part)
        assert (loss[rows] - exact).abs().max() < 2e-2
        assert (dx[rows] - dexact).abs().max() < 2e-2
