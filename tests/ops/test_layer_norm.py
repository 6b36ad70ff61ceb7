"""layer_norm and add_layer_norm: against fp64, the sums of dweight and dbias, rows too wide for a tile, residuals."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, as_its_last_rows, randn, same_bits

import ds_fused.ops.registry as registry
from ds_fused.ops.common import _row_tiles
from ds_fused.ops.norms.add_layer_norm import add_layer_norm, add_layer_norm_reference
from ds_fused.ops.norms.layer_norm import layer_norm, layer_norm_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = registry.op("layer_norm").module


def affine(d, device):
    return [randn(d, device=device, seed=seed) for seed in (2, 3)]


def first(function):
    return lambda *inputs: function(*inputs)[0]


def norm_and_inputs(op, shape, device):
    """(function, reference, inputs) of either op."""
    if op == "layer_norm":
        return layer_norm, layer_norm_reference, [randn(*shape, device=device), *affine(shape[-1], device)]
    x, residual = (randn(*shape, device=device, seed=seed) for seed in (0, 1))
    return add_layer_norm, add_layer_norm_reference, [x, residual, *affine(shape[-1], device)]


BOTH = pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
# one element; odd; more rows than the persistent grid has, the last tile short; just over a power of two
@pytest.mark.parametrize("shape", [(1,), (9, 7), (5, 67, 33), (7, 257)])
def test_norm(shape, dtype, op, device):
    function, reference, inputs = norm_and_inputs(op, shape, device)
    # eps that counts: dx of few columns is a difference of equal terms otherwise, noise in any dtype
    as_accurate(function, reference, inputs, dtype, eps=0.5, floor=2.0**-24 if shape == (1,) else 0.0)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (4095, 768),  # GPT-2, BERT
        (2049, 4096),  # Falcon-7B
        (513, 10240),  # the widest that backward takes whole
        (513, 12288),  # GPT-3
        (65, 40960),  # walked forward too
    ],
)
def test_norm_of_real_sizes(shape, dtype, op, device):
    function, reference, inputs = norm_and_inputs(op, shape, device)
    as_accurate(function, reference, inputs, dtype)


@pytest.mark.parametrize("d", [11, 18])
@pytest.mark.parametrize("op, dtype", [("layer_norm", torch.float32), ("add_layer_norm", torch.bfloat16)])
def test_rows_in_blocks(dtype, op, d, device, monkeypatch):
    monkeypatch.setattr(_row_tiles, "LEAST_BLOCK", 4)
    # three and five of 4 columns, the last one short
    function, reference, inputs = norm_and_inputs(op, (5, d), device)
    as_accurate(function, reference, inputs, dtype, eps=0.5)


@pytest.fixture
def narrow_tiles(monkeypatch):
    monkeypatch.setattr(FILE, "WHOLE_ROW_FWD", 8)
    monkeypatch.setattr(FILE, "WHOLE_ROW_BWD", 8)
    monkeypatch.setattr(_row_tiles, "WALK_BLOCK", 32)
    monkeypatch.setattr(FILE, "COLUMNS_TILE", (2, 32))


@pytest.mark.parametrize("op, dtype", [("layer_norm", torch.float32), ("add_layer_norm", torch.bfloat16)])
@pytest.mark.usefixtures("narrow_tiles")
def test_rows_too_wide_for_a_tile_are_walked(dtype, op, device):
    # 41 columns are two blocks, the last one short; programs of a block of columns take more than one tile. So many
    # rows that the worst error of PyTorch is no luck
    function, reference, inputs = norm_and_inputs(op, (40, 41), device)
    as_accurate(function, reference, inputs, dtype)


@pytest.mark.usefixtures("narrow_tiles")
def test_a_walked_row_far_from_zero_keeps_its_variance(device):
    # a mean a thousand times the deviation: sums of squares would lose all of it
    x = 1000 + randn(4, 41, device=device)
    as_accurate(layer_norm, layer_norm_reference, [x, *affine(41, device)], torch.float32)


def test_a_row_far_from_zero_keeps_its_variance(device):
    as_accurate(
        layer_norm, layer_norm_reference, [1000 + randn(4, 41, device=device), *affine(41, device)], torch.float32
    )


@BOTH
@pytest.mark.parametrize("without", [(-1,), (-2,), (-2, -1)])
def test_without_weight_or_bias(without, op, device):
    function, reference, inputs = norm_and_inputs(op, (5, 33), device)
    for i in without:
        inputs[i] = None
    as_accurate(function, reference, inputs, torch.bfloat16)


@BOTH
@pytest.mark.parametrize("x_dtype, weight_dtype", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_weight_of_another_dtype(x_dtype, weight_dtype, op, device):
    function, reference, inputs = norm_and_inputs(op, (5, 33), device)
    inputs = [x.to(weight_dtype if x.ndim == 1 else x_dtype) for x in inputs]
    as_accurate(function, reference, inputs, x_dtype)


def test_residual_of_another_dtype(device):
    inputs = [randn(5, 33, device=device).bfloat16(), randn(5, 33, device=device, seed=1).float()]
    as_accurate(add_layer_norm, add_layer_norm_reference, [*inputs, *affine(33, device)], torch.float32)


def test_what_is_normalised_is_the_returned_sum(device):
    x, residual = (randn(64, 33, device=device, seed=seed).bfloat16() for seed in (0, 1))
    weight, bias = (t.bfloat16() for t in affine(33, device))
    y, total = add_layer_norm(x, residual, weight, bias)
    assert same_bits(total, x + residual)
    assert same_bits(y, layer_norm(total, weight, bias))


def test_either_output_may_be_left_unused(device):
    inputs = [t.float() for t in norm_and_inputs("add_layer_norm", (5, 33), device)[2]]
    for used in (0, 1):
        results = []
        for function in (add_layer_norm, add_layer_norm_reference):
            leaves = [t.clone().requires_grad_() for t in inputs]
            dy = randn(5, 33, device=device, seed=5).float()
            results.append(torch.autograd.grad(function(*leaves)[used], leaves, dy, allow_unused=True))
        for ours, torchs in zip(*results, strict=True):
            assert (ours is None) == (torchs is None)
            if ours is not None:
                torch.testing.assert_close(ours, torchs)


@BOTH
@pytest.mark.parametrize("walked", [False, True])
@pytest.mark.parametrize("trained", [0, -2, -1])
def test_frozen(trained, walked, op, device, request):
    if walked:
        request.getfixturevalue("narrow_tiles")
    function, reference, inputs = norm_and_inputs(op, (5, 33), device)
    frozen = set(range(len(inputs))) - {trained % len(inputs)}
    if op == "add_layer_norm" and trained != 0:  # then the sum has no gradient
        as_accurate(first(function), first(reference), inputs, torch.float32, frozen=[*frozen])
        assert not function(
            *(t if i in frozen else t.requires_grad_() for i, t in enumerate(t.float() for t in inputs))
        )[1].requires_grad
    else:
        as_accurate(function, reference, inputs, torch.float32, frozen=[*frozen])


def test_frozen_inputs_cost_no_work(device, monkeypatch):
    monkeypatch.setattr(FILE, "sum_partials", None)
    monkeypatch.setattr(FILE, "partials", None)
    x, (weight, bias) = randn(5, 33, device=device).float().requires_grad_(), affine(33, device)
    layer_norm(x, weight.float(), bias.float()).sum().backward()
    assert x.grad is not None


@pytest.mark.usefixtures("narrow_tiles")
def test_a_frozen_walked_x_costs_no_work(device, monkeypatch):
    monkeypatch.setattr(FILE, "_layer_norm_bwd_walk_kernel", None)
    weight = affine(33, device)[0].float().requires_grad_()
    layer_norm(randn(5, 33, device=device).float(), weight).sum().backward()
    assert weight.grad is not None


def test_strided_rows(device):
    x = randn(6, 2, 33, device=device).bfloat16()
    for view in (x[:, 1], x[::2], x.transpose(0, 1), x[..., 1:], x[:1].expand(4, 2, 33)):  # read in place, or copied
        inputs = [view, *affine(view.shape[-1], device)]
        as_accurate(layer_norm, layer_norm_reference, inputs, torch.bfloat16)
    for view, other in ((x[:, 1], x[:, 0]), (x.transpose(0, 1), x[:1, :1].expand(2, 6, 33))):
        inputs = [view, other, *affine(33, device)]
        as_accurate(add_layer_norm, add_layer_norm_reference, inputs, torch.bfloat16)
    columns = randn(33, 6, device=device).bfloat16().t()
    inputs = [columns, randn(66, device=device)[::2], randn(66, device=device, seed=1)[::2]]
    as_accurate(layer_norm, layer_norm_reference, inputs, torch.bfloat16)


@BOTH
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)])
def test_empty(shape, op, device):
    function, reference, inputs = norm_and_inputs(op, shape, device)
    as_accurate(function, reference, inputs, torch.float32)


def test_equal_values(device):
    x = randn(3, 33, device=device)
    x[1] = 2
    as_accurate(layer_norm, layer_norm_reference, [x, *affine(33, device)], torch.float32)


def test_under_autocast_a_result_has_the_dtype_of_pytorchs(device):
    x, residual = (randn(5, 33, device=device, seed=seed).bfloat16() for seed in (0, 1))
    weight, bias = (t.float() for t in affine(33, device))
    with torch.autocast(device.type, torch.bfloat16):
        wanted = torch.nn.functional.layer_norm(x, (33,), weight, bias).dtype
        assert layer_norm(x, weight, bias).dtype == wanted
        y, total = add_layer_norm(x, residual, weight, bias)
        assert (y.dtype, total.dtype) == (wanted, torch.bfloat16)
        as_accurate(layer_norm, layer_norm_reference, [x, weight, bias], torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, d = 2**20 + 1, 2**11  # 2^31 + 2^11 elements, 4 GiB each
    weight, bias = (t.bfloat16() for t in affine(d, device))
    as_its_last_rows(lambda x: layer_norm(x, weight, bias), n, d, device)


def sum_as_its_last_rows(n, d, device):
    x, residual = (torch.randn(n, d, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(2))
    parameters = [t.bfloat16() for t in affine(d, device)]
    results = add_layer_norm(x, residual, *parameters)
    torch.autograd.backward(results, [x.detach(), residual.detach()])
    tails = [t.detach()[-3:].clone().requires_grad_() for t in (x, residual)]
    tail_results = add_layer_norm(*tails, *parameters)
    torch.autograd.backward(tail_results, [t.detach() for t in tails])
    for whole, tail in zip(results, tail_results, strict=True):
        assert same_bits(whole[-3:].detach(), tail.detach())
    assert same_bits(x.grad[-3:], tails[0].grad) and same_bits(residual.grad[-3:], tails[1].grad)


def test_the_last_rows_of_a_sum(device):
    sum_as_its_last_rows(70, 33, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_a_sum_of_more_elements_than_int32(device):
    sum_as_its_last_rows(2**20 + 1, 2**11, device)


@pytest.mark.gpu
@pytest.mark.gpus
@BOTH
def test_runs_on_the_tensors_own_device(op):
    function, reference, inputs = norm_and_inputs(op, (5, 33), "cuda:1")
    assert torch.cuda.current_device() == 0
    as_accurate(function, reference, inputs, torch.bfloat16)


@pytest.mark.gpu
@BOTH
# a whole row; a walked one; both one after the other, when dynamo takes the width for a symbol
@pytest.mark.parametrize("widths", [(257,), (40960,), (257, 40960), (40960, 257)])
def test_compiles_to_one_graph(widths, op, device):
    torch.compiler.reset()  # what it saw of this function in another test makes symbols too
    function, reference, _ = norm_and_inputs(op, (1, 1), device)
    compiled = torch.compile(lambda *inputs: function(*inputs), fullgraph=True)
    for d in widths:
        inputs = [t.bfloat16() for t in norm_and_inputs(op, (65, d), device)[2]]
        results = []
        for f, dtype in ((compiled, torch.bfloat16), (function, torch.bfloat16), (reference, torch.float64)):
            leaves = [t.to(dtype).detach().requires_grad_() for t in inputs]
            y = f(*leaves)
            total = sum(part.sum() for part in (y if isinstance(y, tuple) else (y,)))
            results.append([total, *torch.autograd.grad(total, leaves)])
        # no bits are compared: a compiler that knows less of the width loads, and adds up, in another order
        for i, values in enumerate(zip(*results, strict=True)):
            error, allowed = ((value.double() - values[-1]).abs().max() for value in values[:2])
            assert error <= 1.01 * allowed + 1e-3, f"{i} at {d} columns: {error:.3g} off, {allowed:.3g} eager"


@pytest.mark.gpu
def test_a_cuda_graph_captures_it(device):
    x, weight = randn(65, 257, device=device).bfloat16(), randn(257, device=device).bfloat16()
    wanted = layer_norm(x, weight)  # compiles the kernel before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer_norm(x, weight)
    graph.replay()
    assert torch.equal(y, wanted)


def test_errors_name_the_argument(device):
    x = torch.ones(2, 3, device=device)
    with pytest.raises(ValueError, match=r"layer_norm: weight \(4,\) .* x \(2, 3\)"):
        layer_norm(x, torch.ones(4, device=device))
    with pytest.raises(ValueError, match=r"layer_norm: bias \(0,\)"):  # a ZeRO-3 shard that nobody gathered
        layer_norm(x, None, torch.ones(0, device=device))
    with pytest.raises(ValueError, match="layer_norm: x is torch.int64"):
        layer_norm(x.long(), None)
    with pytest.raises(ValueError, match="layer_norm: x is a number"):
        layer_norm(torch.tensor(1.0, device=device), None)
    with pytest.raises(ValueError, match=r"add_layer_norm: x \(2, 3\) and residual \(3,\) must have one shape"):
        add_layer_norm(x, torch.ones(3, device=device), None)
    with pytest.raises(ValueError, match="add_layer_norm: residual is torch.float64"):
        add_layer_norm(x, x.double(), None)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, bias = (randn(*shape, device="cpu").bfloat16() for shape in ((5, 33), (33,), (33,)))
    assert same_bits(layer_norm(x, weight, bias), layer_norm_reference(x, weight, bias))
    ours, torchs = (f(x, x, weight, bias) for f in (add_layer_norm, add_layer_norm_reference))
    assert all(same_bits(a, b) for a, b in zip(ours, torchs, strict=True))
