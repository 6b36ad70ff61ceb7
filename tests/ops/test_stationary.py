"""linear_cross_entropy over ranks that hold rows of the weight: losses and all gradients against fp64."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import as_accurate, judge, randn
from shards import Round, Shard, on_ranks
from torch import Tensor

from ds_fused.ops.common._tiles import first_half
from ds_fused.ops.losses import _cross_entropy_kernels, _labels
from ds_fused.ops.losses._loss import LossOptions
from ds_fused.ops.vocab import _merge, stationary
from ds_fused.ops.vocab._merge import merge, merge_torch
from ds_fused.ops.vocab.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from ds_fused.ops.vocab.linear_log_probs import linear_log_probs, linear_log_probs_reference
from ds_fused.ops.vocab.stationary import block_tokens

MB = 2**-20
# blocks of 4 tokens; all in one
BLOCKS = [{"chunk_mb": MB}, {"chunk_mb": 1}]
EVERYTHING = {"label_smoothing": 0.3, "z_loss": 0.02, "softcap": 5.0, "logit_scale": 0.7, "ignore_index": 3}


pytestmark = pytest.mark.usefixtures("where")
only_plain = pytest.mark.parametrize("where", ["plain"], indirect=True)


@pytest.fixture(params=["collectives", "carried", "carried in halves"])
def way(request, monkeypatch) -> str:
    """What moves tokens, which results don't show. Of blocks of 3 tokens three ranks have halves of 2 and 1."""
    if request.param == "carried in halves":
        monkeypatch.setattr(stationary, "block_tokens", lambda most, *sizes: min(3, max(1, most)))
    return request.param


def shards_of(weight: Tensor, rows: list[tuple[int, int]], all_ranks: Round, way: str) -> list[Shard]:
    carried = way != "collectives"
    return [Shard(weight, *some, rank, all_ranks, carried) for rank, some in enumerate(rows)]


@pytest.fixture
def kernels_in_turn(monkeypatch) -> None:
    """For ranks that are threads: the interpreter runs one kernel at a time."""
    lock = threading.Lock()

    def in_turn(launch: Callable[..., None]) -> Callable[..., None]:
        def locked(*args: object, **options: object) -> None:
            with lock:
                launch(*args, **options)

        return locked

    for module, way in ((_cross_entropy_kernels, "launch_ready"), (_labels, "launch"), (_merge, "launch")):
        monkeypatch.setattr(module, way, in_turn(getattr(module, way)))


def ours(x, weight, labels, bias=None, **options):
    return linear_cross_entropy(x, Shard(weight, 0, weight.shape[0]), labels, bias=bias, **options)


def theirs(x, weight, labels, bias=None, chunk_mb=None, **options):
    return linear_cross_entropy_reference(x, weight, labels, bias=bias, **options)


def judged(where, dtype, sizes=(11, 5, 29), bias=True, frozen=(), **options):
    m, h, v = sizes
    labels = torch.randint(0, v, (m,), generator=torch.Generator().manual_seed(m + v))
    labels[1::4] = options.get("ignore_index", -100)
    inputs = [2 * randn(m, h, device=where), randn(v, h, device=where), labels.to(where)]
    inputs += [randn(v, device=where)] if bias else []
    as_accurate(ours, theirs, inputs, dtype, frozen=frozen, **options)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_options(dtype, reduction, block, where):
    judged(where, dtype, sizes=(5, 3, 23), reduction=reduction, **EVERYTHING, **block)


@only_plain
@pytest.mark.parametrize("options", [{}, *({k: v} for k, v in EVERYTHING.items())])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_option(dtype, options, where):
    judged(where, dtype, **options, **BLOCKS[0])


@only_plain
@pytest.mark.parametrize("frozen", [(0,), (1,), (3,), (0, 1), (1, 3), (0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen(frozen, reduction, where):
    judged(where, torch.bfloat16, frozen=frozen, reduction=reduction, **BLOCKS[0])


@only_plain
def test_a_second_backward_is_right(where):
    x, weight = (randn(n, 5, device=where).float().requires_grad_() for n in (6, 13))
    labels = torch.arange(6)
    loss = ours(x, weight, labels)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.allclose(first, second, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("more", ["nothing", "entropy", "weights", "right and entropy"])
def test_merge(more, z_loss, where):
    """Parts of a row: far apart, one of them -inf everywhere, and a token that is ignored."""
    z = 30 * randn(5, 4, 7, device=where).float()
    z[1, 0] = float("-inf")
    z[0] /= 30  # a token that is not sure
    labels = torch.tensor([0, 1, -100, 3, 0], device=where)
    peak = z.amax(2).clamp_min(-1e38)
    gap = peak[..., None] - z
    numbers = [z[..., 0], peak, (-gap).exp().sum(2).log()]  # each token, part
    loss, lse = torch.empty(5, device=where), torch.empty(2, 5, device=where)
    options: dict[str, Tensor] = {}
    if "right" in more:
        options["right"] = torch.empty_like(loss)
        numbers.append(torch.arange(4.0, device=where).expand(5, 4))
    if "entropy" in more:
        options["entropy"] = torch.empty_like(loss)
        numbers.append(((-gap).exp() * gap.clamp_max(1e38)).sum(2))
    of_label, of_all = 1.0, 1.0
    if more == "weights":
        options["token_weights"] = randn(2, 5, device=where).float().abs()
        of_label, of_all = options["token_weights"].double()
    run = merge_torch if where.type == "cpu" and not _interpreted() else merge
    parts = torch.stack(numbers, 1).permute(2, 1, 0).contiguous()
    run(parts, labels, loss, lse, LossOptions(z_loss=z_loss), **options)
    rows = z.double().flatten(1)
    true, keeps = rows.logsumexp(1), labels >= 0
    assert torch.allclose(lse.sum(0)[keeps].double(), true[keeps], rtol=1e-6)
    want = of_all * true - z[..., 0].double().sum(1) + z_loss * of_label * true**2
    assert torch.allclose(loss[keeps].double(), want[keeps], rtol=1e-6)
    assert loss[2] == 0 and (lse[:, 2] == 0).all()
    if "entropy" in more:
        p = rows.softmax(1)
        entropy = -torch.special.xlogy(p, p).sum(1)
        assert entropy[0] > 1 > entropy[3] and options["entropy"][2] == 0
        assert torch.allclose(options["entropy"][keeps].double(), entropy[keeps], rtol=1e-5, atol=1e-7)
    if "right" in more:
        # the number of the part that has the largest of all
        assert torch.equal(options["right"][keeps], rows[keeps].argmax(1).div(7, rounding_mode="floor").float())


def _interpreted() -> bool:
    from ds_fused.ops.common._triton import runs_kernels

    return runs_kernels(torch.empty(0))


def weighted(loss_of):
    def run(x, weight, labels, class_weight, **options):
        return loss_of(x, weight, labels, class_weight=class_weight, **options)

    return run


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_class_weights(reduction, label_smoothing, where):
    labels = torch.arange(6, device=where) * 3 % 23
    labels[2] = -100
    inputs = [2 * randn(6, 3, device=where), randn(23, 3, device=where), labels, randn(23, device=where, seed=5).abs()]
    options = {"reduction": reduction, "label_smoothing": label_smoothing, "z_loss": 0.1, **BLOCKS[0]}
    as_accurate(weighted(ours), weighted(theirs), inputs, torch.bfloat16, frozen=(3,), **options)


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_what_else_is_returned(n_ranks, where, way, kernels_in_turn):
    # quarters, whose sums no order rounds: equal rows are ties, on one rank and between ranks
    x, weight = ((4 * randn(n, 5, device=where)).round().float() / 4 for n in (7, 29))
    weight[14:28] = weight[:14].clone()
    labels = torch.nn.functional.linear(x, weight).argmax(-1)
    labels[1], labels[2] = labels[1] + 14, -100
    labels[3:5] = 0
    options = {"z_loss": 0.1, "return_z_loss": True, "return_accuracy": True}
    exact = linear_cross_entropy_reference(x, weight, labels, **options)
    all_ranks = Round(n_ranks)
    shards = shards_of(weight, ROWS if n_ranks == 3 else [(0, 29)], all_ranks, way)
    results = [None] * n_ranks

    def rank_of(rank: int) -> None:
        results[rank] = linear_cross_entropy(x, shards[rank], labels, chunk_mb=MB, **options)

    on_ranks(all_ranks, rank_of)
    for result in results:
        torch.testing.assert_close(result, exact)
    assert 0.0 < float(exact[2]) < 1.0


UPSTREAM: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": lambda loss, rank: 3.0 * loss.sum() / max(1, loss.count_nonzero()),
    "sum": lambda loss, rank: 3.0 * loss.sum(),
    "rank": lambda loss, rank: (1.0 + rank) * loss.sum(),
    "token": lambda loss, rank: (loss * torch.linspace(1, 2, loss.numel())).sum(),
}
ROWS = [(0, 10), (10, 12), (12, 29)]


@only_plain
@pytest.mark.parametrize("upstream", UPSTREAM)
@pytest.mark.parametrize("counts", [(5, 5, 5), (11, 0, 2), (0, 0, 0)])
def test_three_ranks(counts, upstream, where, way):
    """Ragged ranks, one without tokens; one number upstream on all ranks, one a rank, one a token."""
    weight = randn(29, 5, device=where).float().requires_grad_()
    all_ranks = Round(3)
    xs = [(2 * randn(n, 5, device=where, seed=rank)).float().requires_grad_() for rank, n in enumerate(counts)]
    labels = [torch.arange(n) * 7 % 29 for n in counts]
    if counts[0]:
        labels[0][1:4] = -100
    shards = shards_of(weight, ROWS, all_ranks, way)
    weight.grad = torch.zeros_like(weight)
    losses = [None] * 3

    def rank_of(rank: int) -> None:
        how = upstream if upstream in ("mean", "sum") else "sum"
        reduction = "none" if upstream == "token" else how
        options = {"chunk_mb": MB, "reduction": reduction}
        loss = linear_cross_entropy(xs[rank], shards[rank], labels[rank], **options)
        if upstream == "token":
            loss = UPSTREAM["token"](loss, rank)
        else:
            loss = {"mean": 3.0, "sum": 3.0, "rank": 1.0 + rank}[upstream] * loss
        losses[rank] = loss.detach()
        loss.backward()

    on_ranks(all_ranks, rank_of)

    exact = weight.detach().double().requires_grad_()
    true_xs = [x.detach().double().requires_grad_() for x in xs]
    truth = []
    for rank, (x, label) in enumerate(zip(true_xs, labels, strict=True)):
        loss = linear_cross_entropy_reference(x, exact, label, reduction="none")
        truth.append(UPSTREAM[upstream](loss, rank))
    sum(truth).backward()
    for mine, loss, n in zip(losses, truth, counts, strict=True):
        if n or upstream != "mean":  # a mean over nothing is NaN
            assert torch.allclose(mine.double(), loss.detach(), rtol=1e-5)
    assert torch.allclose(weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    for x, true in zip(xs, true_xs, strict=True):
        assert torch.allclose(x.grad.double(), true.grad, rtol=1e-5, atol=1e-6)
    assert shards[0].collectives == shards[1].collectives == shards[2].collectives
    # what was for nothing once is not done again
    assert all(shard.guesses == (upstream != "rank" or not any(counts)) for shard in shards)


# of x [M, H], the weight, labels and the rank
Job = Callable[[Tensor, "Tensor | Shard", Tensor, int], tuple[Tensor, ...]]


def entropies(x: Tensor, weight: Tensor | Shard, labels: Tensor, rank: int) -> tuple[Tensor, ...]:
    exact = x.dtype == torch.float64
    op = linear_log_probs_reference if exact else partial(linear_log_probs, chunk_mb=MB)
    return op(x, weight, labels, entropy=True, temperature=1.4, softcap=5.0)


def class_weights(reduction: str, more: bool = False) -> Job:
    """Each rank has its own."""
    options = {"reduction": reduction, "label_smoothing": 0.2, "z_loss": 0.1}
    options |= {"return_z_loss": more, "return_accuracy": more}

    def job(x: Tensor, weight: Tensor | Shard, labels: Tensor, rank: int) -> tuple[Tensor, ...]:
        of_class = randn(29, device=x.device, seed=rank).abs().bfloat16().to(x.dtype)  # exact in all
        exact = x.dtype == torch.float64
        op = linear_cross_entropy_reference if exact else partial(linear_cross_entropy, chunk_mb=MB, keep_mb=0)
        found = op(x, weight, labels, class_weight=of_class, **options)
        return found if more else (found,)

    return job


OTHER_JOBS: dict[str, Job] = {
    "entropies": entropies,
    **{f"weights, {reduction}": class_weights(reduction) for reduction in ("mean", "sum", "none")},
    "weights, mean, and more": class_weights("mean", more=True),
}


def backward(outputs: tuple[Tensor, ...]) -> None:
    """A gradient for each output that has one, another for each token."""
    outputs = tuple(y for y in outputs if y.requires_grad)
    torch.autograd.backward(
        outputs,
        [
            (1 + i) * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)
            for i, y in enumerate(outputs)
        ],
    )


def on_shards(
    job: Job, xs: list[Tensor], weight: Tensor, labels: list[Tensor], way: str
) -> tuple[list[Tensor], list[Shard]]:
    """Of three ranks all outputs, dx of each, and dweight; gradients are made in the backward alone."""
    all_ranks = Round(3)
    xs = [x.clone().requires_grad_() for x in xs]
    weight = weight.clone().requires_grad_()
    weight.grad = torch.zeros_like(weight)
    shards = shards_of(weight, ROWS, all_ranks, way)
    outputs: list[tuple[Tensor, ...]] = [()] * 3

    def rank_of(rank: int) -> None:
        outputs[rank] = job(xs[rank], shards[rank], labels[rank], rank)
        assert all(name == "gather" for name, _ in shards[rank].collectives)
        # in this thread: otherwise one thread runs the backwards of all who share a GPU, and each waits for the others
        with torch.autograd.set_multithreading_enabled(False):
            backward(outputs[rank])

    on_ranks(all_ranks, rank_of)
    return [*(y.detach() for of_rank in outputs for y in of_rank), *(x.grad for x in xs), weight.grad], shards


def whole(job: Job, xs: list[Tensor], weight: Tensor, labels: list[Tensor]) -> list[Tensor]:
    """The same of ranks that each have the weight, summed over them."""
    xs = [x.clone().requires_grad_() for x in xs]
    weight = weight.clone().requires_grad_()
    outputs = [job(x, weight, label, rank) for rank, (x, label) in enumerate(zip(xs, labels, strict=True))]
    for of_rank in outputs:
        backward(of_rank)
    return [*(y.detach() for of_rank in outputs for y in of_rank), *(x.grad for x in xs), weight.grad]


def as_accurate_as_whole(
    job: Job, dtype: torch.dtype, counts: tuple[int, ...], device: torch.device, way: str
) -> list[Shard]:
    """As far from fp64 as where each rank has the whole weight; the last rank's labels are all ignored."""
    weight = randn(29, 5, device=device).to(dtype)
    xs = [randn(n, 5, device=device, seed=rank).to(dtype) for rank, n in enumerate(counts)]
    labels = [torch.arange(n, device=device) * 7 % 29 for n in counts]
    labels[0][1:4] = -100
    labels[2][:] = -100
    mine, shards = on_shards(job, xs, weight, labels, way)
    theirs = whole(job, xs, weight, labels)
    exact = whole(job, [x.double() for x in xs], weight.double(), labels)
    for i, (y, same, true) in enumerate(zip(mine, theirs, exact, strict=True)):
        judge(f"result {i}", y, y, same, true)
    assert not any(counts) or mine[-1].any()
    # of labels and values the collectives know nothing
    nobodys = [torch.full_like(label, -100) for label in labels]
    _, others = on_shards(job, [0 * x for x in xs], weight, nobodys, way)
    assert all(shard.collectives == shards[0].collectives for shard in (*shards, *others))
    return shards


@only_plain
@pytest.mark.parametrize("job", OTHER_JOBS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [(5, 5, 5), (11, 0, 2), (0, 0, 0)])
def test_entropies_and_class_weights_of_three_ranks(counts, dtype, job, where, way):
    shards = as_accurate_as_whole(OTHER_JOBS[job], dtype, counts, where, way)
    assert all(shard.guesses for shard in shards)
    # Hidden states of each block, what is found of either half, and in the backward the hidden states again; labels;
    # what comes from upstream; class weights, and those of the tokens. A carrier: of each half all of it once
    names, most = [name for name, _ in shards[0].collectives], max(counts)
    blocks = -(-most // (3 if way == "carried in halves" else 1))
    halves = blocks + (most // 3 if way == "carried in halves" else 0)
    assert names.count("gather") == (4 * blocks if way == "collectives" else 3 * halves) + 2 + 2 * ("weights" in job)
    assert names.count("reduce_scatter") == halves


@pytest.mark.parametrize("where", ["kernels"], indirect=True)
@pytest.mark.parametrize("job", ["entropies", "weights, mean, and more"])
def test_three_ranks_in_kernels(job, where, way, kernels_in_turn):
    as_accurate_as_whole(OTHER_JOBS[job], torch.bfloat16, (6, 3, 2), where, way)


def test_halves(monkeypatch):
    monkeypatch.undo()  # the sides of real life
    # a product with 4096 columns makes 1024 rows in a wave, 256 of each of four ranks
    assert [first_half(tokens, 4096, 4) for tokens in (1280, 1024, 768, 512, 256)] == [768, 512, 512, 256, 256]
    # a wave with 512 columns is 8448 rows: halves, where both have 2048 rows
    assert [first_half(tokens, 512, 2) for tokens in (2049, 2048, 2047)] == [1025, 1024, 2047]


def test_blocks(monkeypatch):
    monkeypatch.undo()  # the sides of real life
    llama = dict(n_vocab=128256, hidden=4096, itemsize=2)
    # 378.5 KiB a token of each of four ranks: 1385 fit; a product with 4096 columns makes 1024 rows in a wave
    assert block_tokens(8192, **llama, ranks=4, chunk_bytes=512 * 2**20) == 1280
    # by a carrier 346.5 KiB: 1513
    assert block_tokens(8192, **llama, ranks=4, chunk_bytes=512 * 2**20, carried=True) == 1280
    # 1820 fit, and a wave with 512 columns is 8448 rows: even parts
    assert block_tokens(8192, 2**15, 512, 2, 2, chunk_bytes=2**27) == 1664
    assert block_tokens(8192, **llama, ranks=4, chunk_bytes=2**40) == 8192
    # no fewer than make 2048 tokens of all ranks
    assert block_tokens(8192, **llama, ranks=4, chunk_bytes=1) == 512
    assert block_tokens(0, **llama, ranks=4, chunk_bytes=1) == 1
