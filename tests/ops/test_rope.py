"""rope: every layout and pairing against fp64, and against the code that HuggingFace models bring."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accuracy import as_accurate, randn, same_bits
from torch import Tensor

import ds_fused.ops.registry as registry
from ds_fused.ops.common._heads import is_swapped
from ds_fused.ops.rotary.rope import rope, rope_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = registry.op("rope").module


def angles(batch: int, tokens: int, r: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin as HuggingFace makes them: both halves alike."""
    angle = randn(batch, tokens, r // 2, device=device) * 3
    return torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()


def inputs_of(
    batch: int, q_heads: int, k_heads: int, tokens: int, d: int, r: int, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    """q and k as a projection leaves them: [B, T, H, D] seen as [B, H, T, D]."""
    q = randn(batch, tokens, q_heads, d, device=device, seed=1).to(dtype).transpose(1, 2)
    k = randn(batch, tokens, k_heads, d, device=device, seed=2).to(dtype).transpose(1, 2)
    return [q, k, *(x.to(dtype) for x in angles(batch, tokens, r, device))]


def judge(inputs: list[Tensor], dtype: torch.dtype, **options: object) -> None:
    as_accurate(rope, rope_reference, inputs, dtype, frozen=(2, 3), **options)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 2, 2),  # the least
        (2, 3, 1, 5, 8, 8),  # odd heads and tokens
        (2, 4, 2, 3, 41, 40),  # an odd head: one column passes through
        (1, 2, 2, 3, 20, 6),  # partial; no power of two anywhere
    ],
)
def test_rope(sizes, dtype, interleaved, device):
    judge(inputs_of(*sizes, device, dtype), dtype, interleaved=interleaved)


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 32, 8, 1025, 128, 128),  # Llama-3-8B
        (1, 8, 4, 513, 256, 256),  # Gemma3
        (1, 32, 2, 513, 128, 64),  # GLM-4: half of a head
        (1, 32, 32, 513, 96, 96),  # Phi-3-mini: no power of two
    ],
)
def test_rope_of_real_sizes(sizes, dtype, interleaved, device):
    judge(inputs_of(*sizes, device, dtype), dtype, interleaved=interleaved)


def test_heads_beyond_one_tile(device, monkeypatch):
    monkeypatch.setattr(FILE, "TILE_PAIRS", 8)  # 2 heads of 4 pairs at a time
    judge(inputs_of(1, 5, 3, 2, 8, 8, device, torch.float32), torch.float32)


@pytest.mark.parametrize("interleaved", [False, True])
def test_halves_of_cos_may_differ(interleaved, device):
    # no model has them so, yet forward and backward must agree on what is computed
    q, k, *_ = inputs_of(1, 2, 1, 3, 8, 6, device, torch.float32)
    cos, sin = (randn(1, 3, 6, device=device, seed=seed) for seed in (3, 4))
    judge([q, k, cos, sin], torch.float32, interleaved=interleaved)


def test_a_batch_shares_angles(device):
    q, k, *_ = inputs_of(3, 2, 1, 4, 8, 8, device, torch.bfloat16)
    judge([q, k, *angles(1, 4, 8, device)], torch.bfloat16)


def test_heads_behind_tokens(device):
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 8, 8, device, torch.bfloat16)
    judge([q.transpose(1, 2), k.transpose(1, 2), cos, sin], torch.bfloat16, unsqueeze_dim=2)


def test_any_strides(device):
    packed = randn(2, 5, 6 * 8, device=device).bfloat16()  # a packed projection: q, k and v side by side
    q, k = packed[..., :32].view(2, 5, 4, 8).transpose(1, 2), packed[..., 32:40].view(2, 5, 1, 8).transpose(1, 2)
    cos, sin = (x.bfloat16() for x in angles(2, 5, 8, device))
    judge([q, k, cos, sin], torch.bfloat16)
    judge([q.contiguous(), k, cos, sin], torch.bfloat16)
    columns_apart = randn(2, 4, 8, 5, device=device).bfloat16().transpose(2, 3)
    judge([columns_apart, k, cos, sin], torch.bfloat16)
    other_strides = randn(5, 2, 8, device=device).bfloat16().transpose(0, 1)
    judge([q, k, cos, other_strides], torch.bfloat16)
    windows = randn(2, 4, 12, device=device).bfloat16().unfold(2, 8, 1)
    judge([windows, k, cos, sin], torch.bfloat16)


def test_layouts_are_kept(device):
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 8, 8, device, torch.float32)
    q.requires_grad_(), k.requires_grad_()
    yq, yk = rope(q, k, cos, sin)
    assert yq.transpose(1, 2).is_contiguous()
    # attention may hand back another layout
    torch.autograd.backward([yq, yk], [yq.detach().contiguous(), yk.detach().contiguous()])
    assert q.grad.transpose(1, 2).is_contiguous()


def test_gradients_lie_as_q_and_k_did(device):
    *most, cos, sin = inputs_of(2, 3, 2, 5, 8, 8, device, torch.bfloat16)
    upright = [x.contiguous() for x in most]
    gaps = [torch.cat((x, x), -1)[..., :8] for x in most]
    # what attention may hand back: as it got them, as it likes, with gaps, columns apart
    layouts = (
        lambda dy: dy,
        torch.Tensor.contiguous,
        lambda dy: torch.cat((dy, dy), -1)[..., :8],
        lambda dy: dy.mT.contiguous().mT,
    )
    for given, angle_dtype in ((most, cos.dtype), (upright, cos.dtype), (gaps, cos.dtype), (most, torch.float32)):
        leaves = [x.detach().requires_grad_() for x in given]
        ys = rope(*leaves, cos.to(angle_dtype), sin.to(angle_dtype))
        several = [
            torch.autograd.grad(ys, leaves, [layout(x.to(y.dtype)) for x, y in zip(most, ys, strict=True)], True)
            for layout in layouts
        ]
        for gradients in several:
            for dx, x, first in zip(gradients, leaves, several[0], strict=True):
                assert dx.dtype == x.dtype and dx.stride() == torch.empty_like(x).stride() and same_bits(dx, first)


def test_angles_in_fp32_promote(device):
    q, k, *_ = inputs_of(1, 2, 1, 3, 8, 8, device, torch.bfloat16)
    judge([q, k, *(x.float() for x in angles(1, 3, 8, device))], torch.float32)


def test_only_one_of_both_is_used(device):
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 8, 8, device, torch.float32)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    (dq,) = torch.autograd.grad(rope(q, k, cos, sin)[0].sum(), q)
    (wanted,) = torch.autograd.grad(rope_reference(q, k, cos, sin)[0].sum(), q)
    assert torch.allclose(dq, wanted)


def frequencies(batch: int, tokens: int, r: int, device: torch.device) -> Tensor:
    """cos + i sin of each pair, as Llama-4's freqs_cis."""
    angle = (randn(batch, tokens, r // 2, device=device) * 3).float()
    return torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 2, 2), (2, 3, 1, 5, 9, 6)])  # the least; odd, partial
def test_complex_angles(sizes, dtype, device):
    q, k, *_ = inputs_of(*sizes, device, dtype)
    freqs = frequencies(sizes[0], sizes[3], sizes[5], device)
    judge([q, k, freqs, None], dtype, interleaved=True, keep_dtype=True)
    judge([q.transpose(1, 2), k.transpose(1, 2), freqs[:1], None], dtype, interleaved=True, unsqueeze_dim=2)


def test_angles_with_a_gradient_are_refused_after_a_call_without(device):
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 4, 4, device, torch.float32)
    cos.requires_grad_()
    for _ in range(2):
        with torch.no_grad():
            rope(q, k, cos, sin)
        with pytest.raises(ValueError, match="cos and sin get no gradient"):
            rope(q, k, cos, sin)


def test_complex_angles_of_halves_and_conjugates(device):
    q, k, *_ = inputs_of(2, 3, 1, 5, 9, 6, device, torch.float32)
    freqs = frequencies(2, 5, 6, device)
    judge([q, k, freqs, None], torch.float32)
    there = rope(q, k, freqs)
    for got, wanted in zip(rope(*there, freqs.conj()), (q, k), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)
    # of a longer table, which lie as their conjugates don't
    freqs = frequencies(2, 7, 6, device)[:, :5]
    for angles in (freqs, freqs.conj(), freqs):
        for got, wanted in zip(rope(q, k, angles), rope_reference(q, k, angles), strict=True):
            assert torch.allclose(got, wanted, atol=1e-6)


def test_calls_that_differ_are_told_apart(device):
    """What is kept of one is for those that lie alike: tokens, heads, layouts, dtypes, angles and options in turn."""
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 8, 8, device, torch.float32)
    upright = q.contiguous(), k.contiguous()
    gaps = torch.cat((q, q), -1)[..., :8], k
    rows = q.transpose(1, 2), k.transpose(1, 2)
    calls = [
        *(((q, k, cos, sin), options) for options in ({}, {"interleaved": True}, {"keep_dtype": True})),
        ((*upright, cos, sin), {}),
        ((*gaps, cos, sin), {}),
        ((*rows, cos, sin), {"unsqueeze_dim": 2}),
        ((q[..., ::1, :].bfloat16(), k, cos, sin), {}),
        ((q[:, :, :4], k[:, :, :4], cos[:, :4], sin[:, :4]), {}),
        ((q, k, cos[..., :6], sin[..., :6]), {}),
        ((q, k, cos[:1], sin[:1]), {}),
        ((q, k, cos[0], sin[0]), {}),
        ((q, k, cos, sin.bfloat16()), {}),
        ((q[0], k[0], cos[0], sin[0]), {}),
    ]
    for _ in range(2):
        for inputs, options in calls:
            results = []
            for f in (rope, rope_reference):
                leaves = [x.detach().clone(memory_format=torch.preserve_format) for x in inputs[:2]]
                ys = f(*(x.requires_grad_() for x in leaves), *inputs[2:], **options)
                results.append([*ys, *torch.autograd.grad(sum((y.float() ** 2).sum() for y in ys), leaves)])
            for got, wanted in zip(*results, strict=True):
                assert got.dtype == wanted.dtype and torch.allclose(got, wanted, rtol=1e-2, atol=1e-2)


SECTIONS = [
    ((2, 3, 3), False),
    ((5, 0, 3), False),
    ((4, 2, 2), True),
    ((2, 3, 3), True),
    ((8, 0, 0), True),
]


@pytest.mark.parametrize("sections, alternating", SECTIONS)
def test_sections(sections, alternating, device):
    r = 2 * sum(sections)
    for dtype, batch, interleaved in ((torch.bfloat16, 2, False), (torch.float16, 1, True)):
        q, k, *_ = inputs_of(2, 3, 1, 3, r + 1, r, device, dtype)
        three = [x.to(dtype).view(3, batch, 3, r) for x in angles(3 * batch, 3, r, device)]
        judge([q, k, *three], dtype, interleaved=interleaved, sections=sections, alternating=alternating)


def test_sections_of_complex_angles(device):
    q, k, *_ = inputs_of(2, 3, 1, 3, 17, 16, device, torch.float32)
    freqs = frequencies(3, 3, 16, device).view(3, 1, 3, -1)
    for sections, alternating in SECTIONS:
        judge([q, k, freqs, None], torch.float32, sections=sections, alternating=alternating)


def test_angles_in_fp32_may_leave_the_dtype_alone(device):
    for dtype in DTYPES:
        q, k, *_ = inputs_of(1, 2, 1, 3, 8, 8, device, dtype)
        judge([q, k, *(x.float() for x in angles(1, 3, 8, device))], dtype, keep_dtype=True)


def test_sines_wider_than_cosines(device):
    *most, sin = inputs_of(1, 2, 1, 3, 8, 8, device, torch.bfloat16)
    judge([*most, sin.float()], torch.bfloat16)


def test_without_a_batch(device):
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 8, 6, device, torch.bfloat16)
    judge([q, k, cos[0], sin[0]], torch.bfloat16)
    judge([q[0], k[0], cos[0], sin[0]], torch.bfloat16)
    by_token = [x[0].transpose(0, 1) for x in (q, k)]
    judge([*by_token, cos[0], sin[0]], torch.bfloat16, unsqueeze_dim=2)
    three = [x.expand(3, -1, -1) for x in (cos[0], sin[0])]
    judge([*by_token, *three], torch.bfloat16, unsqueeze_dim=2, sections=(1, 1, 1))


def overwriting(function):
    """An op that is free to write into what it is given, as one that must not."""
    return lambda q, k, *rest, **options: function(q * 1, k * 1, *rest, inplace=True, **options)


@pytest.mark.parametrize("dtype, interleaved", [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
def test_in_place(dtype, interleaved, device):
    inputs = inputs_of(2, 3, 1, 3, 11, 8, device, dtype)
    options = {"frozen": (2, 3), "interleaved": interleaved}
    as_accurate(overwriting(rope), overwriting(rope_reference), inputs, dtype, **options)
    by_token = [x.transpose(1, 2) for x in inputs[:2]]
    as_accurate(overwriting(rope), rope_reference, [*by_token, *inputs[2:]], dtype, unsqueeze_dim=2, **options)
    freqs = frequencies(2, 3, 8, device)
    as_accurate(overwriting(rope), overwriting(rope_reference), [*inputs[:2], freqs, None], dtype, **options)


def test_in_place_on_the_views_that_models_have(device):
    x, weight = (randn(*shape, device=device).float().requires_grad_() for shape in ((2, 5, 6), (40, 6)))
    cos, sin = (x.float() for x in angles(1, 5, 8, device))

    def heads(inplace: bool) -> tuple[Tensor, ...]:
        q, k = (y.view(2, 5, -1, 8).transpose(1, 2) for y in torch.nn.functional.linear(x, weight).split((32, 8), -1))
        memory = q.data_ptr(), k.data_ptr()
        yq, yk = rope(q, k, cos, sin, inplace=inplace)
        assert ((yq.data_ptr(), yk.data_ptr()) == memory) == inplace
        return (yq, yk, *torch.autograd.grad((yq.square().sum() + yk.pow(3).sum()), (x, weight)))

    for got, wanted in zip(heads(True), heads(False), strict=True):
        assert torch.equal(got, wanted)


def test_in_place_over_what_somebody_saved_is_an_error(device):
    x = randn(1, 2, 3, 8, device=device).float().requires_grad_()
    cos, sin = (x.float() for x in angles(1, 3, 8, device))
    yq, yk = rope(x.tanh(), x * 1, cos, sin, inplace=True)  # the derivative of tanh is made of its output
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (yq.sum() + yk.sum()).backward()
    plain = x.detach()
    for q in (x, x.transpose(2, 3).mT):
        with pytest.raises(ValueError, match="would overwrite q, a leaf that requires a gradient or its view"):
            rope(q, x * 1, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="elements of k share memory"):
        rope(plain, plain[:, :1].expand(-1, 4, -1, -1), cos, sin, inplace=True)
    with pytest.raises(ValueError, match="the columns of q do not lie side by side"):
        rope(plain.mT.contiguous().mT, plain.clone(), cos, sin, inplace=True)
    with pytest.raises(ValueError, match="q and k share memory"):
        rope(plain, plain, cos, sin, inplace=True)


def turned_back(inputs: list[Tensor], dys: list[Tensor], **options: object) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of q and k for upstream gradients that are copies, and the copies."""
    q, k = (x.detach().requires_grad_() for x in inputs[:2])
    dys = [dy.clone() for dy in dys]
    return list(torch.autograd.grad(rope(q, k, *inputs[2:], **options), (q, k), dys)), dys


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes, options",
    [
        ((2, 3, 1, 5, 8, 8), {}),
        ((2, 3, 1, 5, 8, 8), {"unsqueeze_dim": 2}),
        ((1, 2, 2, 3, 20, 6), {}),  # partial; no power of two anywhere
        ((2, 4, 2, 3, 41, 40), {"interleaved": True}),
        ((2, 3, 1, 5, 8, 8), {"sections": (2, 1, 1)}),
        pytest.param((2, 32, 8, 1025, 128, 128), {}, marks=pytest.mark.gpu),
        pytest.param((1, 32, 2, 513, 128, 64), {"interleaved": True}, marks=pytest.mark.gpu),
    ],
)
def test_gradients_may_overwrite_those_of_the_results(sizes, options, dtype, device):
    q, k, cos, sin = inputs_of(*sizes, device, dtype)
    dys = [randn(*x.transpose(1, 2).shape, device=device, seed=9).to(dtype).transpose(1, 2) for x in (q, k)]
    if options.get("unsqueeze_dim") == 2:
        q, k, *dys = (x.transpose(1, 2) for x in (q, k, *dys))
    if "sections" in options:
        cos, sin = (x.expand(3, *x.shape) * torch.ones(3, 1, 1, 1, device=device, dtype=dtype) for x in (cos, sin))
    inputs = [q, k, cos, sin]
    wanted, kept = turned_back(inputs, dys, **options)
    got, lent = turned_back(inputs, dys, overwrite_grad=True, **options)
    for dx, plain, dy, other, before in zip(got, wanted, lent, kept, dys, strict=True):
        assert same_bits(dx, plain) and same_bits(other, before)
        assert dx.data_ptr() == dy.data_ptr() and is_swapped(dx) == is_swapped(plain)


def test_gradients_overwrite_nothing_that_they_do_not_fit(device):
    q, k, cos, sin = inputs_of(2, 3, 3, 5, 8, 6, device, torch.bfloat16)

    def upstream() -> list[Tensor]:
        return [randn(2, 5, 3, 8, device=device, seed=seed).bfloat16().transpose(1, 2) for seed in (8, 9)]

    plain, _ = turned_back([q, k, cos, sin], upstream())
    for place, other_layout in (
        (0, torch.Tensor.contiguous),  # q's is [B, T, H, D]
        (1, torch.Tensor.contiguous),
        (0, lambda dy: dy.mT.contiguous().mT),  # columns apart
        (1, lambda dy: torch.cat((dy, dy), -1)[..., :8]),  # gaps
    ):
        given = upstream()
        given[place] = other_layout(given[place])
        leaves = [x.detach().requires_grad_() for x in (q, k)]
        got = torch.autograd.grad(rope(*leaves, cos, sin, overwrite_grad=True), leaves, given)
        assert all(same_bits(a, b) for a, b in zip(got, plain, strict=True))
        assert same_bits(given[place], upstream()[place]) and got[place].data_ptr() != given[place].data_ptr()
        assert got[1 - place].data_ptr() == given[1 - place].data_ptr()
    # the sum of both results hands one tensor to both
    dyq, dyk = upstream()
    wanted, _ = turned_back([q, k, cos, sin], [dyq, dyq])
    leaves = [x.detach().requires_grad_() for x in (q, k)]
    yq, yk = rope(*leaves, cos, sin, overwrite_grad=True)
    for dx, exact in zip(torch.autograd.grad(yq + yk, leaves, dyq), wanted, strict=True):
        assert same_bits(dx, exact)
    # results of another dtype than q and k
    given = [x.float() for x in (dyq, dyk)]
    got, lent = turned_back([q, k, cos.float(), sin.float()], given, overwrite_grad=True)
    assert all(same_bits(a, b) for a, b in zip(lent, given, strict=True))
    assert [dx.dtype for dx in got] == [torch.bfloat16] * 2


def test_one_gradient_may_be_overwritten_where_the_other_is_not_wanted(device):
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 11, 8, device, torch.float32)
    for place in (0, 1):
        given = [q, k]
        given[place] = leaf = given[place].detach().requires_grad_()
        dy = torch.empty_like(leaf).copy_(leaf.detach())
        (dx,) = torch.autograd.grad(rope(*given, cos, sin, overwrite_grad=True)[place], leaf, dy)
        (wanted,) = torch.autograd.grad(rope(*given, cos, sin)[place], leaf, leaf.detach())
        assert same_bits(dx, wanted) and dx.data_ptr() == dy.data_ptr()


def test_a_second_backward_over_overwritten_gradients(device):
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 8, 8, device, torch.float32)
    q.requires_grad_(), k.requires_grad_()
    losses = [sum(y.pow(3).sum() for y in rope(q, k, cos, sin, overwrite_grad=o)) for o in (True, False)]
    wanted = torch.autograd.grad(losses[1], (q, k))
    for _ in range(2):
        got = torch.autograd.grad(losses[0], (q, k), retain_graph=True)
        assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))


def test_one_of_both_is_frozen(device):
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 11, 8, device, torch.float32)
    for place in (0, 1):
        for inplace in (False, True):
            leaf = (q, k)[place].clone().requires_grad_()
            given = [q * 1, k * 1]
            given[place] = leaf * 1
            ys = rope(*given, cos, sin, inplace=inplace)
            assert [y.requires_grad for y in ys] == [place == 0, place == 1]
            (got,) = torch.autograd.grad(ys[place], leaf, leaf.detach())
            wanted = rope_reference(*((leaf, k) if place == 0 else (q, leaf)), cos, sin)[place]
            assert torch.allclose(got, torch.autograd.grad(wanted, leaf, leaf.detach())[0], atol=1e-6)


def test_vision_towers_and_llama_4_turn_the_same(device):
    qwen = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    q, k, cos, sin = inputs_of(1, 3, 3, 5, 8, 8, device, torch.bfloat16)
    q, k, cos, sin = q[0].transpose(0, 1), k[0].transpose(0, 1), cos[0].float(), sin[0].float()
    same(rope(q, k, cos, sin, unsqueeze_dim=2, keep_dtype=True), qwen.apply_rotary_pos_emb_vision(q, k, cos, sin))

    llama4 = pytest.importorskip("transformers.models.llama4.modeling_llama4")
    q, k, *_ = (x.transpose(1, 2) for x in inputs_of(2, 3, 1, 5, 8, 8, device, torch.bfloat16))
    freqs = frequencies(2, 5, 8, device)
    ours = rope(q, k, freqs, interleaved=True, unsqueeze_dim=2, keep_dtype=True)
    same(ours, llama4.apply_rotary_emb(q, k, freqs))
    freqs = frequencies(5, 1, 8, device)
    ours = rope(q, q * 2, freqs.view(5, -1), interleaved=True, unsqueeze_dim=2, keep_dtype=True)
    same(ours, llama4.vision_apply_rotary_emb(q, q * 2, freqs))


@pytest.mark.parametrize("family, alternating", [("qwen2_5_vl", False), ("qwen3_vl", True)])
def test_multimodal_models_turn_the_same(family, alternating, device):
    file = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(
        file, {"qwen2_5_vl": "Qwen2_5_VLRotaryEmbedding", "qwen3_vl": "Qwen3VLTextRotaryEmbedding"}[family]
    )
    layer = SimpleNamespace(mrope_section=[4, 2, 2])
    angle = randn(3, 2, 5, 8, device=device).float()
    q, k, *_ = inputs_of(2, 3, 1, 5, 16, 16, device, torch.float32)
    cos, sin = (rotary.recomposition_frequencies(layer, x.clone()) for x in (angle.cos(), angle.sin()))
    three = [torch.cat((x, x), -1) for x in (angle.cos(), angle.sin())]
    same(rope(q, k, *three, sections=[4, 2, 2], alternating=alternating), file.apply_rotary_pos_emb(q, k, cos, sin))


def same(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> None:
    for got, wanted in zip(ours, theirs, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.allclose(got.float(), wanted.float(), atol=1e-6, rtol=2 * torch.finfo(got.dtype).eps)


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)])
def test_empty(shape, device):
    cos = randn(shape[0], shape[2], 8, device=device)
    judge([randn(*shape, device=device), randn(*shape, device=device), cos, cos], torch.float32)


def test_backward_undoes_forward(device):
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 8, 8, device, torch.float32)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    yq, yk = rope(q, k, cos, sin)
    dq, dk = torch.autograd.grad([yq, yk], [q, k], [yq.detach(), yk.detach()])
    assert torch.allclose(dq, q, atol=1e-6) and torch.allclose(dk, k, atol=1e-6)


def test_llama_and_glm_turn_the_same(device):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama").apply_rotary_pos_emb
    glm = pytest.importorskip("transformers.models.glm.modeling_glm").apply_rotary_pos_emb
    for stock, d, r, interleaved in ((llama, 8, 8, False), (glm, 12, 8, True)):
        inputs = inputs_of(2, 3, 1, 5, d, r, device, torch.float32)
        for got, wanted in zip(rope(*inputs, interleaved=interleaved), stock(*inputs), strict=True):
            assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    tokens, heads, d = 2**19 + 1, 32, 128  # q: 2^31 + 2^12 elements, 4 GiB
    q = torch.randn(1, tokens, heads, d, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
    k = torch.randn(1, tokens, 1, d, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
    cos, sin = (x.bfloat16() for x in angles(1, tokens, d, device))
    yq, yk = rope(q, k, cos, sin)
    torch.autograd.backward([yq, yk], [q.detach(), k.detach()])
    tail_q, tail_k = (x.detach()[:, :, -3:].clone().requires_grad_() for x in (q, k))
    tails = rope(tail_q, tail_k, cos[:, -3:], sin[:, -3:])
    torch.autograd.backward(tails, [tail_q.detach(), tail_k.detach()])
    assert same_bits(yq[:, :, -3:].detach(), tails[0].detach())
    assert same_bits(yk[:, :, -3:].detach(), tails[1].detach())
    assert same_bits(q.grad[:, :, -3:], tail_q.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_forms_of_real_sizes(dtype, device):
    q, k, *_ = inputs_of(1, 32, 8, 1025, 128, 128, device, dtype)
    judge([q, k, frequencies(1, 1025, 128, device), None], dtype, interleaved=True, keep_dtype=True)  # Llama-4
    three = [x.to(dtype).view(3, 1, 1025, 128) for x in angles(3, 1025, 128, device)]
    judge([q, k, *three], dtype, sections=(16, 24, 24))  # Qwen2-VL
    judge([q, k, *three], dtype, sections=(24, 20, 20), alternating=True)  # Qwen3-VL
    for interleaved in (False, True):
        cos, sin = (x.to(dtype) for x in angles(1, 1025, 96, device))
        given = [x.clone() for x in (q, k)]
        in_place = rope(*given, cos, sin, interleaved=interleaved, inplace=True)
        for got, wanted in zip(in_place, rope(q, k, cos, sin, interleaved=interleaved), strict=True):
            assert same_bits(got, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_compiles_to_one_graph(unsqueeze_dim, device):
    q, k, cos, sin = inputs_of(2, 4, 2, 65, 64, 48, device, torch.bfloat16)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    q.requires_grad_(), k.requires_grad_()
    compiled = torch.compile(lambda *x: [y * 2 for y in rope(*x, unsqueeze_dim=unsqueeze_dim)], fullgraph=True)
    got = compiled(q, k, cos, sin)
    wanted = [y * 2 for y in rope(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)]
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    grads = [torch.autograd.grad([y.sum() for y in ys], (q, k)) for ys in (got, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.gpu
def test_forms_compile_to_one_graph(device):
    q, k, *three = inputs_of(2, 4, 2, 65, 64, 64, device, torch.bfloat16)
    three = [x.expand(3, *x.shape) for x in three]
    freqs = frequencies(2, 65, 64, device)
    q.requires_grad_(), k.requires_grad_()
    for call, angles_ in (
        (lambda *x: rope(*x, sections=(8, 12, 12)), three),
        (lambda *x: rope(*x, interleaved=True, keep_dtype=True), [freqs]),
        (lambda q, k, *x: rope(q * 2, k * 2, *x, interleaved=True, inplace=True), [freqs]),
    ):
        got, wanted = (f(q, k, *angles_) for f in (torch.compile(call, fullgraph=True), call))
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        grads = [torch.autograd.grad([y.sum() for y in ys], (q, k)) for ys in (got, wanted)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_errors_name_the_argument(device):
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 8, 8, device, torch.float32)
    for wrong, message in (
        ((q, k[:1], cos, sin), r"may differ in their heads only .* k \(1, 1, 5, 8\)"),
        ((q, k, cos[:, :4], sin[:, :4]), r"cos must be \[2 or 1, 5, R\]"),
        ((q, k, cos, None), "sin is missing, and cos is torch.float32"),
        ((q, k, cos[..., :5], sin[..., :5]), "an even number of columns"),
        ((q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)), r"at most 8 \(a head\)"),
        ((q, k, cos, sin[..., :4]), r"cos must be \[B or 1, T, R\], and so must sin; got"),
        ((q, k, torch.complex(cos, sin), sin), "cos is torch.complex64, which holds the sine too"),
        ((q, k, torch.complex(cos, sin)), r"at most 4 \(half a head\)"),
        ((q[0], k[0], cos, sin), "must have 4 dimensions .3 without a batch."),
        ((q, k, cos.clone().requires_grad_(), sin), "get no gradient"),
        ((q.double(), k, cos, sin), "rope: q is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            rope(*wrong)
    with pytest.raises(ValueError, match="unsqueeze_dim is 3"):
        rope(q, k, cos, sin, unsqueeze_dim=3)
    with pytest.raises(ValueError, match="alternating is how sections mix"):
        rope(q, k, cos, sin, alternating=True)
    three = [x.expand(3, *x.shape) for x in (cos, sin)]
    for sections in ((1, 1, 1), (2, 2), (5, -1, 0)):
        with pytest.raises(ValueError, match=r"sections is .* time, height and width, 4 together"):
            rope(q, k, *three, sections=sections)
    with pytest.raises(ValueError, match=r"cos must be \[3, B or 1, T, R\]"):
        rope(q, k, cos, sin, sections=(2, 1, 1))
    # a head of 41, as if cos had been rounded up to whole pairs
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 41, 42, device, torch.float32)
    with pytest.raises(ValueError, match=r"at most 41 \(a head\); got .*cos \(1, 3, 42\)"):
        rope(q, k, cos, sin)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = inputs_of(2, 3, 1, 5, 8, 8, "cpu", torch.bfloat16)
    for got, wanted in zip(rope(*inputs), rope_reference(*inputs), strict=True):
        assert same_bits(got, wanted)
