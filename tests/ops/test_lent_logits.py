"""cross_entropy with its gradient made in the forward, over lent logits: against fp64, whatever comes from upstream."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, nan_filled, randn
from torch import Tensor

from ds_fused.ops.losses import _lent_logits, _lent_logits_parts, _scale
from ds_fused.ops.losses.cross_entropy import cross_entropy, cross_entropy_reference

EVERYTHING = {"label_smoothing": 0.3, "z_loss": 0.02, "softcap": 5.0, "ignore_index": 3}
OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 0.01}, {"softcap": 2.0}, EVERYTHING]


@pytest.fixture
def blocks(monkeypatch) -> None:
    """So little is held of a row of 71, and walked at a time, that there are several blocks."""
    monkeypatch.setattr(_lent_logits, "HELD_BYTES", 96)
    monkeypatch.setattr(_lent_logits, "WALK_BYTES", 32)


@pytest.fixture
def shared(monkeypatch) -> None:
    """Rows of more than 24 columns in parts of 16; where programs can't meet, in two launches."""
    monkeypatch.setattr(_lent_logits, "HELD_BYTES", 48)
    monkeypatch.setattr(_lent_logits, "WALK_BYTES", 16)
    monkeypatch.setattr(_lent_logits, "can_share", lambda logits: True)
    monkeypatch.setattr(_lent_logits_parts, "PART", 16)


def lent(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options):
    # a copy: what is judged is not to be written to
    return cross_entropy(logits.clone(), labels, weight=weight, grad_in_forward=True, **options)


def exact(logits: Tensor, labels: Tensor, weight: Tensor | None = None, **options):
    return cross_entropy_reference(logits, labels, weight=weight, **options)


def some_labels(*shape: int, n_vocab: int, device: torch.device, ignore_index: int = -100) -> Tensor:
    labels = torch.randint(0, n_vocab, shape, generator=torch.Generator().manual_seed(sum(shape) + n_vocab))
    labels.view(-1)[1::3] = ignore_index
    labels.view(-1)[-1] = n_vocab - 1  # in what is held
    labels.view(-1)[0] = 0  # in what is walked
    return labels.to(device)


def judged(shape, dtype, device, **options) -> None:
    labels = some_labels(*shape[:-1], n_vocab=shape[-1], device=device, ignore_index=options.get("ignore_index", -100))
    # a random number comes from upstream
    as_accurate(lent, exact, [3 * randn(*shape, device=device), labels], dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 2, 16385)])  # least; odd; one over a held row in bf16
def test_shapes(shape, dtype, device):
    judged(shape, dtype, device)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(options, reduction, dtype, device, blocks):
    judged((2, 2, 71), dtype, device, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.01, "logit_scale": 0.5}, {"ignore_index": 3}])
# the last two are a program's each
@pytest.mark.parametrize("logit_scale", [None, 0.0, -1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_programs_share(options, reduction, dtype, logit_scale, device, shared):
    if logit_scale is not None:
        options = options | {"logit_scale": logit_scale}
    for n_vocab in (32, 71):
        judged((2, 4, n_vocab), dtype, device, reduction=reduction, **options)


def test_shared_rows_with_masks_and_without_a_number(device, shared):
    """Parts of -inf alone, a label that is masked, and what is not finite: as PyTorch's."""
    logits, labels = 3 * randn(6, 71, device=device).float(), torch.tensor([70, 0, 20, 5, 33, -100], device=device)
    logits[0, 16:32] = logits[1, 64:] = logits[2, 20] = logits[3] = float("-inf")
    logits[4, 7] = float("nan")
    found, wanted = (logits.clone().requires_grad_() for _ in range(2))
    for rows in (slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)):
        (own,) = torch.autograd.grad(lent(found[rows], labels[rows], reduction="sum"), found)
        (stock,) = torch.autograd.grad(F.cross_entropy(wanted[rows], labels[rows], reduction="sum"), wanted)
        torch.testing.assert_close(own, stock, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(700, 128256), (515, 32000), (3000, 17001), (3, 262144)])
def test_rows_of_real_size_are_shared(shape, dtype, device):
    assert _lent_logits.can_share(torch.empty(shape, dtype=dtype, device=device))
    judged(shape, dtype, device, z_loss=1e-4)


@pytest.mark.all
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_vocab", [1, 7, 8, 23, 24, 25, 31, 32, 33, 96])  # around what is held and a block
def test_full_product(n_vocab, dtype, reduction, options, device, blocks):
    judged((4, n_vocab), dtype, device, reduction=reduction, **{**options, "ignore_index": -100})


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "reduction": "sum"}, EVERYTHING])
def test_class_weights(options, device, blocks):
    labels = some_labels(2, 4, n_vocab=71, device=device, ignore_index=options.get("ignore_index", -100))
    weight = randn(71, device=device, seed=5).abs()
    weight[0] = 0.0
    inputs = [3 * randn(2, 4, 71, device=device), labels, weight]
    as_accurate(lent, exact, inputs, torch.bfloat16, frozen=(2,), **options)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduction": "none", **EVERYTHING}])
def test_losses_that_stay_apart_are_differentiated_in_the_backward(options, device, blocks):
    judged((2, 2, 71), torch.bfloat16, device, **options)


def test_fp16_is_differentiated_in_the_backward(device, blocks):
    judged((2, 2, 71), torch.float16, device)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_what_else_is_returned(label_smoothing, weighted, device, blocks):
    labels = some_labels(13, n_vocab=71, device=device)
    logits = randn(13, 71, device=device).float()
    # a third of the labels win, some by a tie; others lose a tie to a column before them, walked or held
    logits[torch.arange(0, 13, 3), labels[0::3].clamp_min(0)] = 6.0
    logits[3, -1], logits[6, 0], logits[9, 33] = 6.0, 6.0, 6.0
    labels[9], logits[9, 65] = 65, 6.0
    logits.requires_grad_()
    options = {"weight": randn(71, device=device).abs().float() if weighted else None, "z_loss": 0.1}
    options |= {"label_smoothing": label_smoothing, "return_z_loss": True, "return_accuracy": True}
    wanted = cross_entropy(logits, labels, **options)
    with nan_filled():
        found = lent(logits, labels, **options)
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.equal(found[2], wanted[2]) and 0.1 < found[2] < 0.9
    assert not found[1].requires_grad and not found[2].requires_grad
    alone = lent(logits, labels, **{**options, "return_z_loss": False, "return_accuracy": False})
    torch.testing.assert_close(found[0], alone)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found[0], alone, wanted[0])]
    torch.testing.assert_close(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[0], gradients[2])


def head(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    weight = randn(71, 3, device=device).float().requires_grad_()
    return randn(5, 3, device=device).float(), weight, some_labels(5, n_vocab=71, device=device)


def scalings(monkeypatch) -> list[tuple[Tensor, Tensor]]:
    """What `scaled` was given and what it made of it, as copies."""
    seen = []

    def scaled(x: Tensor, *args) -> Tensor:
        before = x.clone()
        after = _scale.scaled(x, *args)
        seen.append((before, after.clone()))
        return after

    monkeypatch.setattr(_lent_logits, "scaled", scaled)
    return seen


@pytest.mark.parametrize(("upstream", "given"), [(1.0, 1.0), (0.25, 0.25), (1 / 3, 1 / 3), (1.0, 0.25), (0.25, 3.0)])
def test_the_upstream_gradient_may_be_known_in_the_forward(upstream, given, device, monkeypatch):
    seen = scalings(monkeypatch)
    x, weight, labels = head(device)
    (wanted,) = torch.autograd.grad(given * cross_entropy(F.linear(x, weight), labels), weight)
    loss = cross_entropy(F.linear(x, weight), labels, grad_in_forward=True, upstream=upstream)
    (dweight,) = torch.autograd.grad(given * loss, weight)
    torch.testing.assert_close(dweight, wanted)
    ((before, after),) = seen
    assert torch.equal(before, after) == (upstream == given)


def test_the_forward_writes_and_the_backward_does_not(device):
    x, weight, labels = head(device)
    logits = F.linear(x, weight)
    before, version = logits.detach().clone(), logits._version
    loss = cross_entropy(logits, labels, grad_in_forward=True)
    made = logits.detach().clone()
    assert logits._version > version and not torch.equal(made, before)
    (dweight,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(logits.detach(), made)
    with pytest.raises(RuntimeError, match="cross_entropy: a second backward.*=False and overwrite_logits=False"):
        loss.backward()


def test_rows_apart_are_overwritten_in_place(device, monkeypatch):
    monkeypatch.setattr(_scale, "BLOCK", 4)
    wide = randn(5, 20, device=device).bfloat16()
    labels = some_labels(5, n_vocab=9, device=device)
    around = wide.clone()
    logits = wide[:, 3:12].requires_grad_()
    (wanted,) = torch.autograd.grad(0.5 * cross_entropy(logits, labels), logits)
    (dlogits,) = torch.autograd.grad(0.5 * cross_entropy(logits, labels, grad_in_forward=True), logits)
    torch.testing.assert_close(dlogits, wanted)
    assert torch.equal(wide[:, 3:12], dlogits)
    assert torch.equal(wide[:, :3], around[:, :3]) and torch.equal(wide[:, 12:], around[:, 12:])


def test_who_saved_the_logits_gets_an_error(device):
    x = randn(3, 7, device=device).float().requires_grad_()
    labels = torch.tensor([0, 1, 2], device=device)
    loss = cross_entropy(torch.tanh(x), labels, grad_in_forward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_who_overwrites_the_gradient_gets_an_error(device):
    x, weight, labels = head(device)
    logits = F.linear(x, weight)
    loss = cross_entropy(logits, labels, grad_in_forward=True)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_a_gradient_nothing_is_written(device):
    logits, labels = randn(3, 7, device=device).float(), torch.tensor([0, 1, 2], device=device)
    before = logits.clone()
    expected = cross_entropy(logits, labels)
    assert torch.equal(cross_entropy(logits, labels, grad_in_forward=True), expected)
    with torch.no_grad():
        assert torch.equal(cross_entropy(logits.requires_grad_(), labels, grad_in_forward=True), expected)
    assert torch.equal(logits, before)


def test_all_ignored_and_empty(device, blocks):
    logits = randn(3, 71, device=device).bfloat16()
    logits[1] = float("nan")  # nobody looks
    labels = torch.full((3,), -100, device=device)
    for reduction in ("mean", "sum"):
        mine = logits.clone().requires_grad_()
        loss = cross_entropy(mine, labels, grad_in_forward=True, reduction=reduction)
        (dlogits,) = torch.autograd.grad(loss, mine)
        assert (loss.isnan() if reduction == "mean" else loss == 0) and not dlogits.any()
    logits = torch.empty(0, 7, device=device, requires_grad=True)
    loss = cross_entropy(logits, labels[:0], grad_in_forward=True, reduction="sum")
    (dlogits,) = torch.autograd.grad(2 * loss, logits)
    assert loss == 0 and dlogits.shape == (0, 7)


def test_masked_vocabulary_and_large_logits(device, blocks):
    logits = randn(3, 71, device=device)
    logits[:, 32:] = float("-inf")  # all that is held, and whole blocks
    as_accurate(lent, exact, [logits, torch.tensor([0, 31, 4], device=device)], torch.float32)
    logits = randn(12, 71, device=device) - 100
    logits[:, 5], logits[:, 66] = 300.0, torch.linspace(280, 299, 12)
    as_accurate(lent, exact, [logits, torch.full((12,), 5, device=device)], torch.float32)


def test_rows_masked_by_the_least_number(device, blocks):
    logits = randn(3, 71, device=device)
    logits[1], logits[2, 8:] = torch.finfo(torch.float32).min, torch.finfo(torch.float32).min
    as_accurate(lent, exact, [logits, torch.tensor([0, 31, 4], device=device)], torch.float32)


@pytest.mark.parametrize("upstream", [0.0, 1e-42, 1e-50, 1e39, float("inf"), float("nan"), torch.tensor(0.5)])
def test_errors(upstream):
    kind = r"\(float or int\)" if isinstance(upstream, torch.Tensor) else r", from 2\^-100 to 2\^100 in size"
    said = rf"cross_entropy: upstream is .*; it must be a number ?{kind}"
    with pytest.raises(ValueError, match=said):
        cross_entropy(torch.zeros(2, 7), torch.tensor([0, 1]), grad_in_forward=True, upstream=upstream)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(511, 128256), (63, 50257), (300, 32000)])  # Llama-3; GPT-2, unaligned; Llama-2
def test_real_sizes(shape, dtype, options, device):
    judged(shape, dtype, device, **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_over_two_to_the_31_elements(device):
    logits = torch.randn(16800, 128256, device=device, dtype=torch.bfloat16)
    labels = torch.randint(0, 128256, (16800,), device=device)
    ends = (slice(0, 4), slice(-4, None))
    parts = [logits[rows].double().requires_grad_() for rows in ends]
    loss = cross_entropy(logits.requires_grad_(), labels, reduction="sum", grad_in_forward=True)
    (dlogits,) = torch.autograd.grad(2.0 * loss, logits)  # 2: scaled in the backward
    for rows, part in zip(ends, parts, strict=True):
        (dexact,) = torch.autograd.grad(cross_entropy_reference(part, labels[rows], reduction="sum"), part)
        assert (dlogits[rows] - 2.0 * dexact).abs().max() < 2**-7  # one rounding of 2 * (p - 1)


@pytest.mark.parametrize("upstream", [float("inf"), float("nan")])
def test_ignored_tokens_stay_zero_whatever_comes_from_upstream(upstream, device):
    logits, labels = randn(3, 7, device=device).float().requires_grad_(), torch.tensor([3, -100, 2], device=device)
    lent(logits, labels).backward(torch.tensor(upstream, device=device))
    assert not logits.grad[1].any() and not logits.grad[0].isfinite().any()
