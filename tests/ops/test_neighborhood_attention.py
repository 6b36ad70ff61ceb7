"""neighborhood_attention: both passes against fp64, which tokens see one another, layouts, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, randn, same_bits
from heads import as_accurate_under_autocast

import ds_fused.ops.registry as registry
from ds_fused.ops.attention.neighborhood_attention import (
    FWD_BLOCKS,
    FWD_TILE,
    neighborhood_attention,
    neighborhood_attention_reference,
)

FILE = registry.op("neighborhood_attention").module
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# dp - sum(p * dp) cancels where few are neighbours: PyTorch rounds its two terms alike, dy * y sums up others
FLOOR = 1e-6


def three(*shape: int, device: torch.device) -> list[torch.Tensor]:
    """q, k and v."""
    return [randn(*shape, device=device, seed=i) for i in range(3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "kernel_size", "dilation"),
    [
        ((2, 2, 37, 5), 7, 1),  # one tile of odd sizes
        ((1, 1, FWD_BLOCKS[0][1] + 2, 33), 9, 1),  # two, the second of which has 2 tokens
        ((1, 1, 151, 16), 5, 2),  # classes of 76 and 75 tokens
        ((1, 1, 5, 8), 3, 2),  # classes of 3 and 2
        ((1, 1, 23, 8), 101, 1),  # a window wider than the sequence
        pytest.param((1, 1, FWD_TILE[0] + 70, 40), 2 * FWD_BLOCKS[-1][0] + 3, 1, marks=pytest.mark.all),
        pytest.param((1, 1, 300, 8), 2 * FWD_BLOCKS[-1][0] + 3, 2, marks=pytest.mark.all),
    ],
)
def test_neighborhood_attention(shape, kernel_size, dilation, dtype, device):
    inputs = three(*shape, device=device)
    options = {"kernel_size": kernel_size, "dilation": dilation, "floor": FLOOR}
    as_accurate(neighborhood_attention, neighborhood_attention_reference, inputs, dtype, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_tokens", "kernel_size", "dilation"),
    [
        (FWD_BLOCKS[0][1] + 2, 9, 1),
        (23, 7, 3),
        (5, 7, 2),  # fewer in a class than in a window
        pytest.param(FWD_TILE[0] + 70, 2 * FWD_BLOCKS[-1][0] + 3, 1, marks=pytest.mark.all),
        pytest.param(4 * FWD_BLOCKS[0][1], 2 * FWD_BLOCKS[-1][0] + 1, 1, marks=pytest.mark.all),
    ],
)
def test_shifted_windows(n_tokens, kernel_size, dilation, dtype, device):
    inputs = three(1, 1, n_tokens, 8, device=device)
    options = {"kernel_size": kernel_size, "dilation": dilation, "border": "shift", "floor": FLOOR}
    as_accurate(neighborhood_attention, neighborhood_attention_reference, inputs, dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128, 192])
@pytest.mark.parametrize(
    ("n_tokens", "kernel_size", "dilation", "border"),
    [(2048, 7, 1, "cut"), (1023, 129, 1, "cut"), (2047, 255, 3, "shift"), (999, 7, 64, "shift")],
)
def test_neighborhood_attention_of_real_sizes(n_tokens, kernel_size, dilation, border, d, dtype, device):
    inputs = three(2, 3, n_tokens, d, device=device)
    options = {"kernel_size": kernel_size, "dilation": dilation, "border": border, "floor": FLOOR}
    as_accurate(neighborhood_attention, neighborhood_attention_reference, inputs, dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "kernel_size", "dilation"), [(1, 1, 1), (5, 1, 1), (5, 7, 9)])
def test_a_token_alone_gets_its_own_value(n_tokens, kernel_size, dilation, dtype, device):
    q, k, v = (x.to(dtype).requires_grad_() for x in three(1, 2, n_tokens, 4, device=device))
    y = neighborhood_attention(q, k, v, kernel_size=kernel_size, dilation=dilation)
    assert torch.equal(y, v)
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), v.detach())
    assert same_bits(dv, v.detach())
    # terms that cancel, summed in another order
    assert max(dq.abs().max(), dk.abs().max()) < 1e-5


@pytest.mark.parametrize("border", ["cut", "shift"])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(5, 1), (3, 4), (7, 3)])
def test_which_tokens_are_neighbours(kernel_size, dilation, border, device):
    """Token i's row says whose values it got."""
    t = 20
    q, k = (F.pad(randn(1, 1, t, 4, device=device, seed=i).float(), (0, t - 4)) for i in range(2))
    values = torch.eye(t, device=device)[None, None]
    weights = neighborhood_attention(q, k, values, kernel_size=kernel_size, dilation=dilation, border=border)
    expected = torch.zeros(t, t, dtype=torch.bool)
    for i in range(t):
        window = [i + step * dilation for step in range(-(kernel_size // 2), kernel_size // 2 + 1)]
        while border == "shift" and window[0] < 0:
            window = [j + dilation for j in window]
        while border == "shift" and window[-1] >= t:
            window = [j - dilation for j in window]
        expected[i, [j for j in window if 0 <= j < t]] = True
    assert torch.equal(weights[0, 0].cpu() > 0, expected)
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, t, device=device))


def test_scale(device):
    inputs = three(1, 2, 21, 8, device=device)
    as_accurate(neighborhood_attention, neighborhood_attention_reference, inputs, torch.bfloat16, scale=0.0)
    as_accurate(neighborhood_attention, neighborhood_attention_reference, inputs, torch.bfloat16, scale=-2.5)


def test_large_scores(device):
    q, k, v = three(1, 1, 40, 8, device=device)
    inputs = [100 * q, 100 * k, v]
    y = neighborhood_attention(*(x.float() for x in inputs))
    assert y.isfinite().all()
    torch.testing.assert_close(y, neighborhood_attention_reference(*(x.float() for x in inputs)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen(frozen, device):
    inputs = three(1, 2, 21, 8, device=device)
    as_accurate(neighborhood_attention, neighborhood_attention_reference, inputs, torch.bfloat16, frozen=frozen)


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 0, 5, 8), (2, 2, 0, 8), (2, 2, 5, 0)])
def test_empty(shape, device):
    as_accurate(neighborhood_attention, neighborhood_attention_reference, three(*shape, device=device), torch.bfloat16)


def test_heads_are_read_where_they_lie(device):
    """As projections hand them over: [B, T, H, D], parts of one product, heads swapped; columns apart are copied."""
    packed = randn(2, 9, 3 * 2 * 8, device=device).bfloat16()
    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) for x in packed.chunk(3, -1))
    as_accurate(neighborhood_attention, neighborhood_attention_reference, [q, k, v], torch.bfloat16)
    apart = [x.contiguous().transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    as_accurate(neighborhood_attention, neighborhood_attention_reference, apart, torch.bfloat16)
    shared = [q, k[:, :1].expand_as(q), v[:, :1].expand_as(q)]
    as_accurate(neighborhood_attention, neighborhood_attention_reference, shared, torch.bfloat16)
    y = neighborhood_attention(q, k, v)
    assert y.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("whole_gpu")
@pytest.mark.parametrize("kernel_size", [3, 41])
@pytest.mark.parametrize("border", ["cut", "shift"])
def test_neighbours_that_are_further_apart_than_int32(kernel_size, border, device):
    """4 GiB, of which a CPU's system gives only what is touched."""
    room = torch.empty(2**31 + 16, dtype=torch.bfloat16, device=device)
    q = room.as_strided((1, 1, 3, 16), (0, 0, 2**30, 1))
    q.copy_(randn(1, 1, 3, 16, device=device))

    def results(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q = q.detach().requires_grad_()
        y = neighborhood_attention(q, q, q, kernel_size=kernel_size, dilation=2, border=border)
        return y.detach(), *torch.autograd.grad(y, q, y.detach())

    for got, wanted in zip(results(q), results(q.contiguous()), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    b, h, t, d = 2, 64, 131072 + 2, 128
    q = torch.randn(b, h, t, d, device=device, dtype=torch.bfloat16).requires_grad_()
    y = neighborhood_attention(q, q.detach(), q.detach())
    (dq,) = torch.autograd.grad(y, q, y.detach())
    # the last tokens of the last head see none but these
    tail = q.detach()[-1:, -1:, -32:].double().requires_grad_()
    exact = neighborhood_attention_reference(tail, tail.detach(), tail.detach())
    (dexact,) = torch.autograd.grad(exact, tail, y.detach()[-1:, -1:, -32:].double())
    for got, wanted in ((y.detach(), exact.detach()), (dq, dexact)):
        got, wanted = got[-1, -1, -16:], wanted[-1, -1, -16:]
        assert (got - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    inputs = three(1, 2, 21, 8, device=torch.device("cuda", 1))
    as_accurate(neighborhood_attention, neighborhood_attention_reference, inputs, torch.bfloat16)


@pytest.mark.gpu
def test_compiles_to_one_graph(device):
    compiled = torch.compile(lambda *inputs: neighborhood_attention(*inputs) * 2, fullgraph=True)
    leaves = [x.bfloat16().requires_grad_() for x in three(2, 3, 65, 64, device=device)]
    got, wanted = compiled(*leaves), neighborhood_attention(*leaves) * 2
    assert same_bits(got.detach(), wanted.detach())
    dy = torch.randn_like(wanted)
    for a, b in zip(torch.autograd.grad(got, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True):
        assert same_bits(a, b)


def test_autocast_decides_the_dtype(device):
    inputs = three(1, 2, 23, 8, device=device)
    as_accurate_under_autocast(
        neighborhood_attention, neighborhood_attention_reference, inputs, kernel_size=5, floor=FLOOR
    )
    q, k, v = inputs
    with torch.autocast(device.type, torch.bfloat16):
        assert neighborhood_attention(q.float(), k.float(), v.bfloat16()).dtype == torch.bfloat16


def test_errors_name_the_argument(device):
    q, k, v = (x.float() for x in three(1, 2, 5, 8, device=device))
    with pytest.raises(ValueError, match=r"neighborhood_attention: q \(2, 5, 8\), k \(1, 2, 5, 8\)"):
        neighborhood_attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"v \(1, 2, 4, 8\) must have one shape, \[batch, heads, tokens, columns\]"):
        neighborhood_attention(q, k, v[:, :, :4])
    for size in (0, 4, -3):
        with pytest.raises(ValueError, match=f"neighborhood_attention: kernel_size is {size}; it must be odd"):
            neighborhood_attention(q, k, v, kernel_size=size)
    with pytest.raises(ValueError, match="neighborhood_attention: dilation is 0; it must be 1 or more"):
        neighborhood_attention(q, k, v, dilation=0)
    with pytest.raises(ValueError, match="neighborhood_attention: border is 'wrap'; it must be 'cut' or 'shift'"):
        neighborhood_attention(q, k, v, border="wrap")
    with pytest.raises(ValueError, match=r"q is torch.float32, k torch.bfloat16 and v torch.float32; outside autocast"):
        neighborhood_attention(q, k.bfloat16(), v)
    with pytest.raises(ValueError, match="neighborhood_attention: q is torch.float64; kernels exist for"):
        neighborhood_attention(q.double(), k.double(), v.double())
    wide = torch.zeros(1, 1, 2, FILE.MOST_COLS + 1, device=device)
    with pytest.raises(ValueError, match="q has 257 columns a head; kernels exist for 256"):
        neighborhood_attention(wide, wide, wide)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [x.float() for x in three(1, 2, 9, 8, device=torch.device("cpu"))]
    assert torch.equal(neighborhood_attention(*inputs), neighborhood_attention_reference(*inputs))
