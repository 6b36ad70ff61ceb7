"""cross_entropy: loss and gradient against fp64 with every option, what is never read, what may be overwritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, nan_filled, randn

from ds_fused.ops.losses import _cross_entropy_kernels
from ds_fused.ops.losses.cross_entropy import cross_entropy, cross_entropy_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# each alone, then all at once: they meet in one formula
OPTIONS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.01},
    {"softcap": 2.0, "logit_scale": 0.7},
    {"logit_scale": 1.4},
    {"label_smoothing": 0.3, "z_loss": 0.02, "softcap": 5.0, "reduction": "sum", "ignore_index": 3},
]


@pytest.fixture
def blocks(monkeypatch):
    """Blocks so small that a row of 71 has whole ones and a rest."""
    monkeypatch.setattr(_cross_entropy_kernels, "FWD_BLOCK", 32)
    monkeypatch.setattr(_cross_entropy_kernels, "BWD_BLOCK", 32)


def some_labels(*shape, n_vocab, device, ignore_index=-100):
    generator = torch.Generator().manual_seed(sum(shape) + n_vocab)
    labels = torch.randint(0, n_vocab, shape, generator=generator)
    labels.view(-1)[1::3] = ignore_index
    labels.view(-1)[-1] = n_vocab - 1  # in the rest of the row
    return labels.to(device)


def judged(shape, dtype, device, labels_dtype=torch.int64, **options):
    ignore_index = options.get("ignore_index", -100)
    labels = some_labels(*shape[:-1], n_vocab=shape[-1], device=device, ignore_index=ignore_index).to(labels_dtype)
    logits = 3 * randn(*shape, device=device)
    as_accurate(cross_entropy, cross_entropy_reference, [logits, labels], dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 2, 4097)])  # least; odd; one column over a block
def test_cross_entropy(shape, dtype, device):
    judged(shape, dtype, device, reduction="none")


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_options(options, dtype, device, blocks):
    judged((2, 2, 71), dtype, device, **options)


@pytest.mark.all
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_vocab", [1, 31, 32, 33, 96])  # around a block, and a row without a rest
def test_full_product(n_vocab, dtype, reduction, options, device, blocks):
    judged((4, n_vocab), dtype, device, **{**options, "reduction": reduction, "ignore_index": -100})


def with_weight(loss_of):
    """Takes the weights as an input after the labels."""

    def run(logits, labels, weight, **options):
        return loss_of(logits, labels, weight=weight, **options)

    return run


def class_weights(n_vocab, device):
    weight = randn(n_vocab, device=device, seed=5).abs()
    weight[0] = 0.0
    return weight


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, OPTIONS[-1], {**OPTIONS[-1], "reduction": "mean"}])
def test_class_weights(options, device, blocks):
    labels = some_labels(2, 4, n_vocab=71, device=device, ignore_index=options.get("ignore_index", -100))
    labels[0, 0] = 0
    inputs = [3 * randn(2, 4, 71, device=device), labels, class_weights(71, device)]
    ops = with_weight(cross_entropy), with_weight(cross_entropy_reference)
    as_accurate(*ops, inputs, torch.bfloat16, frozen=(2,), **options)
    as_accurate(*ops, [inputs[0], labels, inputs[2].bfloat16()], torch.float32, frozen=(2,), **options)


@pytest.mark.all
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_vocab", [1, 31, 32, 33, 96])
def test_class_weights_in_full(n_vocab, dtype, reduction, label_smoothing, device, blocks):
    labels = some_labels(8, n_vocab=n_vocab, device=device)
    inputs = [3 * randn(8, n_vocab, device=device), labels, 0.5 + class_weights(n_vocab, device)]
    ops = with_weight(cross_entropy), with_weight(cross_entropy_reference)
    as_accurate(*ops, inputs, dtype, frozen=(2,), reduction=reduction, label_smoothing=label_smoothing)


def test_class_weights_that_train_elsewhere_weigh_an_evaluation(device):
    """As F.cross_entropy takes them, where no gradient is wanted of anything."""
    logits, labels = randn(6, 9, device=device).float(), torch.arange(6, device=device)
    weight = class_weights(9, device).float().requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(
            cross_entropy(logits, labels, weight=weight), F.cross_entropy(logits, labels, weight)
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_pytorch(label_smoothing, reduction):
    logits, labels = randn(6, 9, device="cpu"), some_labels(6, n_vocab=9, device="cpu")
    options = {"weight": class_weights(9, "cpu"), "label_smoothing": label_smoothing, "reduction": reduction}
    torch.testing.assert_close(
        cross_entropy_reference(logits, labels, **options), F.cross_entropy(logits, labels, **options)
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_what_else_is_returned(reduction, label_smoothing, weighted, device, blocks):
    labels = some_labels(13, n_vocab=71, device=device)
    logits = randn(13, 71, device=device).float()
    # a third of the labels win, some of them by a tie; others lose a tie to a column before them
    logits[torch.arange(0, 13, 3), labels[0::3].clamp_min(0)] = 6.0
    logits[3, -1], logits[6, 0], logits[9, 33] = 6.0, 6.0, 6.0
    labels[9], logits[9, 65] = 65, 6.0
    logits.requires_grad_()
    options = {"weight": class_weights(71, device) if weighted else None, "reduction": reduction}
    options |= {"label_smoothing": label_smoothing, "z_loss": 0.1}
    alone = cross_entropy(logits, labels, **options)
    with nan_filled():
        loss, z_losses, accuracy = cross_entropy(logits, labels, return_z_loss=True, return_accuracy=True, **options)
        (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    _, z_exact, accuracy_exact = cross_entropy_reference(
        logits.double(), labels, return_z_loss=True, return_accuracy=True, **options
    )
    assert torch.equal(loss, alone) and torch.equal(dlogits, torch.autograd.grad(alone.sum(), logits)[0])
    torch.testing.assert_close(z_losses, z_exact.float())
    keeps = labels != -100
    right = (logits.argmax(-1) == labels)[keeps].float().mean()
    assert torch.allclose(accuracy, right) and torch.allclose(accuracy_exact.float(), right) and 0.1 < right < 0.9
    assert not z_losses.requires_grad and not accuracy.requires_grad
    assert len(cross_entropy(logits, labels, return_accuracy=True, **options)) == 2


def test_accuracy_where_nothing_counts(device):
    logits = randn(3, 7, device=device).float()
    assert cross_entropy(logits, torch.full((3,), -100, device=device), return_accuracy=True)[1].isnan()


def test_int32_labels(device):
    judged((3, 7), torch.bfloat16, device, labels_dtype=torch.int32)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, OPTIONS[-1]])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(511, 128256), (63, 50257)])  # Llama-3; GPT-2, where no row starts aligned
def test_real_sizes(shape, dtype, options, device):
    judged(shape, dtype, device, **options)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_over_two_to_the_31_elements(device):
    logits = torch.randn(16800, 128256, device=device, dtype=torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 128256, (16800,), device=device)
    loss = cross_entropy(logits, labels, reduction="none")
    (dlogits,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
    for rows in (slice(0, 4), slice(-4, None)):
        part = logits.detach()[rows].double().requires_grad_()
        exact = cross_entropy_reference(part, labels[rows], reduction="none")
        (dexact,) = torch.autograd.grad(exact, part, torch.ones_like(exact))
        assert (loss[rows] - exact).abs().max() < 1e-4
        assert (dlogits[rows] - dexact).abs().max() < 2**-8  # one rounding of p - 1


def test_rows_apart_and_columns_apart(device):
    labels = some_labels(5, n_vocab=9, device=device)
    wide = randn(5, 20, device=device).bfloat16()
    for logits in (wide[:, 3:12], randn(9, 5, device=device).bfloat16().t()):
        as_accurate(cross_entropy, cross_entropy_reference, [logits, labels], torch.bfloat16)


def test_softcap_does_not_reach_the_padding(device, blocks):
    # a cap on -inf is -softcap: with logits far below, padding columns would take all the weight
    logits, labels = -5 * torch.ones(2, 33, device=device), torch.tensor([32, 0], device=device)
    loss = cross_entropy(logits, labels, softcap=5.0)
    torch.testing.assert_close(loss.cpu(), torch.tensor(33.0).log())


def test_large_logits_keep_a_small_loss(device, blocks):
    logits = randn(12, 40, device=device) - 100
    logits[:, 5], logits[:, 6] = 300.0, torch.linspace(280, 299, 12)
    labels = torch.full((12,), 5, device=device)
    as_accurate(cross_entropy, cross_entropy_reference, [logits, labels], torch.float32, reduction="none")


def test_masked_vocabulary(device, blocks):
    logits = randn(3, 71, device=device)
    logits[:, 32:] = float("-inf")  # whole blocks, as a padded vocabulary has
    as_accurate(
        cross_entropy, cross_entropy_reference, [logits, torch.tensor([0, 31, 4], device=device)], torch.float32
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_masked_by_the_least_number_of_their_dtype(dtype, device, blocks):
    logits = randn(3, 71, device=device).to(dtype)
    logits[1], logits[2, 8:] = torch.finfo(dtype).min, torch.finfo(dtype).min
    labels = torch.tensor([0, 31, 4], device=device)
    as_accurate(cross_entropy, cross_entropy_reference, [logits, labels], dtype, reduction="none")


def test_ignored_rows_are_zero_and_not_read(device):
    logits = randn(4, 7, device=device).float()
    logits[1] = float("nan")
    logits.requires_grad_()
    labels = torch.tensor([1, -100, 3, -100], device=device)
    loss = cross_entropy(logits, labels, reduction="none", z_loss=0.1)
    with nan_filled():
        (dlogits,) = torch.autograd.grad(loss, logits, torch.tensor([1.0, float("inf"), 1.0, 2.0], device=device))
    assert not loss[1::2].any() and not dlogits[1::2].any()
    assert loss[0::2].isfinite().all() and dlogits[0::2].abs().sum(1).all()


def test_all_ignored(device):
    logits = randn(3, 7, device=device).bfloat16().requires_grad_()
    labels = torch.full((3,), -100, device=device)
    for reduction, is_right in (("mean", torch.isnan), ("sum", torch.logical_not)):
        loss = cross_entropy(logits, labels, reduction=reduction)
        (dlogits,) = torch.autograd.grad(loss, logits)
        assert is_right(loss) and not dlogits.any()


def test_empty_batch(device):
    logits = torch.empty(0, 7, device=device, requires_grad=True)
    labels = torch.empty(0, dtype=torch.int64, device=device)
    assert cross_entropy(logits, labels).isnan()
    loss = cross_entropy(logits, labels, reduction="sum")
    loss.backward()
    assert loss == 0 and logits.grad.shape == (0, 7)


def test_overwritten_logits(device):
    weight = randn(7, 3, device=device).float().requires_grad_()
    x, labels = randn(5, 3, device=device).float(), some_labels(5, n_vocab=7, device=device)
    (expected,) = torch.autograd.grad(cross_entropy(F.linear(x, weight), labels), weight)
    logits = F.linear(x, weight)
    loss = cross_entropy(logits, labels, overwrite_logits=True)
    before, version = logits.detach().clone(), logits._version
    (dweight,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert torch.equal(dweight, expected)
    assert not torch.equal(logits, before) and logits._version > version
    with pytest.raises(RuntimeError, match="cross_entropy: a second backward.*=False and overwrite_logits=False"):
        loss.backward()


def test_overwriting_what_the_producer_kept_is_an_error(device):
    x = randn(3, 7, device=device).float().requires_grad_()
    loss = cross_entropy(torch.tanh(x), torch.tensor([0, 1, 2], device=device), overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("permission", ["overwrite_logits", "grad_in_forward"])
def test_rows_that_share_memory_are_not_overwritten(permission, device):
    row = randn(1, 71, device=device).float().requires_grad_()
    labels = torch.arange(4, device=device)
    wanted, got = (
        torch.autograd.grad(cross_entropy((2 * row).expand(4, 71), labels, **{permission: allowed}), row)[0]
        for allowed in (False, True)
    )
    assert torch.equal(got, wanted)


def test_second_backward_without_overwriting(device):
    logits = randn(3, 7, device=device).float().requires_grad_()
    loss = cross_entropy(logits, torch.tensor([0, 1, 2], device=device))
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_plain_path_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    logits, labels = randn(3, 7, device="cpu"), torch.tensor([0, -100, 6])
    assert torch.equal(cross_entropy(logits, labels), cross_entropy_reference(logits, labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": torch.tensor([0, 7])}, r"label 7 lies outside \[0, 7\)"),
        ({"labels": torch.tensor([-1, 0])}, "label -1 lies outside"),
        ({"labels": torch.tensor([0, 1, 2])}, r"labels \(3,\) must have the shape of the tokens, \(2,\)"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels are torch.float32; they must be int64 or int32"),
        ({"labels": torch.tensor([0, 1], device="meta")}, "labels are on meta"),
        ({"reduction": "avg"}, "reduction is 'avg'; it must be 'mean', 'sum' or 'none'"),
        ({"label_smoothing": 1.5}, "label_smoothing is 1.5"),
        ({"softcap": 0.0}, "softcap is 0.0"),
        ({"softcap": float("inf")}, "softcap is inf; it must be positive and finite"),
        ({"logit_scale": torch.ones(())}, "logit_scale is a tensor; it must be a number"),
        (
            {"weight": torch.ones(6)},
            r"weight is torch.float32 \(6,\); it must be a floating-point number for each of the 7",
        ),
        ({"weight": torch.ones(7, dtype=torch.int64)}, r"weight is torch.int64 \(7,\)"),
        ({"weight": torch.ones(7, device="meta")}, "weight is on meta"),
        ({"weight": torch.ones(7, requires_grad=True)}, r"weight requires a gradient.*weight.detach\(\)"),
        ({"logits": torch.zeros(2, 0)}, "a vocabulary of 0"),
        ({"logits": torch.zeros(())}, "got a scalar"),
        ({"logits": torch.zeros(1).expand(2, 2**31)}, "columns are counted in int32"),
    ],
)
def test_errors(changes, message):
    arguments = {"logits": torch.zeros(2, 7), "labels": torch.tensor([0, 1]), **changes}
    with pytest.raises(ValueError, match=f"cross_entropy: .*{message}"):
        cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)


def test_kernels_refuse_fp64(device):
    with pytest.raises(ValueError, match="cross_entropy: logits is torch.float64"):
        cross_entropy(torch.zeros(2, 7, dtype=torch.float64, device=device), torch.tensor([0, 1], device=device))


def test_a_compiled_graph_takes_any_upstream(device):
    logits, labels = randn(3, 7, device=device).float().requires_grad_(), torch.tensor([1, -100, 6], device=device)

    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def loss_of(logits, upstream):
        return cross_entropy(logits, labels, grad_in_forward=True, upstream=upstream)

    for upstream in (1.0, 0.5, 0.25):
        # not the leaf itself, over which the gradient would be written
        torch.testing.assert_close(loss_of(1 * logits, upstream), cross_entropy(logits, labels))
