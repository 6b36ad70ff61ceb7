"""jsd: loss and both gradients against fp64 for every beta, nothing where a distribution has none, what is not read."""

from __future__ import annotations

from functools import partial

import pairs
import pytest
import torch
from accuracy import as_accurate
from pairs import pair

from ds_fused.ops.losses.jsd import jsd, jsd_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# both KLs have their own kernel; 0.2 tells the two sides apart
BETAS = [0.0, 0.2, 1.0]


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("shape", "dtype"), [((6, 1), torch.float32), ((6, 7), torch.float16)])  # least; odd
def test_small(shape, dtype, beta, device):
    as_accurate(jsd, jsd_reference, pair(*shape, device=device), dtype, beta=beta, reduction="none")


@pytest.mark.parametrize("beta", BETAS)
def test_blocks(beta, device, pair_blocks):
    options = {"temperature": 0.7, "ignore_index": 3, "reduction": "sum"}
    as_accurate(jsd, jsd_reference, pair(3, 4, 71, device=device, ignore_index=3), torch.bfloat16, beta=beta, **options)


def test_one_column_over_a_block(device):
    as_accurate(jsd, jsd_reference, pair(3, 4097, device=device), torch.float32)


@pytest.mark.all
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("beta", [*BETAS, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
# around a block, and a row without a rest; so many rows that the worst error of PyTorch is no luck
@pytest.mark.parametrize("n_vocab", [1, 31, 32, 33, 96])
def test_full_product(n_vocab, dtype, beta, reduction, temperature, device, pair_blocks):
    options = {"beta": beta, "reduction": reduction, "temperature": temperature}
    as_accurate(jsd, jsd_reference, pair(40, n_vocab, device=device), dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(511, 128256), (63, 50257)])  # Llama-3; GPT-2, where no row starts aligned
def test_real_sizes(shape, dtype, beta, device):
    as_accurate(jsd, jsd_reference, pair(*shape, device=device), dtype, beta=beta)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_over_two_to_the_31_elements(beta, device):
    pairs.over_two_to_the_31_elements(partial(jsd, beta=beta), partial(jsd_reference, beta=beta), device)


@pytest.mark.parametrize("beta", BETAS)
def test_frozen_teacher_rows_apart_and_mixed_dtypes(beta, device):
    student, teacher, labels = pair(6, 20, device=device)
    teacher = teacher.bfloat16().t().contiguous().t()[:, 3:12]  # columns apart
    for x in (student[:, 5:14], student.bfloat16()[:, 5:14]):
        inputs = [x, teacher, labels.int()]
        as_accurate(jsd, jsd_reference, inputs, torch.float32, frozen=(1,), beta=beta)
    as_accurate(jsd, jsd_reference, inputs, torch.float32, frozen=(0,), beta=beta)


def by_definition(student, teacher, beta):
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1).mean()


def test_the_reference_is_the_definition():
    student, teacher, _ = pair(6, 9, device="cpu")
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    for beta in (0.1, 0.5, 0.9):
        assert torch.allclose(jsd_reference(student, teacher, beta=beta), by_definition(student, teacher, beta))
    kl = partial(torch.nn.functional.kl_div, reduction="batchmean", log_target=True)
    assert torch.allclose(jsd_reference(student, teacher, beta=0.0), kl(q, p))
    assert torch.allclose(jsd_reference(student, teacher, beta=1.0), kl(p, q))
    # the two ends are the limits of what lies between, divided by beta and by 1 - beta
    assert torch.allclose(1e6 * jsd_reference(student, teacher, beta=1e-6), kl(q, p), rtol=1e-3)
    assert torch.allclose(1e6 * jsd_reference(student, teacher, beta=1 - 1e-6), kl(p, q), rtol=1e-3)
    # log-probabilities are logits too
    assert torch.allclose(jsd_reference(q, p), jsd_reference(student, teacher))


@pytest.mark.parametrize("beta", BETAS)
def test_masked_vocabulary(beta, device, pair_blocks):
    student, teacher, labels = pair(6, 71, device=device)
    for logits in (student, teacher):
        logits[:, :3], logits[:, 32:64] = float("-inf"), float("-inf")  # a whole block among them
    as_accurate(jsd, jsd_reference, [student, teacher, labels], torch.float32, beta=beta)


@pytest.mark.parametrize("beta", BETAS)
def test_rows_masked_by_the_least_number(beta, device, pair_blocks):
    student, teacher, labels = pair(6, 71, device=device)
    least = torch.finfo(torch.float32).min
    for logits in (student, teacher):
        logits[1], logits[2, 32:] = least, least
    as_accurate(jsd, jsd_reference, [student, teacher, labels], torch.float32, frozen=(1,), beta=beta)


@pytest.mark.parametrize(
    ("beta", "masked", "is_finite"), [(0.0, 1, True), (0.5, 0, True), (0.5, 1, True), (0.0, 0, False)]
)
def test_one_side_masked(beta, masked, is_finite, device, pair_blocks):
    student, teacher, labels = pair(6, 71, device=device)
    (student, teacher)[masked][:, 30:65] = float("-inf")
    if is_finite:
        as_accurate(jsd, jsd_reference, [student, teacher, labels], torch.float32, frozen=(1,), beta=beta)
    else:  # the student rules out what the teacher wants; the slope is finite all the same
        student = student.float().requires_grad_()
        loss = jsd(student, teacher.float(), beta=beta)
        (dstudent,) = torch.autograd.grad(loss, student)
        assert loss.isinf() and dstudent.isfinite().all() and dstudent.any()
        # unless that is nothing in fp32: far below the rest, as a mask of another kind is
        teacher[:, 30:65] = -1e9
        loss = jsd(student.detach(), teacher.float(), beta=beta)
        rest = [*range(30), *range(65, 71)]
        exact = jsd_reference(student.detach().double()[:, rest], teacher[:, rest], beta=beta)
        assert torch.allclose(loss.double(), exact)


@pytest.mark.parametrize("beta", BETAS)
def test_distributions_without_overlap(beta, device):
    """Each column is nothing in one of them, by fp32's exponential; the logarithm of their mean is finite."""
    student, teacher = torch.zeros(2, 40, device=device), torch.zeros(2, 40, device=device)
    student[:, :20], teacher[:, 20:] = -300.0, -300.0
    # the slope is the same in all columns of either half: the gradient is what is left of equal terms
    as_accurate(jsd, jsd_reference, [student.double(), teacher.double()], torch.float32, beta=beta, floor=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_far_from_zero(beta, device):
    student, teacher, labels = pair(6, 40, device=device)
    as_accurate(jsd, jsd_reference, [student + 128.0, teacher - 64.0, labels], torch.float32, beta=beta)


@pytest.mark.parametrize("beta", BETAS)
def test_the_same_for_every_beta(beta, device, pair_blocks):
    loss_of = partial(jsd, beta=beta)
    pairs.ignored_rows_are_zero_and_not_read(loss_of, device)
    pairs.same_distribution(loss_of, device)


def test_nothing_counts(device):
    pairs.nothing_counts(jsd, device)


def test_autocast_and_one_token(device):
    student, teacher, _ = pair(7, device=device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = jsd(student.half(), teacher.float())
    assert loss.dtype == torch.float32 and torch.allclose(loss, jsd_reference(student.half(), teacher.float()))


def test_plain_path_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    student, teacher, labels = pair(3, 7, device="cpu")
    assert torch.equal(jsd(student, teacher, labels), jsd_reference(student, teacher, labels))


@pytest.mark.parametrize(
    ("changes", "message"), [*pairs.ERRORS, ({"beta": 1.5}, r"beta is 1.5; it must lie in \[0, 1\]")]
)
def test_errors(changes, message):
    pairs.refuses(jsd, changes, message)


def test_kernels_refuse_fp64(device):
    student, teacher, _ = pair(2, 7, device=device)
    with pytest.raises(ValueError, match=r"jsd: \w+ is torch.float64"):
        jsd(student, teacher)
