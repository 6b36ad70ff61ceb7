"""tvd: loss and both gradients against fp64, no slope where p = q. What it shares with jsd is tested there."""

from __future__ import annotations

import pairs
import pytest
import torch
from accuracy import as_accurate
from pairs import pair

from ds_fused.ops.losses.tvd import tvd, tvd_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 1), (6, 7)])  # least; odd
def test_small(shape, dtype, device):
    as_accurate(tvd, tvd_reference, pair(*shape, device=device), dtype, reduction="none")


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "ignore_index": 3, "reduction": "sum"}])
def test_blocks(options, device, pair_blocks):
    inputs = pair(3, 4, 71, device=device, ignore_index=options.get("ignore_index", -100))
    as_accurate(tvd, tvd_reference, inputs, torch.bfloat16, **options)


@pytest.mark.all
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
# around a block, and a row without a rest; so many rows that the worst error of PyTorch is no luck
@pytest.mark.parametrize("n_vocab", [1, 31, 32, 33, 96])
def test_full_product(n_vocab, dtype, reduction, temperature, device, pair_blocks):
    options = {"reduction": reduction, "temperature": temperature}
    as_accurate(tvd, tvd_reference, pair(40, n_vocab, device=device), dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(511, 128256), (63, 50257)])  # Llama-3; GPT-2, where no row starts aligned
def test_real_sizes(shape, dtype, device):
    student, teacher, labels = pair(*shape, device=device)
    # where p and q are all but equal, rounding decides which of the two slopes on either side counts
    p, q = student.softmax(-1), teacher.softmax(-1)
    teacher[(p - q).abs() < 1e-5 * p] += 0.1
    as_accurate(tvd, tvd_reference, [student, teacher, labels], dtype)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_over_two_to_the_31_elements(device):
    pairs.over_two_to_the_31_elements(tvd, tvd_reference, device)


@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen(frozen, device):
    as_accurate(tvd, tvd_reference, pair(6, 9, device=device), torch.bfloat16, frozen=(frozen,))


def test_the_reference_is_the_definition_on_probabilities_too():
    p, q = (x.softmax(-1) for x in pair(6, 9, device="cpu")[:2])
    assert torch.allclose(tvd_reference(p.log(), q.log()), 0.5 * (p - q).abs().sum(-1).mean())


def test_masked_vocabulary(device, pair_blocks):
    student, teacher, labels = pair(6, 71, device=device)
    student[:, 32:64], teacher[:, 20:64] = float("-inf"), float("-inf")
    as_accurate(tvd, tvd_reference, [student, teacher, labels], torch.float32)


def test_equal_columns_have_no_slope_of_their_own(device):
    # two columns of which p and q agree on one exactly: there only the other columns pull
    student = torch.tensor([[1.0, 2.0, 3.0, 0.5]], device=device)
    teacher = torch.tensor([[1.0, 3.0, 2.0, 0.5]], device=device)
    as_accurate(tvd, tvd_reference, [student.double(), teacher.double()], torch.float32)
    pairs.same_distribution(tvd, device)


def test_what_counts(device):
    pairs.ignored_rows_are_zero_and_not_read(tvd, device)
    pairs.nothing_counts(tvd, device)


def test_plain_path_is_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    student, teacher, labels = pair(3, 7, device="cpu")
    assert torch.equal(tvd(student, teacher, labels), tvd_reference(student, teacher, labels))


@pytest.mark.parametrize(("changes", "message"), pairs.ERRORS)
def test_errors(changes, message):
    pairs.refuses(tvd, changes, message)
