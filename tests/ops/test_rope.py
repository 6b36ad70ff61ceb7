"""rope: every layout and pairing against fp64, and against the code that HuggingFace models bring."""

from __future__ import annotations

import pytest
import torch
from accuracy import as_accurate, randn, same_bits
from torch import Tensor

import ds_fused.ops.registry as registry
from ds_fused.ops.rope import rope, rope_reference

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


def test_layouts_are_kept(device):
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 8, 8, device, torch.float32)
    q.requires_grad_(), k.requires_grad_()
    yq, yk = rope(q, k, cos, sin)
    assert yq.transpose(1, 2).is_contiguous()
    # attention may hand back another layout
    torch.autograd.backward([yq, yk], [yq.detach().contiguous(), yk.detach().contiguous()])
    assert q.grad.transpose(1, 2).is_contiguous()


def test_angles_in_fp32_promote(device):
    q, k, *_ = inputs_of(1, 2, 1, 3, 8, 8, device, torch.bfloat16)
    judge([q, k, *(x.float() for x in angles(1, 3, 8, device))], torch.float32)


def test_only_one_of_both_is_used(device):
    q, k, cos, sin = inputs_of(1, 2, 1, 3, 8, 8, device, torch.float32)
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    (dq,) = torch.autograd.grad(rope(q, k, cos, sin)[0].sum(), q)
    (wanted,) = torch.autograd.grad(rope_reference(q, k, cos, sin)[0].sum(), q)
    assert torch.allclose(dq, wanted)


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


def test_errors_name_the_argument(device):
    q, k, cos, sin = inputs_of(2, 3, 1, 5, 8, 8, device, torch.float32)
    for wrong, message in (
        ((q[0], k[0], cos, sin), "must have 4 dimensions"),
        ((q, k[:1], cos, sin), r"may differ in their heads only .* k \(1, 1, 5, 8\)"),
        ((q, k, cos[:, :4], sin[:, :4]), r"cos must be \[2 or 1, 5, R\]"),
        ((q, k, cos[..., :5], sin[..., :5]), "an even number of columns"),
        ((q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)), r"at most 8 \(a head\)"),
        ((q, k, cos, sin[..., :4]), "cos and sin one shape"),
        ((q, k, cos.clone().requires_grad_(), sin), "get no gradient"),
        ((q.double(), k, cos, sin), "rope: q is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            rope(*wrong)
    with pytest.raises(ValueError, match="unsqueeze_dim is 3"):
        rope(q, k, cos, sin, unsqueeze_dim=3)


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = inputs_of(2, 3, 1, 5, 8, 8, "cpu", torch.bfloat16)
    for got, wanted in zip(rope(*inputs), rope_reference(*inputs), strict=True):
        assert same_bits(got, wanted)
