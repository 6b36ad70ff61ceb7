"""attention_residual: both passes against fp64, of a stack and of blocks that lie each by itself."""

from __future__ import annotations

import logging

import pytest
import torch
from accuracy import as_accurate, randn, same_bits

import ds_fused.ops.registry as registry
from ds_fused.ops.common._say import say_once
from ds_fused.ops.common._triton import copies_tiles
from ds_fused.ops.residual.attention_residual import LISTED, attention_residual, attention_residual_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# where many cases are judged together: fp16 is rounded as bf16 is, in another place
OF_MANY = [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.all)]
FILE = registry.op("attention_residual").module


def inputs_of(*shape, device):
    """A stack [N, ..., D], a query by which scores are about one, and weight."""
    query, weight = (randn(shape[-1], device=device, seed=i) for i in (1, 2))
    return [randn(*shape, device=device), 2 * query * max(1, shape[-1]) ** -0.5, weight]


def listed(query, weight, *blocks, op=attention_residual, **options):
    return op(blocks, query, weight, **options)


def reference_listed(*inputs, **options):
    return listed(*inputs, op=attention_residual_reference, **options)


@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than the persistent grid has, and a group that is not full; one column over a block
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (6, 2, 9, 33), (2, 3, 1025)])
def test_a_stack(shape, dtype, device):
    inputs = inputs_of(*shape, device=device)
    as_accurate(attention_residual, attention_residual_reference, inputs, dtype, frozen=[1, 2])


@pytest.mark.parametrize("dtype", OF_MANY)
# one is a stack; two; as many as there are pointers; one more, which is stacked
@pytest.mark.parametrize("n", [1, 2, LISTED, LISTED + 1])
def test_a_list(n, dtype, device):
    stack, *vectors = inputs_of(n, 2, 3, 9, device=device)
    as_accurate(listed, reference_listed, [*vectors, *stack], dtype, frozen=[0, 1])


@pytest.fixture
def cols_held(device, monkeypatch):
    """As many columns as rows have that the backward may hold."""
    if device.type == "cuda":
        if not copies_tiles(torch.empty(0, device=device)):
            pytest.skip("programs hold their token's blocks on devices that copy tiles")
    else:
        monkeypatch.setattr(FILE, "copies_tiles", lambda x: True)
        monkeypatch.setattr(FILE, "HELD_COLS", 16)
    return FILE.HELD_COLS


@pytest.fixture
def walked_and_held(monkeypatch):
    """How many backwards went twice over the blocks, and how many once."""
    calls = {"_walked": 0, "_held": 0}

    def counted(name, stock):
        def call(*args):
            calls[name] += 1
            return stock(*args)

        return call

    for name in calls:
        monkeypatch.setattr(FILE, name, counted(name, getattr(FILE, name)))
    return calls.values()


# the least and the most that are held, an odd number between; and what is not: one less, one more
@pytest.mark.parametrize("n", [FILE.LEAST_HELD - 1, FILE.LEAST_HELD, 7, FILE.MOST_HELD, FILE.MOST_HELD + 1])
@pytest.mark.parametrize("is_full", [True, False])
def test_blocks_that_a_program_holds(n, is_full, cols_held, walked_and_held, device):
    stack, *vectors = inputs_of(n, 3, cols_held if is_full else cols_held // 2 + 1, device=device)
    as_accurate(
        attention_residual, attention_residual_reference, [stack, *vectors], torch.bfloat16, frozen=[1, 2], eps=0.1
    )
    as_accurate(listed, reference_listed, [*vectors, *stack], torch.bfloat16, frozen=[0, 1])
    walked, held = walked_and_held
    assert (walked == 0) == (held > 0) == (FILE.LEAST_HELD <= n <= FILE.MOST_HELD)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 1), (torch.float32, 1), (torch.bfloat16, 2)])
def test_blocks_that_no_program_holds(dtype, factor, cols_held, walked_and_held, device):
    inputs = inputs_of(FILE.MOST_HELD, 3, factor * cols_held, device=device)
    as_accurate(attention_residual, attention_residual_reference, inputs, dtype, frozen=[1, 2])
    walked, held = walked_and_held
    assert walked and not held


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (0, 2), (1,), (2,), (1, 2)])
def test_frozen_where_blocks_are_held(frozen, cols_held, device):
    for has_weight in (True, False):
        stack, query, weight = inputs_of(5, 3, cols_held, device=device)
        if not has_weight and {0, 1}.issubset(frozen):
            continue
        inputs = [stack, query, weight if has_weight else None]
        as_accurate(attention_residual, attention_residual_reference, inputs, torch.bfloat16, frozen=frozen)


def test_held_blocks_that_lie_apart(cols_held, device):
    query, weight = inputs_of(1, cols_held, device=device)[1:]
    x = randn(6, 4, 2, cols_held, device=device).bfloat16()
    for stack in (x[:, :, 1], x.transpose(1, 2), x[:, :1, 0].expand(-1, 4, -1)):
        as_accurate(attention_residual, attention_residual_reference, [stack, query, weight], torch.bfloat16)
    as_accurate(listed, reference_listed, [query, weight, *x[:, :, 1]], torch.bfloat16)
    as_accurate(listed, reference_listed, [query, weight, *x[:5, :, 1], x[5, :, 0].contiguous()], torch.bfloat16)


def gradients(op, dtype, shape, device, seed, exact=False):
    """Of query and weight; exact: of the same values in fp64."""
    stack, query, weight = (t.to(dtype) for t in inputs_of(*shape, device=device))
    stack, dy = (randn(*s, device=device, seed=10 * seed + i).to(dtype) for i, s in ((1, shape), (2, shape[1:])))
    if exact:
        stack, query, weight, dy = (t.double() for t in (stack, query, weight, dy))
    parameters = query.requires_grad_(), weight.requires_grad_()
    return torch.cat(torch.autograd.grad(op(stack, *parameters), parameters, dy))


# Each is a sum over all tokens and blocks, of which most cancels: how far PyTorch is off in one case is luck, so the
# errors of many are judged together.
@pytest.mark.parametrize("dtype", OF_MANY)
@pytest.mark.parametrize(
    "shape", [(3, 5, 7), (4, 19, 33), *(pytest.param((8, 2049, d), marks=pytest.mark.gpu) for d in (1024, 4096, 16384))]
)
def test_sums(shape, dtype, device):
    check_sums(shape, dtype, device)


def test_sums_where_blocks_are_held(cols_held, device):
    check_sums((8, 4, cols_held), torch.bfloat16, device)


def check_sums(shape, dtype, device):
    ours = theirs = 0.0
    for seed in range(4):
        sums, torchs = (
            gradients(op, dtype, shape, device, seed) for op in (attention_residual, attention_residual_reference)
        )
        if seed == 0:
            assert same_bits(sums, gradients(attention_residual, dtype, shape, device, seed))
        exact = gradients(attention_residual_reference, dtype, shape, device, seed, exact=True)
        ours, theirs = (a + (b.double() - exact).square().sum() for a, b in ((ours, sums), (theirs, torchs)))
    assert ours.sqrt() <= 2 * theirs.sqrt()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
# blocks of Kimi Linear and of Llama-3-8B; the widest of which the backward holds the query; the widest
@pytest.mark.parametrize("shape", [(9, 1023, 2304), (8, 515, 4096), (16, 67, 8192), (3, 33, 16384), (70, 67, 1024)])
def test_real_sizes(shape, dtype, device):
    stack, *vectors = inputs_of(*shape, device=device)
    as_accurate(attention_residual, attention_residual_reference, [stack, *vectors], dtype, frozen=[1, 2])
    if len(stack) <= LISTED:
        as_accurate(listed, reference_listed, [*vectors, *stack], dtype, frozen=[0, 1])


def test_it_is_a_mean_by_a_softmax_of_normed_rows(device):
    stack, query, weight = (t.float() for t in inputs_of(4, 5, 9, device=device))
    keys = torch.nn.functional.rms_norm(stack, (9,), weight, eps=0.1)
    expected = torch.einsum("nt,ntd->td", (keys @ query).softmax(0), stack)
    torch.testing.assert_close(attention_residual(stack, query, weight, eps=0.1), expected)


def test_scores_that_are_far_apart(device):
    """One block takes all, and its score grows from block to block."""
    stack, query, weight = inputs_of(5, 3, 9, device=device)
    far = 50 * query
    as_accurate(attention_residual, attention_residual_reference, [stack, far, weight], torch.bfloat16, frozen=[1, 2])
    assert attention_residual(stack.float(), 1e4 * query.float()).isfinite().all()


def test_the_backward_reads_the_query_again_where_rows_are_wide(device, monkeypatch):
    monkeypatch.setattr(FILE, "WIDEST_QUERY", 8)
    inputs = inputs_of(3, 5, 9, device=device)
    as_accurate(attention_residual, attention_residual_reference, inputs, torch.bfloat16)
    inputs[2] = None
    as_accurate(attention_residual, attention_residual_reference, inputs, torch.bfloat16)


def test_rows_that_no_program_holds_run_the_reference_and_a_line_says_so(device, monkeypatch, caplog):
    monkeypatch.setattr(FILE, "WIDEST", 8)
    inputs = [t.float() for t in inputs_of(3, 5, 9, device=device)]
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert same_bits(attention_residual(*inputs), attention_residual_reference(*inputs))
    assert [record.message for record in caplog.records] == [
        "ds_fused: attention_residual: rows of 9 columns are wider than 8: PyTorch computes them"
    ]


def test_no_line_where_pytorch_computes_all_rows(monkeypatch, caplog):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(FILE, "WIDEST", 8)
    say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        attention_residual(*(t.float() for t in inputs_of(3, 5, 9, device=torch.device("cpu"))))
    assert not caplog.records


def test_without_weight(device):
    inputs = [*inputs_of(3, 5, 9, device=device)[:2], None]
    as_accurate(attention_residual, attention_residual_reference, inputs, torch.bfloat16, eps=1e-3)


def test_vectors_of_another_dtype(device):
    stack, query, weight = inputs_of(3, 5, 9, device=device)
    inputs = [stack.bfloat16(), query.float(), weight.bfloat16()]
    as_accurate(attention_residual, attention_residual_reference, inputs, torch.float32)


@pytest.mark.parametrize("frozen", [(0,), (0, 1), (0, 2), (1,), (2,), (1, 2)])
def test_frozen(frozen, device):
    inputs = inputs_of(3, 5, 9, device=device)
    as_accurate(attention_residual, attention_residual_reference, inputs, torch.bfloat16, frozen=frozen)


def test_a_frozen_block_of_a_list(device):
    stack, *vectors = inputs_of(3, 5, 9, device=device)
    as_accurate(listed, reference_listed, [*vectors, *stack], torch.bfloat16, frozen=[3])


def test_one_block_twice(device):
    """As when a connection's first block is the model's input itself: autograd adds the gradients of both places."""
    stack, query, weight = (t.bfloat16() for t in inputs_of(2, 5, 9, device=device))
    as_accurate(
        lambda a, b: attention_residual([a, b, a], query, weight),
        lambda a, b: attention_residual_reference([a, b, a], query, weight),
        [*stack],
        torch.bfloat16,
    )


def test_strided_blocks(device):
    query, weight = inputs_of(1, 9, device=device)[1:]
    x = randn(3, 6, 2, 9, device=device).bfloat16()
    for stack in (x[:, :, 1], x[::2], x.transpose(0, 1), x.transpose(1, 2), x[:1].expand(4, 6, 2, 9)):
        as_accurate(attention_residual, attention_residual_reference, [stack, query, weight], torch.bfloat16)
    wide = randn(3, 6, 10, device=device).bfloat16()
    # of one stride, and of several
    for blocks in ([*wide[..., 1:]], [wide[0, :, 1:], x[0, :, 0], x[0, :, 1].contiguous()]):
        as_accurate(listed, reference_listed, [query, weight, *blocks], torch.bfloat16)
    stack = randn(3, 9, 5, device=device).bfloat16().transpose(1, 2)
    as_accurate(attention_residual, attention_residual_reference, [stack, query, None], torch.bfloat16)


@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 3, 0, 5), (2, 3, 0)])
def test_empty(shape, device):
    as_accurate(attention_residual, attention_residual_reference, inputs_of(*shape, device=device), torch.float32)


def test_one_token_without_a_dimension(device):
    as_accurate(attention_residual, attention_residual_reference, inputs_of(3, 9, device=device), torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
# a block has 2^30 elements and 8192 more; 2^28 and 4096 more, in blocks that are held
@pytest.mark.parametrize(("n", "t", "d"), [(3, 2**17 + 1, 8192), (8, 2**16 + 1, 4096)])
def test_more_elements_than_int32(n, t, d, device):
    query = torch.randn(d, device=device, dtype=torch.bfloat16) / 64
    stack = torch.randn(n, t, d, device=device, dtype=torch.bfloat16).requires_grad_()
    y = attention_residual(stack, query)
    (dstack,) = torch.autograd.grad(y, stack, y.detach())
    tail = stack.detach()[:, -3:].clone().requires_grad_()
    y_tail = attention_residual(tail, query)
    (dtail,) = torch.autograd.grad(y_tail, tail, y_tail.detach())
    assert same_bits(y[-3:].detach(), y_tail.detach()) and same_bits(dstack[:, -3:], dtail)


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    inputs = inputs_of(3, 5, 33, device="cuda:1")
    as_accurate(attention_residual, attention_residual_reference, inputs, torch.bfloat16, frozen=[1, 2])


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    torch.compiler.reset()
    leaves = [t.bfloat16().requires_grad_() for t in inputs_of(3, 5, 13, 257, device=device)]
    for call in (attention_residual, lambda stack, *vectors: attention_residual(stack.unbind(0), *vectors)):
        compiled = torch.compile(call, fullgraph=True)
        got, wanted = compiled(*leaves), call(*leaves)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(*(torch.autograd.grad(y.sum(), leaves) for y in (got, wanted)), strict=True):
            torch.testing.assert_close(a, b)


def test_errors_name_the_argument(device):
    stack, query, weight = (t.float() for t in inputs_of(3, 5, 9, device=device))
    for blocks, said in (
        (stack[0, 0], r"blocks \(9,\) must be a stack of at least one block"),
        (stack[:0], r"blocks \(0, 5, 9\) must be a stack of at least one block"),
        ([], "blocks is empty; there must be at least one"),
        ([stack[0, 0, 0]], r"blocks\[0\] is a number"),
        ([stack[0], stack[1, :4]], r"blocks\[1\] is torch.float32 \(4, 9\), blocks\[0\] torch.float32 \(5, 9\)"),
        ([stack[0], stack[1].bfloat16()], r"blocks\[1\] is torch.bfloat16 \(5, 9\), blocks\[0\] torch.float32"),
        (stack.double(), "blocks is torch.float64; kernels exist for"),
    ):
        with pytest.raises(ValueError, match=f"attention_residual: {said}"):
            attention_residual(blocks, query, weight)
    with pytest.raises(ValueError, match=r"query \(8,\) must be one value per column of the blocks, \(9,\)"):
        attention_residual(stack, query[:8])
    with pytest.raises(ValueError, match=r"weight \(0,\) must be"):  # a ZeRO-3 shard that nobody gathered
        attention_residual(stack, query, weight[:0])


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = [t.bfloat16() for t in inputs_of(3, 5, 9, device="cpu")]
    assert same_bits(attention_residual(*inputs), attention_residual_reference(*inputs))
