"""rms_norm_rope: as accurate as norm and rotation one after the other, in one launch each way."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from accuracy import as_accurate, randn, same_bits
from torch import Tensor

import ds_fused.ops.registry as registry
from ds_fused.ops.norms._norms import CASTS
from ds_fused.ops.norms.rms_norm import rms_norm
from ds_fused.ops.rotary.rms_norm_rope import rms_norm_rope, rms_norm_rope_reference
from ds_fused.ops.rotary.rope import rope

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILE = registry.op("rms_norm_rope").module
# Qwen3's norm, and Gemma 3's
FORMS = [{"cast": "before_weight"}, {"cast": "after_weight", "offset": 1.0}]


def angles(batch: int, tokens: int, r: int, device: torch.device) -> list[Tensor]:
    """cos and sin as HuggingFace makes them: both halves alike."""
    angle = randn(batch, tokens, r // 2, device=device) * 3
    return [torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()]


def inputs_of(
    batch: int, q_heads: int, k_heads: int, tokens: int, d: int, r: int, device: torch.device
) -> list[Tensor]:
    """q and k as a projection leaves them, [B, T, H, D] seen as [B, H, T, D]; weights; angles."""
    q, k = (
        randn(batch, tokens, heads, d, device=device, seed=i).transpose(1, 2)
        for i, heads in ((1, q_heads), (2, k_heads))
    )
    weights = [randn(d, device=device, seed=i) for i in (3, 4)]
    return [q, k, *weights, *angles(batch, tokens, r, device)]


def rounded(inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """In dtype, with strides as they are."""
    return [x.to(dtype) for x in inputs]


def judge(inputs: list[Tensor], dtype: torch.dtype, frozen: tuple[int, ...] = (), **options: object) -> None:
    as_accurate(rms_norm_rope, rms_norm_rope_reference, inputs, dtype, frozen=(4, 5, *frozen), **options)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 2, 2),  # the least
        (1, 3, 1, 3, 20, 6),  # odd heads and tokens; partial; no power of two anywhere
        pytest.param((2, 4, 2, 2, 8, 8), marks=pytest.mark.all),
        pytest.param((2, 4, 2, 3, 41, 40), marks=pytest.mark.all),  # an odd head: one column stays
    ],
)
def test_rms_norm_rope(sizes, dtype, form, device):
    # eps that counts: dx of few columns is a difference of equal terms otherwise
    judge(inputs_of(*sizes, device), dtype, eps=0.5, **form)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (2, 32, 8, 1025, 128, 128),  # Qwen3-8B
        (1, 16, 8, 513, 128, 128),  # Qwen3-0.6B
        (1, 8, 4, 513, 256, 256),  # Gemma3
        (1, 16, 2, 513, 256, 64),  # Qwen3-Next: a quarter of a head
        (1, 96, 8, 513, 128, 64),  # GLM-4.5
        (1, 3, 3, 513, 96, 96),  # no power of two
    ],
)
def test_rms_norm_rope_of_real_sizes(sizes, dtype, form, device):
    judge(rounded(inputs_of(*sizes, device), dtype), dtype, **form)


@pytest.mark.parametrize("cast, offset", list(product(CASTS, (0.0, 1.0))))
def test_every_form_of_a_norm(cast, offset, device):
    judge(inputs_of(1, 3, 2, 2, 12, 8, device), torch.bfloat16, cast=cast, offset=offset)


def test_is_what_the_two_ops_make(device):
    for dtype, form in product(DTYPES, FORMS):
        q, k, q_weight, k_weight, cos, sin = rounded(inputs_of(1, 3, 1, 2, 20, 16, device), dtype)
        fused = rms_norm_rope(q, k, q_weight, k_weight, cos, sin, **form)
        apart = rope(rms_norm(q, q_weight, **form), rms_norm(k, k_weight, **form), cos, sin)
        for got, wanted in zip(fused, apart, strict=True):
            # the mean of squares is added up in another order
            assert torch.allclose(got, wanted, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)


def test_heads_beyond_one_tile(device, monkeypatch):
    for name in ("TILE_FWD", "TILE_BWD"):
        monkeypatch.setattr(FILE, name, 32)  # 2 heads of 8 columns, 8 of them turned, and 5 that stay
    judge(inputs_of(1, 5, 3, 2, 13, 8, device), torch.float32)


def test_more_tokens_than_programs(device, monkeypatch):
    # of the persistent grid
    monkeypatch.setattr(FILE, "WARPS_PER_MULTIPROCESSOR", 16)
    judge(inputs_of(2, 2, 1, 3, 8, 6, device), torch.bfloat16)


@pytest.mark.parametrize("keep_dtype", [False, True])
@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize(
    "weight, angle",
    [(torch.float32, torch.float32), pytest.param(torch.float16, torch.bfloat16, marks=pytest.mark.all)],
)
def test_mixed_dtypes(weight, angle, cast, keep_dtype, device):
    # as under autocast, or where norms stay in fp32; the result is promoted where the norm's is
    dtypes = [torch.bfloat16] * 2 + [weight] * 2 + [angle] * 2
    inputs = [x.to(dtype) for x, dtype in zip(inputs_of(1, 2, 1, 2, 8, 8, device), dtypes, strict=True)]
    judge(inputs, torch.bfloat16, cast=cast, keep_dtype=keep_dtype)


def test_halves_of_cos_may_differ(device):
    # no model has them so, yet forward and backward must agree on what is computed
    inputs = inputs_of(1, 2, 1, 3, 8, 6, device)[:4]
    judge([*inputs, *(randn(1, 3, 6, device=device, seed=seed) for seed in (5, 6))], torch.float32)


def by_token(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return q.transpose(1, 2), k.transpose(1, 2)


def packed(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Parts of one projection."""
    both = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k)], -1)
    return tuple(x.unflatten(-1, (-1, 8)).transpose(1, 2) for x in both.split((q.shape[1] * 8, k.shape[1] * 8), -1))


@pytest.mark.parametrize(
    "lay, options",
    [
        (by_token, {"unsqueeze_dim": 2}),
        (packed, {}),
        (lambda q, k: (q.contiguous(), k), {}),  # heads in front
        (lambda q, k: (q.mT.contiguous().mT, k), {}),  # columns apart
        (lambda q, k: (q.flatten(2)[..., :9].contiguous().unfold(2, 8, 1), k), {}),  # windows that overlap
    ],
)
def test_layouts_of_q_and_k(lay, options, device):
    q, k, *rest = rounded(inputs_of(2, 4, 2, 2, 8, 8, device), torch.bfloat16)
    judge([*lay(q, k), *rest], torch.bfloat16, **options)


def test_layouts_of_weights_and_angles(device):
    q, k, *_, cos, sin = rounded(inputs_of(2, 3, 1, 2, 8, 8, device), torch.bfloat16)
    weights = randn(8, 2, device=device).bfloat16().unbind(1)
    judge([q, k, *weights, cos, sin.transpose(0, 1).contiguous().transpose(0, 1)], torch.bfloat16)
    # a batch that shares angles; without a dimension for it; no batch at all
    judge([q, k, *weights, cos[:1], sin[:1]], torch.bfloat16)
    judge([q, k, *weights, cos[0], sin[0]], torch.bfloat16)
    judge([q[0], k[0], *weights, cos[0], sin[0]], torch.bfloat16)


def test_layouts_are_kept(device):
    q, k, *rest = rounded(inputs_of(2, 3, 1, 5, 8, 8, device), torch.float32)
    q.requires_grad_(), k.requires_grad_()
    yq, yk = rms_norm_rope(q, k, *rest)
    assert yq.transpose(1, 2).is_contiguous()
    # attention may hand back another layout
    torch.autograd.backward([yq, yk], [yq.detach().contiguous(), yk.detach().contiguous()])
    assert q.grad.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("frozen", [(0,), (1,), (2, 3), (0, 1), (0, 2), (1, 3), (0, 1, 2)])
def test_frozen_inputs(frozen, device):
    # weights under LoRA; (0, 2): of yq no gradient is asked for, so that nothing differentiates it
    inputs = rounded(inputs_of(1, 3, 1, 2, 11, 8, device), torch.float32)
    leaves = [x if i in (*frozen, 4, 5) else x.clone().requires_grad_() for i, x in enumerate(inputs)]
    results = []
    for function in (rms_norm_rope, rms_norm_rope_reference):
        ys = function(*leaves)
        assert [y.requires_grad for y in ys] == [not {0, 2} <= set(frozen), not {1, 3} <= set(frozen)]
        total = sum(y.pow(3).sum() for y in ys if y.requires_grad)
        results.append(torch.autograd.grad(total, [x for x in leaves if x.requires_grad]))
    torch.testing.assert_close(*results)


def test_only_one_of_both_is_used(device):
    inputs = rounded(inputs_of(1, 2, 1, 3, 8, 8, device), torch.float32)
    leaves = [x.clone().requires_grad_() for x in inputs[:4]]
    grads = [
        torch.autograd.grad(function(*leaves, *inputs[4:])[0].square().sum(), leaves, allow_unused=True)
        for function in (rms_norm_rope, rms_norm_rope_reference)
    ]
    # of what is not used autograd has nothing, or zeros
    for got, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted)


@pytest.mark.parametrize("batch, tokens", [(0, 3), (2, 0)])
def test_empty(batch, tokens, device):
    judge(inputs_of(batch, 2, 1, tokens, 8, 6, device), torch.float32)


def test_qwen3_and_gemma3_compute_the_same(device):
    qwen3 = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    q, k, *weights, cos, sin = rounded(inputs_of(1, 4, 2, 3, 16, 16, device), torch.float32)
    for file, norms, form in (
        (qwen3, [qwen3.Qwen3RMSNorm(16, eps=1e-5) for _ in weights], {"cast": "before_weight"}),
        (gemma3, [gemma3.Gemma3RMSNorm(16, eps=1e-5) for _ in weights], {"cast": "after_weight", "offset": 1.0}),
    ):
        for norm, weight in zip(norms, weights, strict=True):
            norm.to(device).weight.data.copy_(weight)
        wanted = file.apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin)
        torch.testing.assert_close(rms_norm_rope(q, k, *weights, cos, sin, eps=1e-5, **form), wanted)


@pytest.mark.gpu
@pytest.mark.usefixtures("whole_gpu")
def test_more_elements_than_int32(device):
    tokens, heads, d = 2**19 + 1, 32, 128  # q: 2^31 + 2^12 elements, 4 GiB
    q = torch.randn(1, tokens, heads, d, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
    k = torch.randn(1, tokens, 1, d, dtype=torch.bfloat16, device=device).transpose(1, 2).requires_grad_()
    rest = rounded(inputs_of(1, 1, 1, tokens, d, d, device)[2:], torch.bfloat16)
    ys = rms_norm_rope(q, k, *rest)
    torch.autograd.backward(ys, [q.detach(), k.detach()])
    tails = [x.detach()[:, :, -3:].clone().requires_grad_() for x in (q, k)]
    tail_ys = rms_norm_rope(*tails, *rest[:2], *(x[:, -3:] for x in rest[2:]))
    torch.autograd.backward(tail_ys, [x.detach() for x in tails])
    for whole, tail in zip((*ys, q.grad, k.grad), (*tail_ys, *(x.grad for x in tails)), strict=True):
        assert same_bits(whole[:, :, -3:].detach(), tail.detach())


@pytest.mark.gpu
@pytest.mark.gpus
def test_runs_on_the_tensors_own_device():
    assert torch.cuda.current_device() == 0
    judge(inputs_of(1, 2, 1, 3, 8, 8, torch.device("cuda:1")), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
def test_compiles_to_one_graph(unsqueeze_dim, device):
    q, k, *rest = rounded(inputs_of(2, 4, 2, 65, 64, 48, device), torch.bfloat16)
    if unsqueeze_dim == 2:
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    leaves = [x.requires_grad_() for x in (q, k, *rest[:2])]

    def call(*inputs: Tensor) -> list[Tensor]:
        return [y * 2 for y in rms_norm_rope(*inputs, unsqueeze_dim=unsqueeze_dim)]

    got, wanted = (f(*leaves, *rest[2:]) for f in (torch.compile(call, fullgraph=True), call))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    grads = [torch.autograd.grad([y.sum() for y in ys], leaves) for ys in (got, wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "sizes, fit",
    [
        ((1, 16, 16, 3, 36, 32), (False, False)),  # the columns that stay are fewer than threads
        ((1, 16, 3, 3, 32, 32), (True, False)),
        pytest.param((2, 32, 8, 1025, 128, 128), (True, True), marks=pytest.mark.gpu),
        pytest.param((1, 16, 8, 513, 256, 64), (True, True), marks=pytest.mark.gpu),
    ],
)
def test_gradients_may_overwrite_those_of_the_results(sizes, fit, dtype, device):
    inputs = rounded(inputs_of(*sizes, device), dtype)
    dys = rounded(inputs_of(*sizes, device)[:2], dtype)
    results = []
    for overwrite in (False, True):
        leaves = [x.detach().requires_grad_() for x in inputs[:4]]
        lent = [dy.clone() for dy in dys]
        ys = rms_norm_rope(*leaves, *inputs[4:], overwrite_grad=overwrite)
        results.append((torch.autograd.grad(ys, leaves, lent), lent))
    (wanted, _), (got, lent) = results
    assert all(same_bits(a, b) for a, b in zip(got, wanted, strict=True))
    for dx, dy, before, fits in zip(got, lent, dys, fit, strict=False):
        assert (dx.data_ptr() == dy.data_ptr()) == fits
        assert fits or same_bits(dy, before)


def test_errors_name_the_argument(device):
    q, k, q_weight, k_weight, cos, sin = rounded(inputs_of(2, 3, 1, 5, 8, 8, device), torch.float32)
    for wrong, message in (
        ((q, k[:1], q_weight, k_weight, cos, sin), r"rms_norm_rope: q and k may differ in their heads only"),
        ((q, k, q_weight[:4], k_weight, cos, sin), r"rms_norm_rope: q_weight \(4,\) must be one value per column"),
        ((q, k, q_weight, k_weight.view(2, 4), cos, sin), r"rms_norm_rope: k_weight \(2, 4\) must be"),
        ((q, k, q_weight, k_weight, cos[:, :4], sin[:, :4]), r"rms_norm_rope: cos must be \[2 or 1, 5, R\]"),
        ((q, k, q_weight, k_weight, torch.complex(cos, sin), None), "cos is torch.complex64; complex angles are for"),
        ((q, k, q_weight, k_weight, cos.clone().requires_grad_(), sin), "rms_norm_rope: cos and sin get no gradient"),
        ((q, k.double(), q_weight, k_weight, cos, sin), "rms_norm_rope: k is torch.float64"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm_rope(*wrong)
    with pytest.raises(ValueError, match="rms_norm_rope: unsqueeze_dim is 3"):
        rms_norm_rope(q, k, q_weight, k_weight, cos, sin, unsqueeze_dim=3)
    with pytest.raises(ValueError, match="rms_norm_rope: cast is 'llama'; known are before_weight"):
        rms_norm_rope(q, k, q_weight, k_weight, cos, sin, cast="llama")


def test_without_the_interpreter_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    inputs = rounded(inputs_of(2, 3, 1, 5, 8, 6, torch.device("cpu")), torch.bfloat16)
    ours, references = rms_norm_rope(*inputs), rms_norm_rope_reference(*inputs)
    assert all(same_bits(a, b) for a, b in zip(ours, references, strict=True))
