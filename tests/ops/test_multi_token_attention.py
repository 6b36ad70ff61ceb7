"""multi_token_attention: 16 bits by our own convolution, fp32 by PyTorch's; both against fp64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from accuracy import as_accurate, nan_filled, randn, same_bits

from ds_fused.ops.attention import _causal_conv
from ds_fused.ops.attention._causal_conv import Window, fits
from ds_fused.ops.attention.multi_token_attention import multi_token_attention, multi_token_attention_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# interpreted kernels take long, and fp16 takes the way of bf16
FEW = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.all)]
PAPERS = {"padding": (5, 5)}


@pytest.fixture
def small_tiles(monkeypatch) -> None:
    """So small that a plane of 21 has some of each kind: below the diagonal, on it and above."""
    for name, size in {"ROWS": 16, "COLS": 16, "K": 16, "TAP_ROWS": 16, "TAPS": 2}.items():
        monkeypatch.setattr(_causal_conv, name, size)


def some(shape, taps, *, device, groups=None, outs=None) -> list[torch.Tensor]:
    """Scores, weight and bias; as many groups, and heads of the result, as heads where none are named."""
    heads = shape[1]
    groups, outs = groups or heads, outs or heads
    weight = randn(outs, heads // groups, *taps, device=device, seed=1)
    return [randn(*shape, shape[-1], device=device), weight, randn(outs, device=device, seed=2)]


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def judged(inputs, dtype, **options) -> None:
    # fp32 is PyTorch's convolution, whose sums have an order of their own
    floor = 2e-5 if dtype == torch.float32 and inputs[0].is_cuda else 0.0
    options = {"groups": inputs[0].shape[1] // inputs[1].shape[1], "floor": floor, **options}
    # the judge asks ours for deterministic gradients, which are up to 60 times as far off there: so does the yardstick
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        as_accurate(multi_token_attention, multi_token_attention_reference, inputs, dtype, **options)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", FEW)
@pytest.mark.parametrize(
    ("shape", "taps", "more", "options"),
    [
        ((1, 1, 1), (1, 1), {}, {}),
        ((1, 1, 48), (3, 3), {}, {"padding": 1}),  # two tiles of columns; no ragged plane as the others
        ((1, 4, 19), (2, 5), {"groups": 2, "outs": 6}, {"padding": (2, 1)}),  # y has more rows than columns
        ((1, 4, 20), (3, 3), {"groups": 1}, {"padding": 1}),
        pytest.param((1, 2, 131), (6, 11), {}, PAPERS, marks=pytest.mark.all),
        pytest.param((1, 2, 70), (1, 70), {"groups": 1, "outs": 1}, {"padding": (0, 40)}, marks=pytest.mark.all),
    ],
)
def test_multi_token_attention(shape, taps, more, options, dtype, device):
    judged(some(shape, taps, device=device, **more), dtype, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "taps", "more", "options"),
    [
        ((2, 8, 1000), (6, 11), {}, PAPERS),
        ((2, 8, 512), (6, 11), {}, {"padding": (5, 5), "dilation": (1, 3)}),
        ((2, 4, 1024), (3, 3), {"groups": 1}, {"padding": 1}),
        ((2, 16, 515), (1, 1), {"groups": 2}, {}),
        ((1, 16, 256), (3, 3), {"groups": 1}, {"padding": 1}),  # PyTorch's convolution in all dtypes
    ],
)
def test_multi_token_attention_of_real_sizes(shape, taps, more, options, dtype, sparse, device):
    judged(some(shape, taps, device=device, **more), dtype, sparse=sparse, **options)


@pytest.mark.parametrize("dtype", FEW[1:])
@pytest.mark.parametrize(
    ("taps", "more", "options"),
    [
        ((3, 3), {}, {"padding": 1}),
        ((3, 4), {"groups": 1}, {"padding": (0, 3), "dilation": (2, 5)}),
        ((5, 1), {}, {"padding": (6, 2)}),  # more than the taps reach
    ],
)
@pytest.mark.usefixtures("small_tiles")
def test_several_tiles(taps, more, options, dtype, device):
    judged(some((1, 2, 21), taps, device=device, **more), dtype, **options)


@pytest.mark.usefixtures("small_tiles")
def test_tiles_all_of_which_lies_below_the_diagonal(device):
    judged(some((1, 1, 64), (3, 3), device=device), torch.bfloat16, padding=1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {"stride": (1, 3)}])
def test_a_stride_is_pytorchs(options, dtype, device):
    judged(some((1, 2, 21), (3, 3), device=device), dtype, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse(dtype, device):
    judged(some((1, 2, 21), (3, 3), device=device), dtype, padding=1, sparse=True)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.usefixtures("walked")
def test_rows_too_wide_for_a_tile_are_walked(sparse, device):
    for dtype in (torch.float32, torch.bfloat16):
        judged(some((1, 1, 18), (3, 3), device=device), dtype, padding=1, sparse=sparse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_the_papers_padding_no_query_sees_a_later_one(dtype, device):
    n = 12
    scores, weight, bias = (x.to(dtype) for x in some((1, 2, n), (3, 5), device=device))
    changed = scores.clone()
    changed[..., n // 2 :, :] += 1
    changed += torch.ones_like(changed).triu(1)
    ys = [multi_token_attention(x, weight, bias, padding=(2, 2), groups=2)[..., :n, :] for x in (scores, changed)]
    assert same_bits(ys[0][..., : n // 2, :], ys[1][..., : n // 2, :]) and not same_bits(*ys)
    expected = torch.zeros(1, 2, n, n, dtype=torch.float64, device=device)
    p = scores.double().masked_fill(torch.ones(n, n, device=device).triu(1).bool(), -math.inf).softmax(-1)
    for back in range(3):
        for side in range(5):
            # a query `back` before, a key two less `side` before
            moved = F.pad(p, (4, 4, 2, 0))[..., 2 - back : 2 - back + n, 2 + side : 2 + side + n]
            expected += weight[:, 0, 2 - back, side].double().view(1, 2, 1, 1) * moved
    expected = (expected + bias.double().view(1, 2, 1, 1)).tril()
    assert (ys[0] - expected).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen(frozen, dtype, device):
    judged(some((1, 2, 9), (3, 3), device=device), dtype, padding=1, frozen=frozen)


def test_without_bias(device):
    scores, weight, _ = some((1, 2, 9), (3, 3), device=device)
    for dtype in (torch.float32, torch.bfloat16):
        judged([scores, weight, None], dtype, padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_empty_batch(dtype, device):
    judged(some((0, 2, 9), (3, 3), device=device), dtype, padding=1)


def test_strided_tensors(device):
    scores, weight, bias = (x.bfloat16() for x in some((2, 3, 9), (3, 5), device=device))
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (scores, weight)]
    judged([*turned, bias], torch.bfloat16, padding=1)
    # what lies between a bias's elements is no bias
    apart = torch.full((2 * len(bias),), float("nan"), dtype=bias.dtype, device=device)[::2].copy_(bias)
    judged([scores, weight, apart], torch.bfloat16, padding=1)
    leaf = scores.requires_grad_()
    y = multi_token_attention(leaf, weight, bias, groups=3)
    dy = torch.ones((), dtype=y.dtype, device=device).expand_as(y)
    (first,) = torch.autograd.grad(y, leaf, dy, retain_graph=True)
    assert same_bits(first, torch.autograd.grad(y, leaf, dy.contiguous())[0])


def test_what_lies_above_the_diagonal_does_not_matter(device):
    scores, weight, bias = (x.bfloat16() for x in some((1, 2, 21), (3, 3), device=device))
    spoilt = scores.masked_fill(torch.ones(21, 21, device=device).triu(1).bool(), math.nan)
    results = []
    for x in (scores, spoilt):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_(), bias.clone().requires_grad_()]
        with nan_filled():
            y = multi_token_attention(*leaves, padding=1, groups=2)
            # neither does that of the gradient
            dy = torch.where(torch.ones(21, 21, device=device).tril().bool(), y.detach(), x)
            results.append([y, *torch.autograd.grad(y, leaves, dy)])
    assert all(same_bits(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("way", ["whole", "walked"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_row_of_nan_has_no_gradient_above_the_diagonal(sparse, way, device, request):
    if way == "walked":
        request.getfixturevalue("walked")
    scores, weight, bias = (x.float() for x in some((1, 2, 41), (3, 3), device=device))
    scores[0, 1, 7, 3] = math.nan
    for function in (multi_token_attention, multi_token_attention_reference):
        leaf = scores.clone().requires_grad_()
        (ds,) = torch.autograd.grad(function(leaf, weight, bias, padding=1, groups=2, sparse=sparse).sum(), leaf)
        assert ds[0, 1, 7, :8].isnan().all() and not ds.triu(1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_dtype(dtype, device):
    inputs = [x.to(dtype).requires_grad_() for x in some((1, 2, 21), (3, 3), device=device)]
    inputs[1:] = [x.detach().float().requires_grad_() for x in inputs[1:]]
    with torch.autocast(device.type, torch.bfloat16):
        y, wanted = (f(*inputs, padding=1, groups=2) for f in (multi_token_attention, multi_token_attention_reference))
    assert y.dtype == wanted.dtype == torch.bfloat16
    results = [[y, *torch.autograd.grad(y, inputs, y.detach())] for y in (y, wanted)]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_which_convolutions_are_our_own():
    x = torch.empty(1, dtype=torch.bfloat16)
    mine, both = (1, 1), (3, 3)
    assert fits(Window(*mine, 6, 11, (1, 1), (5, 5)), x)
    assert fits(Window(4, 4, *both, (1, 1), (1, 1)), x)
    assert not fits(Window(*mine, 6, 11, (1, 1), (5, 5)), x.float())
    # many channels, of x or of y, and a window wide by its dilation
    assert not fits(Window(1, 64, *both, (1, 1), (1, 1)), x)
    assert not fits(Window(64, 1, *both, (1, 1), (1, 1)), x)
    assert not fits(Window(*mine, 6, 11, (1, 64), (5, 5)), x)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    n, heads = 32784, 3
    scores = torch.randn(1, heads, n, n, device=device, dtype=torch.bfloat16).requires_grad_()
    weight, bias = (x.to(device, torch.bfloat16) for x in some((1, heads, 1), (3, 3), device=device)[1:])
    y = multi_token_attention(scores, weight, bias, padding=1, groups=heads)
    dy = torch.zeros_like(y)
    dy[..., -2:, :] = torch.randn(1, heads, 2, n, device=device)
    (dscores,) = torch.autograd.grad(y, scores, dy)
    # the last rows of the last head, from the four last rows of scores
    tail = scores.detach()[:, -1:, -4:].double().requires_grad_()
    later = torch.ones(n, n, device=device, dtype=torch.bool).triu(1)[-4:]
    p = tail.masked_fill(later, -math.inf).softmax(-1)
    exact = F.conv2d(p, weight[-1:].double(), bias[-1:].double(), padding=1).masked_fill(later, 0.0)
    (dexact,) = torch.autograd.grad(exact, tail, dy[:, -1:, -4:].double())
    assert (y[:, -1:, -2:] - exact[:, :, -2:]).norm() < 1e-2 * exact[:, :, -2:].norm()
    assert (dscores[:, -1:, -2:] - dexact[:, :, -2:]).norm() < 2e-2 * dexact[:, :, -2:].norm()


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    judged(some((1, 2, 21), (3, 3), device=torch.device("cuda", 1)), torch.bfloat16, padding=1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_to_one_graph(dtype, device):
    def call(*inputs):
        return multi_token_attention(*inputs, padding=1, groups=2) * 2

    leaves = [x.to(dtype).requires_grad_() for x in some((1, 2, 65), (3, 3), device=device)]
    got, wanted = torch.compile(call, fullgraph=True)(*leaves), call(*leaves)
    results = [[y, *torch.autograd.grad(y, leaves, torch.ones_like(y))] for y in (got, wanted)]
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)


def test_errors_name_the_argument(device):
    scores, weight, bias = (x.float() for x in some((1, 4, 9), (3, 3), groups=2, device=device))
    with pytest.raises(ValueError, match=r"multi_token_attention: scores \(4, 9, 9\) must be \[batch, heads, tokens"):
        multi_token_attention(scores[0], weight, groups=2)
    with pytest.raises(ValueError, match=r"scores \(1, 4, 8, 9\) must be"):
        multi_token_attention(scores[:, :, :8], weight, groups=2)
    with pytest.raises(ValueError, match=r"weight \(4, 2, 3, 3\) must be .* with 4 heads and 1 groups"):
        multi_token_attention(scores, weight)
    with pytest.raises(ValueError, match=r"weight \(3, 2, 3, 3\) must be"):
        multi_token_attention(scores, weight[:3], groups=2)
    with pytest.raises(ValueError, match=r"bias \(3,\) must be one value per head of the result, 4"):
        multi_token_attention(scores, weight, bias[:3], groups=2)
    with pytest.raises(ValueError, match=r"stride is \(0, 0\), dilation \(1, 1\), groups 2 and padding \(0, 0\)"):
        multi_token_attention(scores, weight, stride=0, groups=2)
    with pytest.raises(ValueError, match=r"padding \(-1, 0\); they must be 1 or more, and 0 or more"):
        multi_token_attention(scores, weight, padding=(-1, 0), groups=2)
    with pytest.raises(
        ValueError, match=r"9 tokens with a padding of \(0, 0\) are fewer than \(3, 3\) taps with a dil"
    ):
        multi_token_attention(scores, weight, dilation=5, groups=2)
    for wrong in ("same", (1, 2, 3), (1.5, 1)):
        with pytest.raises(ValueError, match="padding is .*; it must be a whole number, or two"):
            multi_token_attention(scores, weight, padding=wrong, groups=2)
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16, scores torch.float32; without autocast they must"):
        multi_token_attention(scores, weight.bfloat16(), groups=2)
    with pytest.raises(ValueError, match="scores is torch.float64; kernels exist for"):
        multi_token_attention(scores.double(), weight.double(), groups=2)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    inputs = [x.float() for x in some((1, 2, 9), (3, 3), device=torch.device("cpu"))]
    assert torch.equal(multi_token_attention(*inputs, groups=2), multi_token_attention_reference(*inputs, groups=2))
