"""embedding: rows picked, and their gradients summed run by run; runs that are cut, padding, ids of any shape."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, randn, same_bits

import ds_fused.ops.registry as registry
from ds_fused.ops.vocab.embedding import embedding, embedding_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = registry.op("embedding").module


def ids_of(*shape, n_vocab, device, dtype=torch.int64):
    generator = torch.Generator().manual_seed(sum(shape))
    # squared: some words are frequent
    return (torch.rand(shape, generator=generator).square() * n_vocab).to(dtype).to(device)


def judge(ids, weight, dtype, **options):
    as_accurate(embedding, embedding_reference, [ids, weight], dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; every row unused but a few
@pytest.mark.parametrize("shape, n_vocab, hidden", [((1,), 1, 1), ((3, 7), 11, 5), ((2, 3), 67, 33)])
def test_embedding(shape, n_vocab, hidden, dtype, device):
    judge(ids_of(*shape, n_vocab=n_vocab, device=device), randn(n_vocab, hidden, device=device), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, n_vocab, hidden", [((4, 2047), 49152, 576), ((1, 8191), 32000, 4096)])
def test_embedding_of_real_sizes(shape, n_vocab, hidden, dtype, device):
    judge(ids_of(*shape, n_vocab=n_vocab, device=device), randn(n_vocab, hidden, device=device), dtype)


@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("ids", [[1] * 31, [0, 1, 1, 1, 2] + [3] * 9 + [1] * 12 + [2, 4], [*range(5)] * 4, [1] * 8])
def test_runs_that_are_cut(ids, padding_idx, device, monkeypatch):
    # chunks of 8: a run within one, over a border, over several, ending on one, and the last chunk short
    monkeypatch.setattr(FILE, "CHUNK", 8)
    judge(torch.tensor(ids, device=device), randn(5, 9, device=device), torch.bfloat16, padding_idx=padding_idx)


def test_a_vocabulary_whose_ids_need_int64(device, monkeypatch):
    monkeypatch.setattr(FILE, "INT32_WORDS", 10)
    monkeypatch.setattr(FILE, "CHUNK", 8)
    judge(ids_of(5, 7, n_vocab=11, device=device), randn(11, 9, device=device), torch.bfloat16, padding_idx=1)


def test_several_blocks_of_columns(device, monkeypatch):
    monkeypatch.setattr(FILE, "COLS_FWD", 8)
    monkeypatch.setattr(FILE, "BLOCK_COLS", 16)
    monkeypatch.setattr(FILE, "CHUNK", 4)
    judge(ids_of(3, 7, n_vocab=4, device=device), randn(4, 41, device=device), torch.float32)


@pytest.mark.parametrize("padding_idx", [0, 3, -1])
def test_padding_gets_no_gradient(padding_idx, device):
    ids = torch.tensor([[0, 3, 3, 10], [10, 1, 0, 3]], device=device)
    judge(ids, randn(11, 5, device=device), torch.float32, padding_idx=padding_idx)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids(dtype, device):
    weight = randn(11, 5, device=device)
    judge(ids_of(2, 3, 4, n_vocab=11, device=device, dtype=dtype), weight, torch.float32)
    judge(ids_of(6, 4, n_vocab=11, device=device, dtype=dtype).t(), weight, torch.float32)
    judge(ids_of(6, 4, n_vocab=11, device=device, dtype=dtype)[::2, 1:], weight, torch.float32)
    judge(ids_of(6, 4, n_vocab=11, device=device, dtype=dtype)[:, 1:2], weight, torch.float32)
    judge(torch.tensor(7, device=device, dtype=dtype), weight, torch.float32)


def test_a_weight_in_columns_of_another(device):
    ids = ids_of(7, n_vocab=11, device=device)
    for weight in (
        randn(11, 9, device=device)[:, 2:7],
        randn(5, 11, device=device).t(),
        randn(22, 5, device=device)[::2],
    ):
        judge(ids, weight.float(), torch.float32)


def test_gradients_in_any_layout(device):
    ids, weight = ids_of(7, n_vocab=11, device=device), randn(11, 5, device=device).float().requires_grad_()
    other = randn(5, 7, device=device).float()
    for use in (lambda y: y.sum(), lambda y: (y.t() * other).sum(), lambda y: y[:, :1].sum()):
        got, wanted = (torch.autograd.grad(use(f(ids, weight)), weight)[0] for f in (embedding, F.embedding))
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape, n_vocab, hidden", [((0,), 3, 5), ((2, 0), 3, 5), ((3,), 4, 0)])
def test_empty(shape, n_vocab, hidden, device):
    # PyTorch's own backward reads memory that isn't there, on a GPU, where there are no columns
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    weight = randn(n_vocab, hidden, device=device).float().requires_grad_()
    y = embedding(ids, weight)
    y.backward(torch.ones_like(y))
    assert y.shape == (*shape, hidden) and not weight.grad.any()


def test_a_frozen_weight_costs_nothing(device):
    weight = randn(11, 5, device=device).float()
    assert not embedding(torch.tensor([1], device=device), weight).requires_grad


def test_autocast_leaves_the_dtype(device):
    weight = randn(11, 5, device=device).float()
    with torch.autocast(device.type, torch.bfloat16):
        judge(ids_of(7, n_vocab=11, device=device), weight, torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, h = 2**20 + 1, 2**11  # 2^31 + 2^11 elements of weight, and of y
    weight = torch.randn(n, h, dtype=torch.bfloat16, device=device).requires_grad_()
    ids = torch.arange(n, device=device).flip(0)
    y = embedding(ids, weight)
    assert same_bits(y[:3].detach(), weight.detach()[-3:].flip(0))
    assert same_bits(y[-3:].detach(), weight.detach()[:3].flip(0))
    y.backward(y.detach())
    assert same_bits(weight.grad[-3:], weight.detach()[-3:])


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    judge(ids_of(7, n_vocab=11, device="cuda:1"), randn(11, 5, device="cuda:1"), torch.bfloat16)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    ids, weight = ids_of(65, n_vocab=11, device=device), randn(11, 257, device=device).bfloat16().requires_grad_()
    compiled = torch.compile(lambda ids, weight: embedding(ids, weight) * 2, fullgraph=True)
    got, wanted = compiled(ids, weight), embedding(ids, weight) * 2
    assert torch.equal(got, wanted)
    assert torch.equal(*(torch.autograd.grad(y.sum(), weight)[0] for y in (got, wanted)))


@pytest.mark.gpu
def test_the_host_does_not_wait(device):
    ids, weight = ids_of(65, n_vocab=11, device=device), randn(11, 257, device=device).bfloat16().requires_grad_()
    embedding(ids, weight).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        embedding(ids, weight).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_errors_name_the_argument(device):
    weight = torch.ones(3, 4, device=device)
    with pytest.raises(ValueError, match=r"embedding: weight \(4,\) must be"):
        embedding(torch.tensor([0], device=device), weight[0])
    with pytest.raises(ValueError, match="embedding: padding_idx is 3; weight has 3 rows"):
        embedding(torch.tensor([0], device=device), weight, 3)
    with pytest.raises(ValueError, match="embedding: ids are torch.float32"):
        embedding(torch.tensor([0.0], device=device), weight)
    with pytest.raises(ValueError, match="embedding: weight is torch.float64"):
        embedding(torch.tensor([0], device=device), weight.double())


def test_an_id_outside_the_vocabulary():
    for wrong in (-1, 3):
        with pytest.raises(ValueError, match=rf"embedding: id {wrong} lies outside \[0, 3\)"):
            embedding(torch.tensor([0, wrong]), torch.ones(3, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("wrong", [-1, 3])
def test_an_id_outside_the_vocabulary_ends_on_the_device(wrong):
    # in a process of its own: no kernel runs on that device any more
    code = f"""import torch, ds_fused
ds_fused.embedding(torch.tensor([0, {wrong}], device="cuda"), torch.ones(3, 4, device="cuda"))
torch.cuda.synchronize()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode != 0 and "embedding: an id lies outside the vocabulary" in done.stdout + done.stderr


@pytest.mark.parametrize("n_vocab", [5, 70])
def test_words_without_tokens_get_zeros_once(n_vocab, device):
    # far more words than tokens and far fewer, in memory that is full of NaN
    ids = torch.tensor([4, 4, 0, n_vocab - 2], device=device)
    judge(ids, randn(n_vocab, 9, device=device), torch.bfloat16, padding_idx=n_vocab - 2)
    judge(ids.repeat(20), randn(n_vocab, 9, device=device), torch.bfloat16, padding_idx=0)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    ids, weight = ids_of(7, n_vocab=11, device="cpu"), randn(11, 5, device="cpu")
    assert same_bits(embedding(ids, weight), embedding_reference(ids, weight))
